"""mmkern.layout: every mask against the formula it stands for, and spans against their mask."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from mmkern.layout import RowIntervals, VisualSpans, visual_spans

Q, T = 3, 6
LENGTHS = torch.tensor([4, 6, 0, 1])
PADS = torch.tensor([2, 0, 3, 5])


def filled(slots: int, lengths: Tensor | None, pads: Tensor | None) -> Tensor:
    """bool [B, slots]: which slots hold tokens."""
    slot = torch.arange(slots)
    first = torch.zeros(1) if pads is None else pads
    last = first + (slots if lengths is None else lengths)
    return (slot >= first[:, None]) & (slot < last[:, None])


def expected(name: str, lengths: Tensor | None, pads: Tensor | None) -> Tensor:
    """The masks of docs/masks.md written as formulas over (i, j)."""
    text = filled(T, lengths, pads)
    batch = text.shape[0]
    size = {"stage1": Q + 2 * T, "full": T}.get(name, Q + T)
    rows = Q if name == "full" else size
    i, j = torch.arange(rows)[:, None], torch.arange(size)
    if name == "full":
        return text[:, None].expand(batch, rows, T)
    copies = [text] * (2 if name == "stage1" else 1)
    valid = torch.cat([torch.ones(batch, Q, dtype=torch.bool), *copies], 1)[:, None]
    if name == "unimodal":
        allowed = (i < Q) == (j < Q)
    elif name == "bidirectional":
        allowed = torch.ones(rows, size, dtype=torch.bool)
    elif name == "multimodal_causal":
        allowed = (j < Q) | ((i >= Q) & (j <= i))
    elif name == "stage1":
        contrast = (i < Q + T) & (j < Q + T) & ((i < Q) == (j < Q))
        generation = (i >= Q + T) & ((j < Q) | ((j >= Q + T) & (j <= i)))
        allowed = contrast | generation
    elif name == "causal":
        allowed = j <= i
    else:
        allowed = (j <= i) | (j < Q)
    return valid & allowed


def build(name: str, lengths: Tensor | None, pads: Tensor | None) -> RowIntervals:
    if name == "causal":
        return RowIntervals.causal(T, lengths, pads, prefix=Q)
    return getattr(RowIntervals, name)(Q, T, lengths, pads)


NAMES = [
    "unimodal", "bidirectional", "multimodal_causal", "stage1", "full", "causal", "prefix_lm",
]  # fmt: skip


@pytest.mark.parametrize("pads", [None, PADS], ids=["", "pads"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["", "lengths"])
@pytest.mark.parametrize("name", NAMES)
def test_constructors(name: str, lengths: Tensor | None, pads: Tensor | None):
    """A wrong mask trains without complaint, and the model is worse for it."""
    mask = build(name, lengths, pads)
    true = expected(name, lengths, pads)
    assert torch.equal(mask.to_dense(), true)
    a0, a1, b0, b1 = mask.intervals.unbind(2)
    assert (a0 <= a1).all() and (a1 <= b0).all() and (b0 <= b1).all()
    assert mask.batch == (1 if lengths is None and pads is None else 4)
    assert (mask.queries, mask.keys) == tuple(true.shape[1:])


def test_causal_without_prefix():
    """A plain language model's mask must not depend on the image's options."""
    true = torch.ones(T, T, dtype=torch.bool).tril()[None]
    assert torch.equal(RowIntervals.causal(T).to_dense(), true)
    assert torch.equal(RowIntervals.prefix_lm(0, T).to_dense(), true)


@pytest.mark.parametrize("all_previous", [False, True])
def test_media(all_previous: bool):
    """Flamingo's text would look at another sample's image, or at images to come."""
    image = torch.tensor([[0, 1, 1, 2, 3], [0, 0, 1, 1, 1]])
    mask = RowIntervals.media(image, 4, 3, all_previous=all_previous)
    of_key = torch.arange(12) // 4 + 1
    own = image[..., None]
    true = (of_key <= own) if all_previous else (of_key == own)
    assert torch.equal(mask.to_dense(), true)
    assert mask.keys == 12


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("with_prefix", [True, False])
def test_packed(causal: bool, with_prefix: bool):
    """Packed documents that see each other leak one sample into another."""
    documents = torch.tensor([[4, 4, 4, 7, 7, -1], [0, 1, 1, 1, 1, 1]])
    prefix = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]).bool()
    mask = RowIntervals.packed(documents, causal=causal, prefix=prefix if with_prefix else None)
    i, j = torch.arange(6)[:, None], torch.arange(6)
    same = (documents[:, :, None] == documents[:, None]) & (documents >= 0)[:, None]
    allowed = (j <= i) | (not causal)
    if with_prefix:
        allowed = allowed | (prefix[:, :, None] & prefix[:, None])
    assert torch.equal(mask.to_dense(), same & allowed)


@pytest.mark.parametrize("name", NAMES)
def test_from_dense_round_trip(name: str):
    """Who has a dense mask would get another one back."""
    dense = expected(name, LENGTHS, PADS)
    mask = RowIntervals.from_dense(dense)
    assert torch.equal(mask.to_dense(), dense)
    a0, a1, b0, b1 = mask.intervals.unbind(2)
    assert (a0 <= a1).all() and (a1 <= b0).all() and (b0 <= b1).all()


def test_from_dense_shapes():
    """Masks come as transformers and SDPA have them: with or without batch and a head of one."""
    dense = torch.ones(3, 5, dtype=torch.bool).tril()
    for form in (dense, dense[None], dense[None, None]):
        assert torch.equal(RowIntervals.from_dense(form).to_dense(), dense[None])
    assert RowIntervals.from_dense(torch.zeros(2, 0, 4, dtype=torch.bool)).queries == 0


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.tensor([[1, 0, 1, 0, 1]]).bool(), ValueError, "row 0 of sample 0 allows keys in 3"),
        (torch.zeros(3, 3), TypeError, "mask must be bool"),
        (torch.ones(2, 2, 3, 3, dtype=torch.bool), ValueError, r"got \(2, 2, 3, 3\)"),
        (torch.ones(3, dtype=torch.bool), ValueError, r"got \(3,\)"),
    ],
)
def test_from_dense_refuses(mask: Tensor, error: type[Exception], message: str):
    """A mask that does not fit must not be bent into one that does."""
    with pytest.raises(error, match=message):
        RowIntervals.from_dense(mask)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RowIntervals(torch.zeros(1, 2, 3, dtype=torch.int32), 4), r"\[1 or B, Lq, 4\]"),
        (lambda: RowIntervals(torch.zeros(1, 2, 4), 4), "must be int32"),
        (lambda: RowIntervals(torch.zeros(1, 2, 4, dtype=torch.int32), -1), "not be negative"),
        (lambda: RowIntervals.full(2, 3, torch.ones(2)), "lengths must be an integer tensor"),
        (lambda: RowIntervals.full(2, 3, LENGTHS, LENGTHS[:2]), "of one size, got 4 and 2"),
        (lambda: RowIntervals.media(torch.ones(3).int(), 2, 1), r"integer tensor \[B, T\]"),
        (lambda: RowIntervals.packed(torch.ones(2, 3)), r"integer tensor \[B, L\]"),
        (lambda: RowIntervals.packed(LENGTHS[None], prefix=LENGTHS[None]), "prefix must be bool"),
    ],
)
def test_bad_arguments(build, message: str):  # type: ignore[no-untyped-def]
    """A wrong shape or dtype is named where it is given, not in a kernel later."""
    with pytest.raises((TypeError, ValueError), match=message):
        build()


def test_lengths_beyond_the_slots():
    """Lengths and pads that exceed the slots would name keys that are not there."""
    mask = RowIntervals.full(1, 5, torch.tensor([9, 3]), torch.tensor([3, 8]))
    assert mask.to_dense()[:, 0].tolist() == [[False] * 3 + [True] * 2, [False] * 5]


def test_plot():
    """People ask again and again whether a mask is right: they must be able to look at it."""
    mask = RowIntervals.multimodal_causal(2, 3, torch.tensor([3, 2]))
    text = mask.plot(sample=1, rows=(("image", 2), ("text", 3)), keys=(("im", 2), ("text", 3)))
    assert text.splitlines() == [
        "       im text",
        "image  ■■│···",
        "       ■■│···",
        "       ──┼───",
        "text   ■■│■··",
        "       ■■│■■·",
        "       ■■│■■·",
    ]
    # Wider than a terminal: cells of 2 x 2, of which the diagonal's are allowed in part.
    wide = RowIntervals.causal(100).plot().splitlines()
    assert len(wide) == 50 and wide[1].startswith("■▒·")


def test_plot_png(tmp_path):  # type: ignore[no-untyped-def]
    """The PNG must be a picture, whatever the parts are called."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "mask.png"
    RowIntervals.causal(4).plot(path, rows=(("text", 4),), keys=(("text", 4),))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_frozen():
    """A mask shared by layers must not change under one of them."""
    mask = RowIntervals.causal(3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask.keys = 4  # type: ignore[misc]
    assert mask.to("cpu").keys == 3


VISUAL = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0], [1, 0, 1, 0, 1]]).bool()
RUNS = ((1, 3), (4, 7), (10, 11), (12, 13), (14, 15))


