"""The Q-Former against transformers' two, its counts, and what its shortcuts must not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmkern.layout import RowIntervals
from mmkern.nn import QFormer, TextEmbeddings
from tests.models.small_blip2 import (
    HIDDEN,
    POSITIONS,
    QUERIES,
    SIZES,
    TEXT,
    TOKENS,
    VOCABULARY,
    WIDTH,
    assert_same_gradients,
    draw,
    draw_ids,
    gradients,
    redraw,
)

LENGTHS = torch.tensor([6, 0, 3])


def small(**overrides: Any) -> QFormer:
    return redraw(QFormer(**{**SIZES, "use_qformer_text_input": True, **overrides}))


def small_embeddings() -> TextEmbeddings:
    return redraw(TextEmbeddings(VOCABULARY, HIDDEN, POSITIONS), seed=3)


def theirs(attention: str, instruct: bool = False) -> Any:
    """transformers' Q-Former with the weights of `small()` under the same keys."""
    transformers = pytest.importorskip("transformers")
    kind = "InstructBlip" if instruct else "Blip2"
    sizes = {k: v for k, v in TEXT.items() if not (instruct and k == "use_qformer_text_input")}
    config = getattr(transformers, f"{kind}QFormerConfig")(**SIZES, **sizes)
    config._attn_implementation = attention
    model = getattr(transformers, f"{kind}QFormerModel")(config)
    return redraw(model)


def run_both(
    ours: nn.Module, other: nn.Module, mine: Callable[[], Tensor], his: Callable[[], Tensor]
) -> None:
    """Outputs within 1e-5, gradients of a weighted sum of them within 1e-5 of the largest."""
    actual, expected = mine(), his()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    weights = draw(*actual.shape, seed=9)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_same_gradients(gradients(ours), gradients(other))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", ["queries", "text", "matching", "generation"])
def test_is_transformers_blip2(case: str, attention: str):
    """Published BLIP-2 weights would compute something else here."""
    other = theirs(attention)
    ours = small()
    ours.load_state_dict(other.state_dict(), strict=True)
    image, queries = draw(3, TOKENS, WIDTH), draw(1, QUERIES, HIDDEN, seed=4)
    text = small_embeddings()(draw_ids(3, 6)).detach()
    both = torch.cat([queries.expand(3, -1, -1), text], 1)
    ones = torch.ones(3, TOKENS, dtype=torch.long)
    filled = torch.arange(6) < LENGTHS.clamp(min=1)[:, None]
    keys = torch.cat([torch.ones(3, QUERIES, dtype=torch.bool), filled], 1)
    arguments: dict[str, Any] = {"encoder_hidden_states": image, "encoder_attention_mask": ones}
    if case == "queries":

        def mine() -> Tensor:
            return ours(queries, image=image)

        arguments["query_embeds"] = queries.expand(3, -1, -1)
    elif case == "text":
        mask = RowIntervals.bidirectional(0, 6, LENGTHS.clamp(min=1))

        def mine() -> Tensor:
            return ours(None, text, mask)

        arguments = {"query_embeds": text, "query_length": 0, "attention_mask": filled.long()}
    elif case == "matching":
        mask = RowIntervals.bidirectional(QUERIES, 6, LENGTHS.clamp(min=1))

        def mine() -> Tensor:
            return ours(queries, text, mask, image)

        arguments |= {"query_embeds": both, "query_length": QUERIES}
        # transformers builds the image's mask for all rows: without one, as all of it is read.
        arguments |= {"attention_mask": keys.long(), "encoder_attention_mask": None}
    else:
        mask = RowIntervals.multimodal_causal(QUERIES, 6, LENGTHS.clamp(min=1))

        def mine() -> Tensor:
            return ours(queries, text, mask, image)

        dense = torch.where(mask.to_dense(), 0.0, torch.finfo(torch.float32).min)
        arguments |= {"query_embeds": both, "query_length": QUERIES}
        arguments |= {"attention_mask": dense[:, None], "encoder_attention_mask": None}
    run_both(ours, other, mine, lambda: other(**arguments).last_hidden_state)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_is_transformers_instructblip(attention: str):
    """Published InstructBLIP weights would compute something else, or read padded image tokens."""
    other = theirs(attention, instruct=True)
    ours = small(vocab_size=VOCABULARY, max_position_embeddings=POSITIONS)
    ours.load_state_dict(other.state_dict(), strict=True)
    image, queries, ids = draw(3, TOKENS, WIDTH), draw(1, QUERIES, HIDDEN, seed=4), draw_ids(3, 6)
    seen = torch.tensor([7, 4, 1])
    mask = RowIntervals.bidirectional(QUERIES, 6, LENGTHS)
    image_mask = RowIntervals.full(QUERIES, TOKENS, seen)
    filled = torch.arange(6) < LENGTHS[:, None]
    keys = torch.cat([torch.ones(3, QUERIES, dtype=torch.bool), filled], 1)

    def his() -> Tensor:
        return other(
            ids,
            attention_mask=keys.long(),
            query_embeds=queries.expand(3, -1, -1),
            encoder_hidden_states=image,
            encoder_attention_mask=(torch.arange(TOKENS) < seen[:, None]).long(),
        ).last_hidden_state

    run_both(ours, other, lambda: ours(queries, ids, mask, image, image_mask), his)


