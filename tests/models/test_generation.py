"""BLIP-2's second stage and InstructBLIP against transformers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("transformers")

from tests.models.small_generation import (
    IMAGE,
    KINDS,
    QUERIES,
    VOCABULARY,
    batch,
    pair,
    prompt,
    small,
)

SYSTEMS = [(kind, instruct) for instruct in (False, True) for kind in KINDS]


@pytest.mark.parametrize(
    ("attention", "dtype", "close"),
    [
        ("eager", torch.float32, 1e-5),
        ("sdpa", torch.float32, 1e-5),
        ("sdpa", torch.float64, 1e-10),
    ],
)
@pytest.mark.parametrize(("kind", "instruct"), SYSTEMS)
def test_is_transformers(
    kind: str, instruct: bool, attention: str, dtype: torch.dtype, close: float
) -> None:
    """A user moving from transformers would get another loss, other logits or other gradients."""
    ours, theirs = (model.to(dtype) for model in pair(kind, instruct, attention))
    inputs = batch(kind, instruct)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    expected = theirs(**inputs)
    actual = ours(**inputs)
    full = ours(**inputs, return_logits=True)
    assert actual.logits is None
    expected_loss = expected.loss
    if dtype == torch.float64 and kind != "t5":
        # transformers computes it in fp32 whatever the logits.
        shifted = inputs["labels"][:, 1:].flatten()
        expected_loss = F.cross_entropy(expected.logits[:, :-1].flatten(0, 1), shifted)
        torch.testing.assert_close(expected.loss.to(dtype), expected_loss, rtol=0, atol=1e-5)
    for loss in (actual.loss, full.loss):
        torch.testing.assert_close(loss, expected_loss, rtol=0, atol=close)
    real = slice(None) if kind == "t5" else inputs["attention_mask"].bool()
    torch.testing.assert_close(full.logits[real], expected.logits[real], rtol=0, atol=5 * close)
    expected_loss.backward()
    actual.loss.backward()
    reference = {name: value.grad for name, value in theirs.named_parameters()}
    trained = {name: value.grad for name, value in ours.named_parameters() if value.requires_grad}
    # The gradient of a key's bias is 0 but for rounding: measure it by the largest of all.
    largest = max(float(reference[name].abs().max()) for name in trained)
    for name, value in trained.items():
        scale = max(float(reference[name].abs().max()), 1e-2 * largest)
        error = float((value - reference[name]).abs().max()) / scale
        assert error < close, (name, error)


GENERATE = [
    {"max_new_tokens": 6, "do_sample": False},
    {"max_new_tokens": 6, "min_new_tokens": 4, "num_beams": 3, "repetition_penalty": 1.5},
    {"max_new_tokens": 5, "num_beams": 4, "num_return_sequences": 2, "length_penalty": -1.0},
]


@pytest.mark.parametrize("options", GENERATE)
@pytest.mark.parametrize(("kind", "instruct"), SYSTEMS)
def test_generates_what_transformers_does(
    kind: str, instruct: bool, options: dict[str, Any]
) -> None:
    """Captions and answers would differ from those of the checkpoint's authors."""
    ours, theirs = pair(kind, instruct)
    # Pads between image and text, as transformers' processor writes questions.
    inputs = prompt(batch(kind, instruct, left=True))
    assert torch.equal(ours.generate(**inputs, **options), theirs.generate(**inputs, **options))
    del inputs["input_ids"], inputs["attention_mask"]
    assert torch.equal(ours.generate(**inputs, **options), theirs.generate(**inputs, **options))


# A T5's relative positions count pads: its tokenizer pads at the right.
@pytest.mark.parametrize(("kind", "instruct"), [s for s in SYSTEMS if s[0] != "t5"])
def test_pads_before_text_take_no_place(kind: str, instruct: bool) -> None:
    """A question's answer would depend on how long the batch's longest question is."""
    model = small(kind, instruct)
    inputs = batch(kind, instruct, left=True)
    together = model(**inputs, return_logits=True).logits
    for i in range(len(inputs["input_ids"])):
        kept = inputs["attention_mask"][i].bool()
        alone = {name: value[i : i + 1] for name, value in inputs.items()}
        alone |= {n: alone[n][:, kept] for n in ("input_ids", "attention_mask", "labels")}
        expected = model(**alone, return_logits=True).logits[0]
        torch.testing.assert_close(together[i][kept], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_placeholder_may_lie_outside_the_vocabulary(kind: str) -> None:
    """A language model without a spare id (SmolLM2) could take no image."""
    inside = small(kind)
    outside = small(kind, image_token_index=1000)
    assert small(kind, image_token_index=None).config.image_token_index == VOCABULARY
    inputs = batch(kind)
    moved = {
        **inputs,
        "input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, 1000),
    }
    assert torch.equal(inside(**inputs).loss, outside(**moved).loss)
    options: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 2}
    expected = inside.generate(**prompt(inputs), **options)
    actual = outside.generate(**prompt(moved), **options)
    new = 0 if kind == "t5" else inputs["input_ids"].shape[1]
    assert torch.equal(actual[:, new:], expected[:, new:])
    assert torch.equal(actual[:, :new], moved["input_ids"][:, :new])


@pytest.mark.parametrize("kind", KINDS)
def test_text_alone_is_the_language_model(kind: str) -> None:
    """Text mixed into the training data would be refused, or seen otherwise than without images."""
    model = small(kind)
    inputs = batch(kind)
    text = {n: inputs[n][:, QUERIES:] for n in ("input_ids", "attention_mask")}
    labels = inputs["labels"] if kind == "t5" else inputs["labels"][:, QUERIES:]
    expected = model.language_model(**text, labels=labels).loss
    torch.testing.assert_close(model(**text, labels=labels).loss, expected)


