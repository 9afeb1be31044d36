"""Stage 1 of BLIP-2: the losses against separate passes with dense masks, ranks, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

pytest.importorskip("transformers")

from mmkern.models import blip2
from mmkern.models.blip2 import Blip2ForPretraining
from tests.models.plain_blip2 import Losses, Sizes, stage1
from tests.models.small_blip2 import (
    HEADS,
    LAYERS,
    VOCABULARY,
    assert_same_gradients,
    batch,
    config,
    draw,
    gradients,
    small_stage1,
)
from tests.testing import run_ranks


def plain(model: Blip2ForPretraining, inputs: dict[str, Tensor], out: Any, **options: Any) -> Any:
    """The plain form on copies of the parameters: losses, and gradients by name."""
    parameters = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    norm = "vision_model.post_layernorm"
    image = nn.functional.layer_norm(
        model.image_tokens(inputs["pixel_values"]),
        (parameters[f"{norm}.weight"].shape[0],),
        parameters[f"{norm}.weight"],
        parameters[f"{norm}.bias"],
        model.vision_model.post_layernorm.eps,
    )
    losses = stage1(
        parameters,
        Sizes(LAYERS, HEADS),
        image,
        inputs["input_ids"],
        inputs["attention_mask"].sum(1),
        out.negative_images,
        out.negative_texts,
        dec=model.config.dec_token_id,
        ids=inputs.get("image_ids"),
        detach_columns=model.config.lavis_gradients,
        **options,
    )
    losses.total.backward()
    return losses, {name: value.grad for name, value in parameters.items()}


def assert_losses(out: Any, losses: Losses, tolerance: float) -> None:
    pairs = zip((out.loss_itc, out.loss_itm, out.loss_itg), losses, strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(out.loss, losses.total, rtol=0, atol=3 * tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str
)
@pytest.mark.parametrize("kind", ["global", "lavis", "image ids"])
def test_losses_are_the_plain_forms(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """The fused, shared form would train another model than the separate passes."""
    model = small_stage1(lavis_gradients=kind == "lavis").to(dtype)
    inputs = batch()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    if kind == "image ids":
        inputs["image_ids"] = torch.tensor([7, 3, 7, 5, 3])
    out = model(**inputs)
    out.loss.backward()
    losses, expected = plain(model, inputs, out)
    assert_losses(out, losses, tolerance)
    assert_same_gradients(gradients(model), expected, tolerance)
    assert_losses(out, plain(model, inputs, out, cached=True)[0], tolerance)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(model.get_parameter(name).grad is not None for name in trained)
    for index in (out.negative_images, out.negative_texts):
        assert (index != torch.arange(5)).all() and ((index >= 0) & (index < 5)).all()
        if kind == "image ids":
            assert (inputs["image_ids"][index] != inputs["image_ids"]).all()


def test_negatives_are_hard_and_drawn_anew() -> None:
    """Matching would see the same negatives all the time, or easy ones."""
    model, inputs = small_stage1(), batch()
    model.temp.data.fill_(0.001)
    out = model(**inputs, negatives_seed=3)
    scores = model.itc_scores(out.image_features, out.text_features)
    hardest = scores.masked_fill(torch.eye(5, dtype=torch.bool), -2)
    assert torch.equal(out.negative_texts, hardest.argmax(1))
    assert torch.equal(out.negative_images, hardest.argmax(0))
    model.temp.data.fill_(0.5)
    torch.manual_seed(0)
    draws = {tuple(model(**inputs).negative_texts.tolist()) for _ in range(8)}
    assert len(draws) > 1
    repeated = {tuple(model(**inputs, negatives_seed=3).negative_texts.tolist()) for _ in range(3)}
    assert len(repeated) == 1


def test_batch_of_one_has_no_negative() -> None:
    """One pair would be its own negative, or give NaN."""
    model, inputs = small_stage1(), batch(rows=1)
    out = model(**inputs)
    out.loss.backward()
    assert out.negative_images.tolist() == out.negative_texts.tolist() == [-1]
    losses, expected = plain(model, inputs, out)
    assert_losses(out, losses, 1e-5)
    assert out.loss.isfinite() and out.loss_itc.item() == pytest.approx(0, abs=1e-6)
    assert_same_gradients(gradients(model), expected, floor=1e-2)
    # Pairs that all show one image have no negative either.
    inputs = batch(rows=3) | {"image_ids": torch.tensor([4, 4, 4])}
    out = model(**inputs)
    assert out.negative_images.tolist() == [-1, -1, -1]
    assert_losses(out, plain(model, inputs, out)[0], 1e-5)


def test_texts_of_one_token_generate_nothing() -> None:
    """A batch without a token to predict would give NaN."""
    model = small_stage1()
    out = model(draw(2, 3, 28, 28), torch.tensor([[1], [2]]))
    out.loss.backward()
    assert out.loss_itg == 0 and out.loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_padding_does_not_matter() -> None:
    """Padding to the longest text would train otherwise than padding to a fixed length."""
    model, inputs = small_stage1(), batch()
    wide = {k: nn.functional.pad(inputs[k], (0, 9)) for k in ("input_ids", "attention_mask")}
    out = model(**inputs, negatives_seed=1)
    padded = model(**{**inputs, **wide}, negatives_seed=1)
    torch.testing.assert_close(out.loss, padded.loss)
    # What stands in the padding is not read.
    noise = torch.where(wide["attention_mask"] == 0, 11, wide["input_ids"])
    noisy = model(**{**inputs, **wide, "input_ids": noise}, negatives_seed=1)
    assert torch.equal(padded.loss, noisy.loss)


def test_single_query() -> None:
    """With one query the maximum would run over the texts."""
    model, inputs = small_stage1(num_query_tokens=1), batch()
    out = model(**inputs)
    assert_losses(out, plain(model, inputs, out)[0], 1e-5)


def shares(rank: int, sizes: list[int]) -> dict[str, Tensor]:
    inputs = batch(sum(sizes)) | {"image_ids": torch.tensor([1, 2, 3, 1, 5, 6, 7, 2])}
    inputs["image_ids"] = inputs["image_ids"][: sum(sizes)]
    start = sum(sizes[:rank])
    return {k: v[start : start + sizes[rank]].contiguous() for k, v in inputs.items()}


RANKS = [([3, 2], True), ([2, 2], False)]  # pairs of each rank, frozen image encoder


def step(
    sizes: list[int], frozen: bool, rank: int | None = None, **options: Any
) -> tuple[Blip2ForPretraining, Any]:
    """A model after a backward: of one rank, or of the joint batch without ranks."""
    model = small_stage1(freeze_vision=frozen).double()
    inputs = shares(rank or 0, sizes if rank is not None else [sum(sizes)])
    inputs["pixel_values"] = inputs["pixel_values"].double()
    wrapped = model if rank is None else nn.parallel.DistributedDataParallel(model)
    out = wrapped(**inputs, **options)
    out.loss.backward()
    return model, out


def on_two_ranks(rank: int, world: int) -> list[Any]:
    results = []
    for sizes, frozen in RANKS:
        model, out = step(sizes, frozen, rank, group=dist.group.WORLD, negatives_seed=5)
        drawn = step(sizes, frozen, rank, group=dist.group.WORLD)[1].loss
        losses = [x.detach() for x in (out.loss_itc, out.loss_itm, out.loss_itg)]
        negatives = out.negative_images, out.negative_texts
        results.append((losses, gradients(model), negatives, drawn.detach()))
    return results


def test_two_ranks_are_one() -> None:
    """Training on two ranks would draw negatives from one only, weight texts by their rank's
    length, or lose the gradient of a negative image."""
    every = run_ranks(2, on_two_ranks)
    for case, (sizes, frozen) in enumerate(RANKS):
        model, out = step(sizes, frozen, negatives_seed=5)
        ranks = [result[case] for result in every]
        for i, joint in enumerate((out.negative_images, out.negative_texts)):
            assert torch.equal(torch.cat([rank[2][i] for rank in ranks]), joint)
        for losses, found, _, drawn in ranks:
            for actual, expected in zip(
                losses, (out.loss_itc, out.loss_itm, out.loss_itg), strict=True
            ):
                torch.testing.assert_close(actual, expected.detach(), rtol=1e-12, atol=1e-12)
            assert_same_gradients(found, gradients(model), 1e-9)
            # Without a seed, ranks agree on one.
            torch.testing.assert_close(drawn, ranks[0][3], rtol=1e-12, atol=0)


def test_half_precision_encoder(tmp_path: Path) -> None:
    """A model loaded in half precision would run its Q-Former there, or fail on mixed dtypes."""
    small_stage1().save_pretrained(tmp_path)
    model = Blip2ForPretraining.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.vision_model.encoder.layers[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert model.qformer.encoder.layer[0].output.dense.weight.dtype == torch.float32
    assert model.vision_model.post_layernorm.weight.dtype == torch.float32
    model(**batch()).loss.backward()


def test_autocast_and_checkpointing_train() -> None:
    """Mixed precision would fail on dtypes that differ; checkpointing would give no gradient."""
    model, inputs = small_stage1(), batch()
    expected = model(**inputs, negatives_seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**inputs, negatives_seed=1)
    out.loss.backward()
    torch.testing.assert_close(out.loss.float(), expected.loss, rtol=0.1, atol=0.1)
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable()
    model(**inputs).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("builder", "trained"), [("blip2_vit_g", 186_705_470), ("blip2_vit_l", 183_165_758)]
)
def test_published_sizes(builder: str, trained: int) -> None:
    """The paper's 188 million (ViT-g) would be others."""
    with torch.device("meta"):
        model = getattr(blip2, builder)()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    assert model.config.dec_token_id == 30522
    assert model.vision_model.post_layernorm.eps == 1e-5


