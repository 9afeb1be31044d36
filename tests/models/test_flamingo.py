"""Flamingo against its formulas written anew; what must not change, and bad input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mmkern.models.flamingo import Flamingo
from tests.models import plain_flamingo as plain
from tests.models.small_flamingo import END, IMAGE, PAD, batch, config, sizes, small

VARIANTS: list[dict[str, Any]] = [
    {},
    {"cross_attn_every_n_layers": 1, "only_attend_immediate_media": False},
    {"apply_ln_post": True, "text": {"tie_word_embeddings": False}},
]


def one_by_one(model: Flamingo, state: dict[str, Tensor], inputs: dict[str, Tensor]) -> Any:
    """Logits of each sample by the formulas, and the sums of their losses."""
    found, losses = [], []
    for row in range(len(inputs["input_ids"])):
        kept = inputs["attention_mask"][row].bool()
        index = inputs["image_index"][row]
        pictures = inputs["pixel_values"][index[index >= 0]]
        scores = plain.logits(state, sizes(model), pictures, inputs["input_ids"][row][kept])
        found.append(scores)
        losses.append(plain.loss(scores, inputs["labels"][row][kept]))
    return found, torch.stack(losses)


def double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**inputs, "pixel_values": inputs["pixel_values"].double()}


def without_text_only(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the sample of plain text, whose feed-forward networks the plain form leaves out."""
    rows = torch.tensor([0, 1, 3])
    return {k: v if k == "pixel_values" else v[rows] for k, v in inputs.items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("left", [False, True])
def test_equals_the_formulas(variant: dict[str, Any], left: bool) -> None:
    """Logits, loss or a trained gradient would be another model's, in a mixed and padded batch."""
    model = small(**variant).double()
    inputs = without_text_only(double(batch(left)))
    state = {n: p.detach().clone().requires_grad_() for n, p in model.state_dict().items()}
    if model.tied:
        state["language_model.lm_head.weight"] = state["language_model.model.embed_tokens.weight"]
    expected, losses = one_by_one(model, state, inputs)
    total = losses.sum() / (inputs["labels"][:, 1:] != -100).sum()
    with torch.no_grad():
        found = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    for row, scores in enumerate(expected):
        kept = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(found[row][kept], scores, rtol=1e-6, atol=1e-6)
    for logits in (None, True):
        model.zero_grad()
        out = model(**inputs, return_logits=logits)
        torch.testing.assert_close(out.loss, total, rtol=1e-6, atol=1e-7)
        out.loss.backward()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert not any(n.startswith(("vision_model", "language_model")) for n in trained)
        grads = torch.autograd.grad(total, [state[n] for n in trained], retain_graph=True)
        for (name, parameter), right in zip(trained.items(), grads, strict=True):
            torch.testing.assert_close(parameter.grad, right, rtol=1e-4, atol=1e-6, msg=name)


def test_weights_of_samples() -> None:
    """Sources of a mixture would not count as the recipe says."""
    model = small().double()
    inputs = without_text_only(double(batch()))
    weights = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    state = dict(model.state_dict())
    losses = one_by_one(model, state, inputs)[1]
    for logits in (None, True):
        loss = model(**inputs, loss_weights=weights, return_logits=logits).loss
        torch.testing.assert_close(loss, (losses * weights).sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_closed_gates_are_the_language_model(tied: bool) -> None:
    """The start of training would not be the language model; or text alone would be changed."""
    torch.manual_seed(0)
    text = config({"tie_word_embeddings": tied}).text_config
    alone = AutoModelForCausalLM.from_config(text).eval()
    model = Flamingo(config({"tie_word_embeddings": tied}), copy.deepcopy(alone)).eval()
    inputs = batch()
    labels = inputs.pop("labels")
    with torch.no_grad():
        out = model(**inputs)
        place = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        plain_text = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        expected = alone(**plain_text, position_ids=place).logits
        assert torch.equal(out.logits, expected)
        # Outside a forward the language model is itself, and reads no media.
        assert torch.equal(model.language_model(**plain_text, position_ids=place).logits, expected)
    loss = model(**inputs, labels=labels).loss
    shifted = labels[:, 1:].flatten()
    right = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), shifted)
    torch.testing.assert_close(loss, right)


def test_a_batch_of_plain_text() -> None:
    """Without pictures training would crash, or DDP wait for gradients that never come."""
    model = small()
    model.train()
    with torch.no_grad():
        for block in model.gated_cross_attn_layers:
            block.ff_gate.zero_()
    ids = torch.tensor([[1, 5, 6, 7]])
    loss = model(input_ids=ids, labels=ids).loss
    expected = model.language_model(ids, labels=ids).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            if name.startswith("perceiver"):
                assert not parameter.grad.any(), name