@pytest.mark.parametrize(
    ("arguments", "vocabulary", "parameters"),
    [
        # LAVIS's Qformer.bert.
        ({"use_qformer_text_input": True}, 30523, 185_660_160),
        ({}, None, 107_133_696 - 32 * 768 - 769 * 2560 - 2 * 1408),
        ({"use_qformer_text_input": True, "vocab_size": 30523}, None, 185_660_160),
    ],
)
def test_published_sizes(arguments: dict[str, Any], vocabulary: int | None, parameters: int):
    """A published checkpoint would not fit the default sizes."""
    with torch.device("meta"):
        parts: list[nn.Module] = [QFormer(**arguments)]
        if vocabulary:
            parts.append(TextEmbeddings(vocabulary, 768))
    assert sum(p.numel() for part in parts for p in part.parameters()) == parameters


def test_initialisation():
    """Training from BERT's initialisation would start elsewhere."""
    torch.manual_seed(0)
    model = QFormer(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=90,
                    use_qformer_text_input=True, encoder_hidden_size=32)  # fmt: skip
    for name, value in model.named_parameters():
        if "norm" in name.lower() or name.endswith("bias"):
            assert torch.equal(value, torch.full_like(value, float("Norm.weight" in name or
                               "norm.weight" in name))), name  # fmt: skip
        else:
            assert value.std().item() == pytest.approx(0.02, rel=0.1), name
    assert not model.embeddings.word_embeddings.weight[0].any()
    model.copy_text_to_queries()
    layer = model.encoder.layer[1]
    assert torch.equal(layer.intermediate_query.dense.weight, layer.intermediate.dense.weight)
    assert torch.equal(layer.output_query.dense.weight, layer.output.dense.weight)


def test_images_are_projected_once():
    """Many texts to one image would project it again for each, or read another image."""
    model, image, queries = small(), draw(2, TOKENS, WIDTH), draw(1, QUERIES, HIDDEN, seed=4)
    image.requires_grad_()
    text = small_embeddings()(draw_ids(4, 3)).detach()
    rows = torch.tensor([1, 0, 1, 1])
    shared = model(queries, text, image=model.image_keys_values(image), kv_row=rows)
    plain = model(queries, text, image=image[rows])
    torch.testing.assert_close(shared, plain, rtol=0, atol=1e-6)
    weights = draw(*plain.shape, seed=9)
    (actual,) = torch.autograd.grad((shared * weights).sum(), image)
    (expected,) = torch.autograd.grad((plain * weights).sum(), image)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    lone = model(queries, text, image=image[:1])
    torch.testing.assert_close(lone, model(queries, text, image=image[:1].expand(4, -1, -1)))