def test_initialisation() -> None:
    """All queries would be alike, or the losses start at other values."""
    torch.manual_seed(0)
    model = Blip2ForPretraining(config())
    assert model.query_tokens.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.temp.item() == pytest.approx(0.07)
    out = model(**batch())
    assert out.loss_itm.item() == pytest.approx(0.6365, abs=0.2)  # entropy of one in three
    assert out.loss_itg.item() == pytest.approx(torch.tensor(VOCABULARY).log().item(), abs=0.3)


def test_temperature_is_clamped() -> None:
    """τ could reach 0 and the loss turn around."""
    model = small_stage1()
    for start, end in ((-0.3, 0.001), (0.9, 0.5), (0.07, 0.07)):
        model.temp.data.fill_(start)
        model.clamp_logit_scale_()
        assert model.temp.item() == pytest.approx(end)


# ---- retrieval


def test_retrieval_scores() -> None:
    """Features taken apart would not score as in training, or re-ranking as one pair at a time."""
    model, inputs = small_stage1(), batch()
    text = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        out = model(**inputs)
        image = model.encode_image(inputs["pixel_values"])
        z, t = model.image_features(image), model.text_features(**text)
        close = {"rtol": 0, "atol": 1e-5}
        torch.testing.assert_close(z, out.image_features, **close)
        torch.testing.assert_close(t, out.text_features, **close)
        scores = model.itc_scores(z, t)
        expected = torch.einsum("nqd,md->nmq", z, t).amax(2)
        torch.testing.assert_close(scores, expected)
        pairs = torch.cat([
            model.itm_logits(image[i : i + 1], **text)[:, 1][None] for i in range(5)
        ])  # fmt: skip
        one = model.itm_logits(image, **text)[:, 1]
    torch.testing.assert_close(one, pairs.diagonal(), **close)
    torch.testing.assert_close(out.itm_logits[:5, 1], one, **close)
    for k, weight in ((2, {}), (9, {"contrast_weight": 7.0})):
        i2t, t2i = model.rerank(scores, image, **text, k=k, batch_size=2, **weight)
        total = pairs + weight.get("contrast_weight", 1.0) * scores
        kept = scores.topk(min(k, 5), 1).indices
        mask = torch.zeros(5, 5, dtype=torch.bool).scatter(1, kept, True)
        torch.testing.assert_close(i2t, torch.where(mask, total, -torch.inf), **close)
        kept = scores.topk(min(k, 5), 0).indices
        mask = torch.zeros(5, 5, dtype=torch.bool).scatter(0, kept, True)
        torch.testing.assert_close(t2i, torch.where(mask, total, -torch.inf), **close)


