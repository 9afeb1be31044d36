"""LLaVA against transformers: features, logits, loss, gradients, ids, checkpoints, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers import LlavaForConditionalGeneration as Theirs

from mmkern.models.llava import LlavaConfig, LlavaForConditionalGeneration
from mmkern.models.llava_checkpoints import LAYOUTS, layout_of
from tests.models import small_clip
from tests.models.small_llava import IMAGE, PATCHES, TEXT, fields, padded, pair, samples, small
from tests.testing import run_ranks

MIXED = [1, 0, 2]


def forward(model: Any, batch: dict[str, Tensor], **options: Any) -> Any:
    """transformers takes no empty pixels."""
    kept = {n: v for n, v in batch.items() if n != "pixel_values" or len(v)}
    return model(**kept, **options)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    ("attention", "strategy", "layer"),
    [("eager", "default", -2), ("sdpa", "default", -1), ("sdpa", "full", -2)],
)
def test_is_transformers(attention: str, strategy: str, layer: int, left: bool) -> None:
    """A user moving from transformers would get another loss, other logits or other gradients."""
    changes = {"vision_feature_select_strategy": strategy, "vision_feature_layer": layer}
    ours, theirs = pair(attention, **changes)
    batch = padded(samples(MIXED, each=PATCHES + (strategy == "full")), left)
    # transformers counts pads as positions unless it is told.
    places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = theirs(**batch, position_ids=places)
    actual, full = ours(**batch), ours(**batch, return_logits=True)
    features = torch.cat(list(theirs.get_image_features(batch["pixel_values"]).pooler_output))
    torch.testing.assert_close(actual.image_features.flatten(0, 1), features.flatten(0, -2),
                               rtol=0, atol=1e-5)  # fmt: skip
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(full.logits[real], expected.logits[real], rtol=0, atol=5e-5)
    for loss in (actual.loss, full.loss):
        torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-5)
    expected.loss.backward()
    actual.loss.backward()
    reference = LlavaForConditionalGeneration.from_checkpoint(
        {n: torch.zeros_like(p) if p.grad is None else p.grad
         for n, p in theirs.named_parameters()}, ours.config
    ).state_dict()  # fmt: skip
    largest = max(float(value.abs().max()) for value in reference.values())
    for name, parameter in ours.named_parameters():
        error = float((parameter.grad - reference[name]).abs().max())
        scale = max(float(reference[name].abs().max()), 1e-2 * largest)
        assert error / scale < 1e-4, name


def test_blocks_behind_the_features_do_not_exist() -> None:
    """The last block would be computed, and its weights held, for nothing."""
    assert len(pair()[0].vision_model.transformer.resblocks) == 2
    config = LlavaConfig(**fields())
    assert (config.vision_config.num_hidden_layers, config.vision_feature_layer) == (2, -1)
    again = LlavaConfig(**{n: v for n, v in config.to_dict().items() if n != "model_type"})
    assert again.vision_config.num_hidden_layers == 2


@pytest.mark.parametrize("left", [False, True])
def test_a_mixed_batch_is_its_samples(left: bool) -> None:
    """Another sample's images or padding would change what a sample gives."""
    model = small()
    parts = samples(MIXED)
    batch = padded(parts, left)
    together = model(**batch, return_logits=True)
    mask = batch["attention_mask"].bool()
    total, count = torch.zeros(()), 0
    for number, part in enumerate(parts):
        alone = model(**part, return_logits=True)
        torch.testing.assert_close(together.logits[number][mask[number]], alone.logits[0],
                                   rtol=0, atol=1e-5)  # fmt: skip
        labelled = int((part["labels"][:, 1:] != -100).sum())
        total, count = total + alone.loss * labelled, count + labelled
    torch.testing.assert_close(together.loss, total / count)


def test_greedy_ids_are_those_of_transformers() -> None:
    """Answers would differ from those of the checkpoint's authors."""
    ours, theirs = pair()
    batch = padded(samples(MIXED), left=True)
    del batch["labels"]
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(**batch, **options), theirs.generate(**batch, **options))


