"""CLIP against transformers' CLIPModel; what its forward, configuration and training give."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from mmkern.models import clip as builders
from mmkern.models.clip import CLIP, CLIPConfig
from mmkern.nn import ClipLoss
from tests.models.small_clip import (
    END,
    VOCABULARY,
    batch,
    small,
    small_resnet,
    transformers_model,
)


@pytest.mark.parametrize(
    ("attention", "activation", "end"),
    [("eager", "quick_gelu", END), ("sdpa", "gelu", 2), ("sdpa", "quick_gelu", 2)],
)
def test_is_transformers_clip(attention: str, activation: str, end: int) -> None:
    """A user moving from transformers would get other embeddings, loss or gradients."""
    theirs = transformers_model(attention, activation, end)
    ours = CLIP.from_transformers(theirs).train()
    images, ids = batch()
    expected = theirs(pixel_values=images, input_ids=ids, return_loss=True)
    actual = ours(pixel_values=images, input_ids=ids)
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(actual.image_features, expected.image_embeds, **close)
    torch.testing.assert_close(actual.text_features, expected.text_embeds, **close)
    logits = actual.logit_scale * actual.image_features @ actual.text_features.T
    torch.testing.assert_close(logits, expected.logits_per_image, **close)
    torch.testing.assert_close(actual.loss, expected.loss, **close)
    torch.testing.assert_close(
        ours.encode_image(images),
        theirs.get_image_features(images).pooler_output,
        rtol=0,
        atol=1e-5,
    )

    actual.loss.backward()
    expected.loss.backward()
    gradients = {name: value.grad for name, value in theirs.named_parameters()}
    copy = CLIP.from_transformers(theirs)
    copy.load_state_dict(
        builders.checkpoints.to_openai(gradients) | {"logit_scale": gradients["logit_scale"]}
    )
    for name, value in ours.named_parameters():
        reference = copy.get_parameter(name)
        error = (value.grad - reference).norm() / reference.norm().clamp(min=1e-6)
        assert error < 1e-4, (name, error)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_low_precision_is_near_transformers(dtype: torch.dtype) -> None:
    """Evaluation in bf16 would drift from what transformers gives in bf16."""
    theirs = transformers_model("sdpa", "gelu", END).to(dtype)
    ours = CLIP.from_transformers(theirs).to(dtype)
    images, ids = batch()
    expected = theirs(pixel_values=images.to(dtype), input_ids=ids)
    actual = ours(pixel_values=images, input_ids=ids)
    torch.testing.assert_close(actual.image_features, expected.image_embeds, rtol=0, atol=2e-2)
    torch.testing.assert_close(actual.text_features, expected.text_embeds, rtol=0, atol=2e-2)


def test_builders_take_overrides() -> None:
    """A recipe's changes to a published size would be ignored."""
    with torch.device("meta"):
        model = builders.clip_vit_b_32(image_size=64, quick_gelu=False, text_layers=2)
    assert model.visual.image_size == 64 and not model.config.quick_gelu
    assert len(model.transformer.resblocks) == 2


def test_building_draws_each_weight_once() -> None:
    """transformers would initialise the towers again, otherwise than the paper."""
    model = small()
    assert model.logit_scale.item() == pytest.approx(math.log(5.0))
    assert model.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)
    fresh = CLIP(CLIPConfig(text_layers=1, vision_layers=1, vocab_size=VOCABULARY))
    assert fresh.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert fresh.visual.proj.std().item() == pytest.approx(768**-0.5, rel=0.02)


def test_loss_is_the_papers_and_optional() -> None:
    """forward would return another loss than ClipLoss gives for the same features, or none."""
    model = small()
    images, ids = batch()
    out = model(images, ids)
    logits = out.logit_scale * out.image_features @ out.text_features.T
    labels = torch.arange(len(images))
    cross_entropy = nn.functional.cross_entropy
    expected = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(out.loss, expected)
    features = out.image_features, out.text_features, out.logit_scale
    torch.testing.assert_close(ClipLoss()(*features), out.loss)
    assert model(images, ids, return_loss=False).loss is None
    # A processor's further outputs do not matter.
    assert torch.equal(model(images, ids, attention_mask=ids.ne(0)).loss, out.loss)