def test_images_are_projected_once_in_reranking() -> None:
    """k texts of an image would cost k projections of the image."""
    model, inputs = small_stage1(), batch()
    image = model.encode_image(inputs["pixel_values"])
    calls = []
    project = model.qformer.image_keys_values
    model.qformer.image_keys_values = lambda x: calls.append(len(x)) or project(x)
    model.rerank(torch.rand(5, 5), image, inputs["input_ids"], inputs["attention_mask"], k=4)
    assert calls == [1] * 5


def test_bad_reranking_raises() -> None:
    """Scores of other images would be re-ranked without a word."""
    model, inputs = small_stage1(), batch()
    image = model.encode_image(inputs["pixel_values"])
    with pytest.raises(ValueError, match=r"scores must be \[5, 5\]"):
        model.rerank(torch.rand(5, 4), image, inputs["input_ids"])
    with pytest.raises(ValueError, match="k must be at least 1"):
        model.rerank(torch.rand(5, 5), image, inputs["input_ids"], k=0)


# ---- bad input

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"pixel_values": draw(4, 3, 28, 28)}, ValueError, "4 samples and input_ids 5"),
    ({"pixel_values": draw(5, 3, 32, 32)}, ValueError, r"28, 28\], got \[5, 3, 32, 32\]"),
    ({"pixel_values": torch.zeros(5, 3, 28, 28).long()}, TypeError, "floating point"),
    ({"image_ids": torch.arange(4)}, ValueError, r"image_ids must be \[5\], one for each pair"),
    ({"image_ids": torch.rand(5)}, TypeError, "integer tensor, got torch.float32"),
    ({"image_ids": ["a"] * 5}, TypeError, "integer tensor, got list"),
    ({"input_ids": torch.ones(5, 65).long(), "attention_mask": None}, ValueError, "at most 64"),
    ({"input_ids": torch.full((5, 6), 61)}, ValueError, r"\[0, 61\)"),
    ({"input_ids": torch.ones(5).long()}, ValueError, r"\[batch, length\]"),
    ({"input_ids": torch.ones(5, 0).long(), "attention_mask": None}, ValueError, "at least 1"),
    ({"attention_mask": torch.ones(5, 5)}, ValueError, r"must be \[5, 6\], got \[5, 5\]"),
    ({"attention_mask": 1 - torch.eye(6)[:5]}, ValueError, "row 0 is not"),
    ({"attention_mask": torch.zeros(5, 6).long()}, ValueError, "row 0 is not"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[b[2] for b in BAD])