def test_text_alone_is_the_language_model() -> None:
    """Text would be read through the image side, or stop DistributedDataParallel."""
    model = small()
    batch = padded(samples([0, 0]), left=False)
    loss = model(**batch).loss
    expected = model.language_model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
    ).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for name, parameter in model.multi_modal_projector.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_all_labels_ignored_is_zero_and_not_nan() -> None:
    """One sample without an answer would make a whole run NaN."""
    model = small()
    batch = padded(samples([1]), left=False)
    batch["labels"].fill_(-100)
    loss = model(**batch).loss
    loss.backward()
    assert loss == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def _one_image_between_two_ranks(rank: int, world: int) -> Any:
    model = torch.nn.parallel.DistributedDataParallel(small())
    batch = padded(samples([1 - rank]), left=False)
    for _ in range(2):
        model(**batch, num_items_in_batch=1).loss.backward()
    weight = model.module.multi_modal_projector.linear_1.weight
    return weight.grad


def test_a_rank_without_images_does_not_hang() -> None:
    """A batch of text on one rank would stop all of them, waiting for its projector's gradients."""
    first, second = run_ranks(2, _one_image_between_two_ranks)
    assert torch.equal(first, second) and first.any()


@pytest.mark.parametrize(
    ("places", "images", "counts", "message"),
    [
        ([3], 1, None, "sample 0 has 3 image tokens in input_ids, expected a multiple of 4"),
        ([5, 3], 2, None, "sample 0 has 5 image tokens"),
        ([4, 4], 2, [2, 0], "sample 0 has 4 image tokens in input_ids, its 2 images become 8"),
        ([4, 8], 2, None, "places for 3 images, pixel_values has 2.*from sample 1 on"),
        ([0], 1, None, "places for 0 images, pixel_values has 1"),
        ([4], 0, None, "places for 1 images, pixel_values has 0"),
    ],
)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_image_tokens_that_do_not_fit(
    call: str, places: list[int], images: int, counts: list[int] | None, message: str
) -> None:
    """Features of one sample would land in another, as transformers lets 5 + 3 pass for 4 + 4."""
    model = small()
    ids = torch.full((len(places), 12), 5)
    for row, count in zip(ids, places, strict=True):
        row[1 : 1 + count] = IMAGE
    given = None if counts is None else torch.tensor(counts)
    with pytest.raises(ValueError, match=message):
        getattr(model, call)(
            input_ids=ids, pixel_values=torch.randn(images, 3, 28, 28), image_counts=given
        )


def test_labels_and_ids_that_do_not_fit() -> None:
    """Training on image tokens, or an id that no row of the table has, would pass or crash late."""
    model = small()
    batch = padded(samples([1]), left=False)
    wrong = {**batch, "labels": batch["input_ids"]}
    with pytest.raises(ValueError, match="sample 0 has labels at 4 image tokens"):
        model(**wrong)
    wrong = {**batch, "input_ids": batch["input_ids"] + (batch["input_ids"] < 9) * 100}
    with pytest.raises(ValueError, match=r"input_ids must lie in \[0, 70\)"):
        model(**wrong)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_round_trip(layout: str) -> None:
    """A checkpoint in this layout would load as another model, or not go back."""
    ours, theirs = pair()
    state = ours.to_checkpoint(layout)
    assert layout_of(state) == layout
    again = LlavaForConditionalGeneration.from_checkpoint(state, ours.config)
    for name, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    if layout == "transformers":
        back = Theirs(ours.transformers_config()).eval()
        back.load_state_dict(state)
        batch = padded(samples(MIXED), left=False)
        assert torch.equal(forward(back, batch).logits, forward(theirs, batch).logits)


def test_transformers_folder_loads_and_ours_too(tmp_path: Path) -> None:
    """A published folder, or a model that was saved, would not load."""
    ours, theirs = pair()
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    found = LlavaForConditionalGeneration.from_checkpoint(tmp_path / "theirs")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours")
    for name, value in ours.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
        assert torch.equal(again.state_dict()[name], value), name
    assert again.config.image_token_index == IMAGE


def test_checkpoints_are_strict() -> None:
    """A damaged file would load, its missing weights random."""
    ours, _ = pair()
    state = ours.to_checkpoint("original")
    load = LlavaForConditionalGeneration.from_checkpoint
    for change, message in (
        ({"model.mm_projector.2.bias": None}, "missing: multi_modal_projector.linear_2.bias"),
        ({"model.image_newline": torch.ones(3)}, "unexpected: language_model.model.image_newline"),
        ({"extra": torch.ones(1)}, "unexpected: extra"),
        ({"model.mm_projector.0.bias": torch.ones(3)}, r"linear_1.bias \[3\] instead of \[24\]"),
        ({_TOWER + "pre_layrnorm.bias": None}, "missing: .*pre_layrnorm.bias"),
    ):
        wrong = {n: v for n, v in {**state, **change}.items() if v is not None}
        with pytest.raises(ValueError, match=message):
            load(wrong, ours.config)
    with pytest.raises(ValueError, match="none of the layouts"):
        load({"a": torch.ones(1)}, ours.config)