@pytest.mark.parametrize(("kind", "instruct"), SYSTEMS)
def test_no_label_is_no_loss(kind: str, instruct: bool) -> None:
    """A batch whose captions were all cut away would make every weight NaN."""
    model = small(kind, instruct)
    inputs = batch(kind, instruct)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    for wanted in (False, True):
        model.zero_grad()
        loss = model(**inputs, return_logits=wanted).loss
        loss.backward()
        assert loss.item() == 0.0
        assert all(not p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_parts_is_the_loss_of_the_whole(kind: str) -> None:
    """Accumulating gradients over batches with other numbers of tokens would change the step."""
    model = small(kind)
    inputs = batch(kind)
    whole = model(**inputs).loss
    shifted = inputs["labels"] if kind == "t5" else inputs["labels"][:, 1:]
    items = (shifted != -100).sum()
    rows = [{n: v[i : i + 1] for n, v in inputs.items()} for i in range(3)]
    for wanted in (False, True):
        for number in (items, int(items)):
            parts = [model(**r, num_items_in_batch=number, return_logits=wanted).loss for r in rows]
            torch.testing.assert_close(torch.stack(parts).sum(), whole)


def _without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda inputs: inputs.__delitem__(name)


def _image_token(row: int, column: int, value: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda inputs: inputs["input_ids"][row].__setitem__(column, value)


def _replaced(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda inputs: inputs.update({name: change(inputs[name])})


BAD: list[tuple[Callable[[dict[str, Tensor]], None], str]] = [
    (_image_token(1, 2, 3), r"sample 1 has 4 image tokens \(id 69\).*expected 5"),
    (_image_token(2, 8, IMAGE), r"sample 2 has 6 image tokens \(id 69\).*expected 5"),
    (_without("pixel_values"), "sample 0 has 5 image tokens.*expected 0"),
    (_replaced("input_ids", lambda x: x.masked_fill(x == IMAGE, 3)), "sample 0 has 0.*expected 5"),
    (_replaced("pixel_values", lambda x: x[:2]), "2 images for 3 samples"),
    (_image_token(0, 9, 5000), r"lie in \[0, 70\).*5000"),
    (_image_token(0, 9, -1), r"lie in \[0, 70\)"),
    (_without("input_ids"), "input_ids must be given"),
    (_replaced("input_ids", lambda x: x[0]), r"integers \[batch, length\]"),
    (_replaced("attention_mask", lambda x: x[:, 1:]), "attention_mask must be"),
    (_replaced("labels", lambda x: x[:2]), "labels must be"),
    (_replaced("labels", lambda x: x[:, 1:]), "labels must be"),
    (_replaced("labels", lambda x: x.clamp(min=3)), "sample 0 has labels at 5 image tokens"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD)
def test_bad_input_is_named(spoil: Callable[[dict[str, Tensor]], None], message: str) -> None:
    """A wrong batch would train on an image in another sample's place, without a word."""
    inputs = batch("llama")
    spoil(inputs)
    with pytest.raises(ValueError, match=message):
        small("llama")(**inputs)


def test_text_longer_than_positions_is_refused() -> None:
    """OPT would fail with an index error inside, Llama would run on without a word."""
    for kind in ("opt", "llama"):
        inputs = batch(kind, text=36)
        with pytest.raises(ValueError, match=r"at most 40 columns.*41"):
            small(kind)(**inputs)
        with pytest.raises(ValueError, match=r"at most 40 columns.*41"):
            small(kind).generate(**prompt(inputs))


def test_instruction_must_fit_the_image() -> None:
    """The Q-Former would read another sample's instruction, or pads as words."""
    model = small("t5", instruct=True)
    good = batch("t5", instruct=True)
    for change, message in [
        ({"qformer_input_ids": None}, "pixel_values need qformer_input_ids"),
        ({"pixel_values": None}, "qformer_input_ids need pixel_values"),
        ({"qformer_input_ids": good["qformer_input_ids"][:2]}, "a row for each of the 3 images"),
        ({"qformer_attention_mask": good["qformer_attention_mask"][:, 1:]}, "mask must be"),
        ({"qformer_attention_mask": torch.tensor([[1, 0, 1, 1, 0, 0]] * 3)}, "sample 0 has a gap"),
        (
            {
                "qformer_input_ids": torch.ones(3, 17, dtype=torch.long),
                "qformer_attention_mask": None,
            },
            "at most 16 columns",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            model(**{**good, **change})


@pytest.mark.parametrize("instruct", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind: str, instruct: bool) -> None:
    """The last, empty part of a data set would stop an evaluation."""
    model = small(kind, instruct)
    inputs = {name: value[:0] for name, value in batch(kind, instruct).items()}
    loss = model(**inputs).loss
    loss.backward()
    assert loss.item() == 0.0
    assert len(model.generate(**prompt(inputs))) == 0


def test_instruction_changes_what_is_seen() -> None:
    """InstructBLIP's image features would not depend on the question."""
    model = small("t5", True)
    inputs = prompt(batch("t5", True))
    labels = torch.ones(3, 2, dtype=torch.long)
    seen = model(**inputs, labels=labels).image_features
    inputs["qformer_input_ids"][:, 0] += 1
    assert not torch.allclose(seen, model(**inputs, labels=labels).image_features)
    # Pads at the left or the right, or none: the same.
    ids, mask = inputs["qformer_input_ids"][1:2, :2], None
    alone = model.image_features(inputs["pixel_values"][1:2], ids, mask)
    full = model.image_features(
        inputs["pixel_values"], inputs["qformer_input_ids"], inputs["qformer_attention_mask"]
    )
    torch.testing.assert_close(alone[0], full[1], rtol=1e-5, atol=1e-5)