def test_visual_spans_from_mask():
    """A run that is cut or joined wrongly gives an image's adapter to text."""
    spans = VisualSpans.from_mask(VISUAL)
    assert spans.shape == (3, 5) and spans.runs == RUNS  # one crosses from a sample to the next
    assert spans.rows.tolist() == VISUAL.view(-1).nonzero().view(-1).tolist()
    assert torch.equal(spans.to_mask(), VISUAL)
    flat = VisualSpans.from_mask(VISUAL.view(-1))
    assert flat.shape == (15,) and torch.equal(flat.rows, spans.rows)
    strided = VisualSpans.from_mask(VISUAL.T.contiguous().T)
    assert strided.runs == RUNS


def test_visual_spans_from_lengths():
    """A collator that knows its images must get the spans of the mask it never made."""
    spans = VisualSpans.from_lengths([a for a, _ in RUNS], [b - a for a, b in RUNS], (3, 5))
    assert spans.runs == RUNS and torch.equal(spans.to_mask(), VISUAL)
    touching = VisualSpans.from_lengths([0, 2], [2, 3], (5,))  # two images side by side
    assert touching.rows.tolist() == [0, 1, 2, 3, 4]


def test_visual_spans_of_text():
    """A batch of text has no visual row, whatever its size; an empty batch neither."""
    for spans in (
        VisualSpans.all_text((2, 3)),
        VisualSpans.from_mask(torch.zeros(2, 3, dtype=torch.bool)),
        VisualSpans.from_lengths([], [], (2, 3)),
    ):
        assert spans.runs == () and spans.rows.shape == (0,) and spans.rows.dtype == torch.int32
        assert torch.equal(spans.to_mask(), torch.zeros(2, 3, dtype=torch.bool))
    assert VisualSpans.from_mask(torch.zeros(0, 3, dtype=torch.bool)).to_mask().shape == (0, 3)