def test_bad_inputs_raise(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """A mistake in the data would show as an index error deep inside, or not at all."""
    with pytest.raises(error, match=message):
        small_stage1()(**{**batch(), **arguments})


def test_benchmark_variants_agree() -> None:
    """What is timed against separate passes would compute something else, or sol be a share of the
    wrong amount of work."""
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks import case as cases
    from benchmarks.models.blip2 import SUITE

    shape = {"B": 2, "L": 10, "layers": 2, "vision": 0, "T": 24}
    small = cases.Case(shape, "float32", "fwd+bwd", "captions")
    inputs = SUITE.inputs(small)
    ours = cases.step(SUITE.variants["mmkern"].make(), inputs, small.mode)
    for name in ("separate", "cached"):
        other = cases.step(SUITE.variants[name].make(), inputs, small.mode)
        torch.testing.assert_close(ours[0], other[0])
        for a, b in zip(ours[1:], other[1:], strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6
    full = cases.Case(shape, "float32", "fwd+bwd", "full")
    inputs = SUITE.inputs(full)
    with FlopCounterMode(display=False) as counter:
        SUITE.variants["mmkern"].make()(*inputs).backward()
    assert cases.flops(SUITE, full) == pytest.approx(counter.get_total_flops(), rel=0.1)