_TOWER = "model.vision_tower.vision_tower.vision_model."


def test_frozen_tower_comes_from_its_own_file() -> None:
    """The authors' files of a frozen encoder, which leave it out, would not load."""
    clip = small_clip.small()
    ours = small(
        vision_config={
            "image_size": clip.config.image_size, "patch_size": clip.config.vision_patch_size,
            "hidden_size": clip.config.vision_width, "num_hidden_layers": clip.config.vision_layers,
            "num_attention_heads": clip.config.vision_heads,
            "quick_gelu": clip.config.quick_gelu, "mlp_ratio": clip.config.vision_mlp_ratio,
        }
    )  # fmt: skip
    state = {n: v for n, v in ours.to_checkpoint("original").items() if not n.startswith(_TOWER)}
    load = LlavaForConditionalGeneration.from_checkpoint
    with pytest.raises(ValueError, match="missing: vision_model"):
        load(state, ours.config)
    found = load(state, ours.config, vision=clip.state_dict())
    assert torch.equal(found.vision_model.conv1.weight, clip.visual.conv1.weight)


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_projector_files(kind: str, tmp_path: Path) -> None:
    """The first stage's file, all that it hands on, would not be taken over."""
    first, second = small(mm_projector_type=kind), small(mm_projector_type=kind)
    first.multi_modal_projector.linear_1.weight.data.fill_(0.25)
    first.save_projector(tmp_path / "mm_projector.bin")
    names = set(torch.load(tmp_path / "mm_projector.bin", weights_only=True))
    layers = ["0.", "2."] if kind == "mlp2x_gelu" else [""]
    kinds = ("weight", "bias")
    assert names == {f"model.mm_projector.{layer}{leaf}" for layer in layers for leaf in kinds}
    second.load_projector(tmp_path / "mm_projector.bin")
    for a, b in zip(
        first.multi_modal_projector.parameters(),
        second.multi_modal_projector.parameters(),
        strict=True,
    ):
        assert torch.equal(a, b)
    lora = {f"base_model.model.{n}": v for n, v in first.to_checkpoint("original").items()
            if "mm_projector" in n}  # fmt: skip
    second.load_projector(lora)
    with pytest.raises(ValueError, match="unexpected: embed_tokens"):
        second.load_projector({**lora, "embed_tokens": torch.ones(1)})
    other = small(mm_projector_type="linear" if kind == "mlp2x_gelu" else "mlp2x_gelu")
    with pytest.raises(ValueError, match="linear_2"):
        other.load_projector(lora)


def test_lora_is_merged_for_other_layouts() -> None:
    """What stage 2 learned would be missing from the exported model."""
    model = small(lora_rank=2, freeze_language_model=True)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in n for n in trained if n.startswith("language_model."))
    plain = LlavaForConditionalGeneration.from_checkpoint(
        model.to_checkpoint("transformers_files"), LlavaConfig(**fields())
    )
    batch = padded(samples(MIXED), left=False)
    torch.testing.assert_close(plain(**batch).loss, model(**batch).loss)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": [-2, -1]}, "vision_feature_layer must be one of -1 to -3"),
        ({"vision_feature_layer": -4}, "vision_feature_layer must be one of -1 to -3"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act must be 'gelu'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "must be a CLIP's"),
    ],
)
def test_configurations_that_are_not_llava(changes: dict[str, Any], message: str) -> None:
    """Another model than the configuration's would be built without a word."""
    with pytest.raises(ValueError, match=message):
        LlavaConfig(**fields(**changes))


def test_exports_that_transformers_cannot_hold() -> None:
    """An export would load there and compute something else."""
    with pytest.raises(ValueError, match="no linear projector"):
        small(mm_projector_type="linear").to_checkpoint("transformers")
    with pytest.raises(ValueError, match="image token 70 in the embeddings, which have 70 rows"):
        small(image_token_index=70).transformers_config()


def test_an_image_token_outside_the_vocabulary_serves() -> None:
    """The authors' vocabularies have no image token; a lookup of it would crash."""
    inside, outside = small(), small(image_token_index=500)
    batch = padded(samples(MIXED), left=False)
    moved = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, 500)}
    assert torch.equal(inside(**batch).loss, outside(**moved).loss)
    assert LlamaConfig(**{n: v for n, v in TEXT.items() if n != "model_type"}).vocab_size == 70