@pytest.mark.parametrize("mask", [VISUAL, ~VISUAL, VISUAL & False, VISUAL | True])
def test_visual_spans_without_counting(mask: Tensor):
    """On a GPU the list is padded, since its length would have to be waited for."""
    rows = visual_spans._compact(mask.reshape(-1))
    known = VisualSpans.from_mask(mask)
    count = known.rows.shape[0]
    assert torch.equal(rows[:count], known.rows) and (rows[count:] == -1).all()
    assert torch.equal(VisualSpans(known.shape, rows, None).to_mask(), mask)


def test_visual_spans_move():
    """Trainers move batches by `.to`: the spans must come along whole."""
    spans = VisualSpans.from_mask(VISUAL).to("cpu", non_blocking=True)
    assert spans.runs == RUNS and torch.equal(spans.to_mask(), VISUAL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spans.shape = (15,)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VisualSpans.from_lengths([3, 1], [1, 1], (9,)), r"starts\[1\] is 1 after 3"),
        (lambda: VisualSpans.from_lengths([0, 2], [3, 1], (9,)), "but the run before it ends at 3"),
        (lambda: VisualSpans.from_lengths([0, 5], [3, 5], (3, 3)), r"run 1 is rows 5 to 10.* 9$"),
        (lambda: VisualSpans.from_lengths([-1], [3], (9,)), r"starts\[0\] is -1, but rows count"),
        (lambda: VisualSpans.from_lengths([1], [0], (9,)), r"lengths\[0\] must be at least 1"),
        (lambda: VisualSpans.from_lengths([1], [1, 2], (9,)), "of one size, got 1 and 2"),
        (lambda: VisualSpans.from_lengths([], [], (2**20, 2**12)), r"at most 2\^31 - 1 rows"),
        (lambda: VisualSpans.from_mask(VISUAL.int()), "mask must be bool .* got torch.int32"),
        (lambda: VisualSpans.from_mask([True]), "mask must be bool .* got list"),
        (lambda: VisualSpans.from_mask(torch.tensor(True)), r"\[B, L\] or \[M\], got shape \(\)"),
        (lambda: VisualSpans((3,), torch.zeros(1), ()), "rows must be int32"),
        (lambda: VisualSpans((3,), torch.zeros(1, 1).int(), ()), r"rows must be \[n\]"),
    ],
)  # fmt: skip
def test_visual_spans_refuse(build, message: str):  # type: ignore[no-untyped-def]
    """Spans that overlap, are unsorted or leave the batch are named before any layer runs."""
    with pytest.raises((TypeError, ValueError), match=message):
        build()