@pytest.mark.parametrize("all_previous", [False, True])
def test_pictures_change_nothing_before_them(all_previous: bool) -> None:
    """Text would depend on pictures that come later, or on those of other samples."""
    model = small(only_attend_immediate_media=not all_previous)
    inputs = batch()
    inputs.pop("labels")
    with torch.no_grad():
        before = model(**inputs).logits
        for picture in range(5):
            other = inputs["pixel_values"].clone()
            other[picture] += 0.5
            changed = (model(**{**inputs, "pixel_values": other}).logits != before).any(-1)
            for row in range(4):
                shown = (inputs["image_index"][row] == picture).nonzero().flatten()
                places = (inputs["input_ids"][row] == IMAGE).nonzero().flatten()
                kept = inputs["attention_mask"][row].bool()
                first = int(places[shown[0]]) if len(shown) else before.shape[1]
                assert not changed[row, :first].any()
                assert bool(changed[row, first:][kept[first:]].all())


def test_only_two_rows_of_the_table_are_trained() -> None:
    """Training would move the words of the language model."""
    model = small()
    model.train()
    inputs = batch()
    table = model.get_input_embeddings().weight
    before = table.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1)
    rows = model.special_embeddings.detach().clone()
    model(**inputs).loss.backward()
    assert table.grad is None
    optimizer.step()
    assert torch.equal(table, before)
    assert (model.special_embeddings != rows).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_index": torch.tensor([[0, 1, -1], [2, -1, -1], [-1, -1, -1], [3, 1, -1]])},
         r"sample 3 has 3 image tokens .* and 2 pictures"),
        ({"image_index": torch.tensor([[0, 1, -1], [2, 3, -1], [-1, -1, -1], [3, 1, 4]])},
         r"sample 1 has 1 image tokens .* and 2 pictures"),
        ({"image_index": torch.tensor([[0, 5, -1], [2, -1, -1], [-1, -1, -1], [3, 1, 4]])},
         r"image_index of sample 0 must name pictures 0 to 4"),
        ({"image_index": torch.tensor([[0, -1, 1], [2, -1, -1], [-1, -1, -1], [3, 1, 4]])},
         r"image_index of sample 0 must name pictures 0 to 4, then -1"),
        ({"image_index": None}, "5 pictures for 4 samples"),
        ({"pixel_values": None, "image_index": None}, "sample 0 has 2 image tokens"),
        ({"pixel_values": torch.zeros(5, 3, 14, 14)}, r"\[pictures, 3, 28, 28\], got \[5, 3, 14"),
        ({"attention_mask": torch.ones(4, 3)}, "attention_mask must be"),
        ({"loss_weights": torch.ones(3)}, r"loss_weights must be \[4\]"),
        ({"input_ids": torch.zeros(4, 12)}, "must be integers"),
    ],
)  # fmt: skip
def test_bad_input(change: dict[str, Any], message: str) -> None:
    """Wrong counts would show other pictures to a sample, or all of them, without a word."""
    model = small()
    with pytest.raises(ValueError, match=message):
        model(**{**batch(), **change})
    prompt = {k: v for k, v in {**batch(), **change}.items() if k not in ("labels", "loss_weights")}
    if "attention_mask" not in change and "loss_weights" not in change:
        with pytest.raises(ValueError, match=message):
            model.generate(**prompt, max_new_tokens=1)


def test_an_extra_image_token_raises() -> None:
    """Text behind it would read pictures of other segments."""
    inputs = batch()
    inputs["input_ids"][1, 1] = IMAGE
    with pytest.raises(ValueError, match="sample 1 has 2 image tokens"):
        small()(**inputs)
    inputs = batch()
    inputs["labels"][0, 2] = IMAGE
    with pytest.raises(ValueError, match="sample 0 has a label at an image token"):
        small()(**inputs)


def test_nothing_labelled() -> None:
    """A micro-batch without labels would put NaN into the optimizer's state."""
    model = small()
    inputs = batch()
    inputs["labels"].fill_(-100)
    for weights in (None, torch.ones(4)):
        model.zero_grad()
        loss = model(**inputs, loss_weights=weights).loss
        loss.backward()
        assert loss == 0
        assert all(not p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "options", [{"image_token_id": 50}, {"image_token_id": END}, {"end_of_chunk_token_id": 0}]
)
def test_bad_special_tokens(options: dict[str, int]) -> None:
    """A vocabulary without room would fail on a device, far from its cause."""
    with pytest.raises(ValueError, match="must be two ids from 1 to 49"):
        Flamingo(config(**options))


def test_blocks_need_layers_of_their_own() -> None:
    """Two Flamingos on one language model would each run the other's blocks."""
    model = small()
    with pytest.raises(ValueError, match="have blocks already"):
        Flamingo(config(), model.language_model)
    with pytest.raises(ValueError, match="every must be 1 to the 4 layers, got 5"):
        small(cross_attn_every_n_layers=5)


def test_pad_is_no_special_case() -> None:
    """The reference batch would not hold an id behind the special ones."""
    assert (batch()["input_ids"] == PAD).any()