def test_fused_pass_is_three_passes():
    """[Q|T|T'] would mix contrast and generation: pads, another position, or a leak."""
    model, embed = small(), small_embeddings()
    image, queries = draw(3, TOKENS, WIDTH), draw(1, QUERIES, HIDDEN, seed=4)
    first, second = embed(draw_ids(3, 6)), embed(draw_ids(3, 6, seed=5))
    mask = RowIntervals.stage1(QUERIES, 6, LENGTHS)
    fused = model(queries, torch.cat([first, second], 1), mask, image)
    q, t, g = fused.split([QUERIES, 6, 6], 1)
    torch.testing.assert_close(q, model(queries, image=image), rtol=0, atol=1e-5)
    alone = model(None, first, RowIntervals.bidirectional(0, 6, LENGTHS))
    causal = model(queries, second, RowIntervals.multimodal_causal(QUERIES, 6, LENGTHS), image)
    for sample, length in enumerate(LENGTHS.tolist()):
        for got, expected in ((t, alone), (g, causal[:, QUERIES:])):
            a, b = got[sample, :length], expected[sample, :length]
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wanted", [0, 2, [0, 3, 5]])
def test_unwanted_rows_are_not_computed(wanted: Any):
    """Asking for fewer rows would change the others, or their gradients, or leave parameters
    without one (which DistributedDataParallel refuses)."""
    rows = torch.tensor(wanted) if isinstance(wanted, list) else wanted
    keep = [*range(QUERIES)]
    keep += [QUERIES + r for r in (wanted if isinstance(wanted, list) else range(wanted))]
    mask = RowIntervals.bidirectional(QUERIES, 6, LENGTHS)
    found, outputs = [], []
    for text_rows in (None, rows):
        model, text = small(), small_embeddings()(draw_ids(3, 6)).detach()
        out = model(draw(1, QUERIES, HIDDEN), text, mask, draw(3, TOKENS, WIDTH),
                    text_rows=text_rows)  # fmt: skip
        out = out[:, keep] if text_rows is None else out
        (out * draw(*out.shape, seed=9)).sum().backward()
        outputs.append(out)
        found.append(gradients(model))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-6)
    assert all(value is not None for value in found[1].values())
    assert_same_gradients(found[1], found[0])


def test_no_text_is_the_query_pass():
    """A sample without text would not be matched as its image alone."""
    model, text = small(), small_embeddings()(draw_ids(3, 6))
    image, queries = draw(3, TOKENS, WIDTH), draw(1, QUERIES, HIDDEN, seed=4)
    mask = RowIntervals.bidirectional(QUERIES, 6, torch.zeros(3, dtype=torch.int64))
    out = model(queries, text, mask, image)[:, :QUERIES]
    torch.testing.assert_close(out, model(queries, image=image), rtol=0, atol=1e-5)


def test_masks_do_not_leak():
    """The answer would be visible: contrast would read the other side, generation the future."""
    model, image, queries = small(), draw(2, TOKENS, WIDTH), draw(1, QUERIES, HIDDEN, seed=4)
    text = small_embeddings()(draw_ids(2, 6)).detach()
    unimodal = RowIntervals.unimodal(QUERIES, 6)
    out = model(queries, text, unimodal, image)
    far = model(queries, text + 1e4, unimodal, image)
    assert torch.equal(out[:, :QUERIES], far[:, :QUERIES])
    far = model(queries * 1e4, text, unimodal, image)
    assert torch.equal(out[:, QUERIES:], far[:, QUERIES:])
    causal = RowIntervals.multimodal_causal(QUERIES, 6)
    changed = text.clone()
    changed[:, 3] += 1
    out, far = model(queries, text, causal, image), model(queries, changed, causal, image)
    assert torch.equal(out[:, : QUERIES + 3], far[:, : QUERIES + 3])
    assert not torch.equal(out[:, QUERIES + 3], far[:, QUERIES + 3])