def test_one_input_gives_one_embedding() -> None:
    """Encoding only images or only texts would need the other."""
    model = small()
    images, ids = batch()
    both = model(images, ids)
    image, text = model(pixel_values=images), model(input_ids=ids)
    assert image.loss is None and image.text_features is None and text.image_features is None
    assert torch.equal(image.image_features, both.image_features)
    assert torch.equal(text.text_features, both.text_features)
    torch.testing.assert_close(image.image_features.norm(dim=1), torch.ones(5))
    unit = torch.nn.functional.normalize(model.encode_image(images), dim=-1)
    assert torch.equal(unit, model.encode_image(images, normalize=True))


@pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")
@pytest.mark.parametrize("build", [small, small_resnet])
def test_gradient_checkpointing_gives_the_same_gradients(build: Callable[..., CLIP]) -> None:
    """Training with less memory would train another model, or update batch statistics twice."""
    model, plain = build().train(), build().train()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    calls = []
    for block in model.transformer.resblocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    images, ids = batch(model.config.image_size)
    loss, expected = model(images, ids).loss, plain(images, ids).loss
    loss.backward()
    expected.backward()
    assert len(calls) == 2 * len(model.transformer.resblocks)
    assert torch.equal(loss, expected)
    for (name, value), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value.grad, other.grad, msg=name)
    for (name, value), other in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(value, other), name


def test_logit_scale_is_clamped() -> None:
    """The temperature would leave [1, 100], where the paper holds it, and training diverge."""
    model = small()
    for start, end in ((9.0, math.log(100)), (-1.0, 0.0), (3.0, 3.0)):
        model.logit_scale.data.fill_(start)
        model.clamp_logit_scale_()
        assert model.logit_scale.item() == pytest.approx(end)
    assert model.logit_scale.requires_grad


def test_autocast_trains() -> None:
    """Mixed-precision training would fail on dtypes that differ, or give no gradient."""
    for model in (small(), small_resnet()):
        images, ids = batch(model.config.image_size)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(images, ids).loss
        loss.backward()
        torch.testing.assert_close(loss, model(images, ids).loss, rtol=0.1, atol=0.1)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give pixel_values, input_ids or both"),
        (
            {"pixel_values": torch.zeros(2, 3, 28, 28), "return_loss": True},
            "needs pixel_values and",
        ),
        (
            {
                "pixel_values": torch.zeros(2, 3, 28, 28),
                "input_ids": torch.full((3, 4), END),
            },
            "2 samples and input_ids 3",
        ),
        ({"pixel_values": torch.zeros(2, 3, 32, 32)}, r"28, 28\], got \[2, 3, 32, 32\]"),
        ({"input_ids": torch.full((3, 17), END)}, "got 17"),
        ({"input_ids": torch.full((3, 4), VOCABULARY)}, r"\[0, 100\)"),
    ],
)
def test_bad_inputs_raise(arguments: dict[str, Any], message: str) -> None:
    """A mistake in the data would show as an index error deep inside, or not at all."""
    with pytest.raises(ValueError, match=message):
        small()(**arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_layers": (1, 1, 1, 1)}, "four depths and vision_patch_size=None"),
        ({"vision_patch_size": None}, "one depth and a patch size"),
        ({"vision_width": 100, "vision_heads": None}, "vision_heads must be given"),
        ({"vision_heads": 5}, "vision_heads must divide the width 64, got 5"),
        ({"text_width": 32}, "text_heads must be given"),
    ],
)
def test_bad_configurations_raise(fields: dict[str, Any], message: str) -> None:
    """A configuration that makes no model would fail somewhere inside a tower."""
    with pytest.raises(ValueError, match=message):
        small(**fields)