def test_dropout_and_checkpointing():
    """Training would be without dropout, evaluation with it, or recomputing would draw anew."""
    image, queries = draw(2, TOKENS, WIDTH), draw(1, QUERIES, HIDDEN, seed=4)
    model = small()
    plain = model(queries, image=image)
    assert torch.equal(plain, model(queries, image=image))
    model.train()
    found = []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(5)
        out = model(queries, image=image)
        out.square().sum().backward()
        found.append((out.detach(), model.encoder.layer[0].attention.output.dense.weight.grad))
    assert not torch.allclose(found[0][0], plain)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "give query_embeds, text or both"),
        ({"query_embeds": draw(1, 5, HIDDEN)}, ValueError, "need image"),
        ({"query_embeds": draw(1, 5, 8), "image": draw(2, 7, WIDTH)}, ValueError, r"Q, 32\]"),
        ({"query_embeds": draw(1, 5, HIDDEN), "image": draw(2, 7, 8)}, ValueError, r"tokens, 24\]"),
        ({"text": draw(2, 3, 8)}, ValueError, r"B, T, 32\], got \[2, 3, 8\]"),
        ({"text": draw_ids(2, 3)}, TypeError, "token ids need a vocab_size"),
        (
            {"text": draw(2, 3, HIDDEN), "mask": RowIntervals.bidirectional(0, 4)},
            ValueError,
            "mask must cover 3 rows and 3 keys for 1 or 2 samples, got 4 rows",
        ),
        (
            {
                "text": draw(3, 3, HIDDEN),
                "query_embeds": draw(1, 5, HIDDEN),
                "image": draw(2, 7, WIDTH),
            },
            ValueError,
            "2 images for 3 samples; give kv_row",
        ),
        (
            {
                "text": draw(3, 3, HIDDEN),
                "query_embeds": draw(1, 5, HIDDEN),
                "image": draw(2, 7, WIDTH),
                "kv_row": torch.tensor([0, 1]),
            },
            ValueError,
            r"kv_row must be \[3\]",
        ),
        (
            {
                "query_embeds": draw(1, 5, HIDDEN),
                "image": draw(2, 7, WIDTH),
                "image_mask": RowIntervals.full(5, 6),
            },
            ValueError,
            "image_mask must cover 5 rows and 7 keys",
        ),
        (
            {"query_embeds": draw(2, 5, HIDDEN), "text": draw(3, 3, HIDDEN), "image": 1},
            ValueError,
            "query_embeds has 2 samples, expected 1 or 3",
        ),
        (
            {
                "query_embeds": draw(1, 5, HIDDEN),
                "image": [(draw(2, 4, 7, 8), draw(2, 4, 7, 8))],
            },
            ValueError,
            "keys and values of 2 layers, got 1",
        ),
    ],
)
def test_bad_inputs_raise(arguments: dict[str, Any], error: type[Exception], message: str):
    """A mistake in the data would show as an index error deep inside, or not at all."""
    with pytest.raises(error, match=message):
        small()(**arguments)


def test_bad_text_raises():
    """Text longer than the positions, or foreign ids, would fail inside a table."""
    embed = small_embeddings()
    with pytest.raises(ValueError, match="at most 64 columns"):
        embed(draw_ids(1, 65))
    with pytest.raises(ValueError, match=r"\[0, 61\), got 1 to 61"):
        embed(torch.tensor([[1, 61]]))
    with pytest.raises(ValueError, match="integers"):
        embed(draw(1, 3))
    with pytest.raises(ValueError, match="needs a text branch"):
        small(use_qformer_text_input=False)(text=draw(1, 3, HIDDEN))
    with pytest.raises(ValueError, match="no text branch"):
        small(use_qformer_text_input=False).copy_text_to_queries()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_attention_heads": 5}, "must divide hidden_size 32"),
        ({"hidden_act": "swish"}, "one of gelu, gelu_new, relu"),
        ({"cross_attention_frequency": 0}, "at least 1"),
        ({"vocab_size": 9, "use_qformer_text_input": False}, "needs use_qformer_text_input"),
    ],
)
def test_bad_sizes_raise(sizes: dict[str, Any], message: str):
    """A configuration that makes no model would fail somewhere inside a layer."""
    with pytest.raises(ValueError, match=message):
        small(**sizes)
