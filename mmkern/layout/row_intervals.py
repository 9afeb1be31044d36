"""Which keys each query row of an attention may see, as two intervals a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# A part of a sequence in a drawing: its name and its number of rows (or keys).
Parts = Sequence[tuple[str, int]]
WIDEST = 72  # characters of a drawing; a larger mask is drawn in square cells
_SIGNS = "·▒■"  # of a cell: no key allowed, some, all


@dataclass(frozen=True)
class RowIntervals:
    """An attention mask as two intervals of keys for every query row, shared by all heads.

    Row i of sample b holds (a0, a1, b0, b1), a1 <= b0, and may attend to key j iff a0 <= j < a1 or
    b0 <= j < b1. That is 16 bytes a row whatever the number of keys. A row without a key is fine:
    its attention is 0, without a gradient.

    Constructors describe text slots by `lengths` and `left_pads`: of T slots, those in
    [left_pads, left_pads + lengths) hold tokens, and nobody attends to the others. Both are integer
    tensors [B], or absent: no pads, all slots behind them filled. Rows of the others get the same
    keys as if they were tokens; ignore what they compute. Nothing here waits for the GPU, except
    ``from_dense`` and ``plot``.

    Attributes:
        intervals: int32 [1 or B, Lq, 4]; one entry serves a batch of any size.
        keys: Lk.
    """

    intervals: Tensor
    keys: int

    def __post_init__(self) -> None:
        shape = tuple(self.intervals.shape)
        if self.intervals.dtype != torch.int32:
            raise TypeError(f"RowIntervals: intervals must be int32, got {self.intervals.dtype}")
        if len(shape) != 3 or shape[2] != 4:
            raise ValueError(f"RowIntervals: intervals must be [1 or B, Lq, 4], got {shape}")
        if self.keys < 0:
            raise ValueError(f"RowIntervals: keys must not be negative, got {self.keys}")

    @property
    def batch(self) -> int:
        """1 (for any batch) or B."""
        return self.intervals.shape[0]

    @property
    def queries(self) -> int:
        """Lq, the number of query rows."""
        return self.intervals.shape[1]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RowIntervals:
        """The same mask on another device."""
        return RowIntervals(self.intervals.to(device, non_blocking=non_blocking), self.keys)

    # Masks of the Q-Former: rows and keys are [queries | text].

    @classmethod
    def unimodal(
        cls,
        queries: int,
        text: int,
        lengths: Tensor | None = None,
        left_pads: Tensor | None = None,
    ) -> RowIntervals:
        """Queries see queries, text sees text (BLIP-2's image-text contrast)."""
        first, last = _filled(text, lengths, left_pads)
        return cls._stack(
            queries + text,
            _rows(queries, 0, queries),
            _rows(text, queries + first, queries + last),
        )

    @classmethod
    def bidirectional(
        cls,
        queries: int,
        text: int,
        lengths: Tensor | None = None,
        left_pads: Tensor | None = None,
    ) -> RowIntervals:
        """Everything sees everything (BLIP-2's image-text matching, InstructBLIP)."""
        first, last = _filled(text, lengths, left_pads)
        return cls._stack(
            queries + text, _rows(queries + text, 0, queries, queries + first, queries + last)
        )

    @classmethod
    def multimodal_causal(
        cls,
        queries: int,
        text: int,
        lengths: Tensor | None = None,
        left_pads: Tensor | None = None,
    ) -> RowIntervals:
        """Queries see queries; a token sees queries and text up to itself (BLIP-2's generation)."""
        first, last = _filled(text, lengths, left_pads)
        return cls._stack(
            queries + text,
            _rows(queries, 0, queries),
            _causal_rows(text, 0, queries, queries, first, last),
        )

    @classmethod
    def stage1(
        cls,
        queries: int,
        text: int,
        lengths: Tensor | None = None,
        left_pads: Tensor | None = None,
    ) -> RowIntervals:
        """Contrast and generation in one pass: rows and keys are [queries | text | text again].

        The first copy of the text is unimodal, the second sees the queries and itself causally.
        """
        first, last = _filled(text, lengths, left_pads)
        return cls._stack(
            queries + 2 * text,
            _rows(queries, 0, queries),
            _rows(text, queries + first, queries + last),
            _causal_rows(text, 0, queries, queries + text, first, last),
        )

    # Masks of language models, resamplers and cross-attention.

    @classmethod
    def full(
        cls,
        queries: int,
        keys: int,
        lengths: Tensor | None = None,
        left_pads: Tensor | None = None,
    ) -> RowIntervals:
        """Cross-attention with key padding: all rows see all keys that are filled."""
        first, last = _filled(keys, lengths, left_pads)
        return cls._stack(keys, _rows(queries, first, last))

    @classmethod
    def causal(
        cls,
        length: int,
        lengths: Tensor | None = None,
        left_pads: Tensor | None = None,
        *,
        prefix: int = 0,
    ) -> RowIntervals:
        """A language model's: a token sees itself and what is before it.

        Rows and keys are [prefix | length slots of text]. With `prefix`, the tokens of an image,
        the pads between it and the text are a hole: text sees the image and the text before it.
        """
        first, last = _filled(length, lengths, left_pads)
        ends = torch.arange(1, prefix + 1, device=first.device)
        return cls._stack(
            prefix + length,
            _rows(prefix, 0, ends),
            _causal_rows(length, 0, prefix, prefix, first, last),
        )

    @classmethod
    def prefix_lm(
        cls,
        prefix: int,
        length: int,
        lengths: Tensor | None = None,
        left_pads: Tensor | None = None,
    ) -> RowIntervals:
        """As ``causal`` with a prefix, but the prefix sees all of itself."""
        first, last = _filled(length, lengths, left_pads)
        return cls._stack(
            prefix + length,
            _rows(prefix, 0, prefix),
            _causal_rows(length, 0, prefix, prefix, first, last),
        )

    @classmethod
    def media(
        cls, image_of_token: Tensor, latents: int, images: int, *, all_previous: bool = False
    ) -> RowIntervals:
        """Flamingo's cross-attention from text to images, each `latents` keys wide.

        Args:
            image_of_token: int [B, T], the image that a token belongs to, counted from 1: the
                cumulative sum of the places of image tokens. 0, before the first: sees nothing.
            latents: keys an image.
            images: most images of a sample; Lk = images x latents.
            all_previous: a token sees all images up to its own.
        """
        if image_of_token.dim() != 2 or image_of_token.is_floating_point():
            raise ValueError(
                "RowIntervals.media: image_of_token must be an integer tensor [B, T], got "
                f"{image_of_token.dtype} {tuple(image_of_token.shape)}"
            )
        last = image_of_token.clamp(0, images) * latents
        first = torch.zeros_like(last) if all_previous else (last - latents).clamp(min=0)
        return cls._stack(images * latents, _rows(last.shape[1], first, last))

    @classmethod
    def packed(
        cls, documents: Tensor, *, causal: bool = True, prefix: Tensor | None = None
    ) -> RowIntervals:
        """Several documents in one row, none of which sees another.

        Args:
            documents: int [B, L], equal for the tokens of a document, which lie side by side;
                negative for padding, which sees nothing and is not seen.
            causal: a token sees its document up to itself; else all of it.
            prefix: bool [B, L], the first tokens of a document that all of it may see (an image).
        """
        if documents.dim() != 2 or documents.is_floating_point():
            raise ValueError(
                "RowIntervals.packed: documents must be an integer tensor [B, L], got "
                f"{documents.dtype} {tuple(documents.shape)}"
            )
        if prefix is not None and (prefix.dtype != torch.bool or prefix.shape != documents.shape):
            raise ValueError(
                f"RowIntervals.packed: prefix must be bool {tuple(documents.shape)}, got "
                f"{prefix.dtype} {tuple(prefix.shape)}"
            )
        length = documents.shape[1]
        place = torch.arange(length, device=documents.device).expand_as(documents)
        edge = documents[:, 1:] != documents[:, :-1]
        begins = torch.nn.functional.pad(edge, (1, 0), value=True)
        first = torch.where(begins, place, 0).cummax(1).values
        ends = torch.nn.functional.pad(edge, (0, 1), value=True)
        last = _next(ends, place + 1, length)
        if causal:
            stop = place + 1
            if prefix is not None:
                stop = torch.where(prefix, torch.minimum(_next(~prefix, place, length), last), stop)
            last = stop
        keep = documents >= 0
        return cls._stack(length, _rows(length, first * keep, last * keep))

    # Dense masks and pictures.

    def to_dense(self) -> Tensor:
        """bool [1 or B, Lq, Lk], True where attention is allowed."""
        key = torch.arange(self.keys, device=self.intervals.device)
        a0, a1, b0, b1 = self.intervals[..., None].unbind(2)
        return ((a0 <= key) & (key < a1)) | ((b0 <= key) & (key < b1))

    @classmethod
    def from_dense(cls, mask: Tensor) -> RowIntervals:
        """From a bool mask [Lq, Lk], [B, Lq, Lk] or [B, 1, Lq, Lk], True where allowed.

        Raises:
            TypeError: not bool. An additive mask says ``mask == 0``.
            ValueError: a row's keys lie in more than two runs, or the shape is another.
        """
        if mask.dtype != torch.bool:
            raise TypeError(
                f"RowIntervals.from_dense: mask must be bool (True = may attend), got {mask.dtype}"
            )
        shape = tuple(mask.shape)
        if mask.dim() == 4 and shape[1] == 1:
            mask = mask[:, 0]
        if mask.dim() == 2:
            mask = mask[None]
        if mask.dim() != 3:
            raise ValueError(
                "RowIntervals.from_dense: mask must be [Lq, Lk], [B, Lq, Lk] or [B, 1, Lq, Lk] "
                f"(one for all heads), got {shape}"
            )
        keys = mask.shape[2]
        edges = torch.nn.functional.pad(mask, (1, 1)).int().diff()  # [B, Lq, Lk + 1]
        runs = (edges > 0).sum(2)
        if mask.numel() and runs.max() > 2:
            sample, row = (runs > 2).nonzero()[0].tolist()
            raise ValueError(
                f"RowIntervals.from_dense: row {row} of sample {sample} allows keys in "
                f"{int(runs[sample, row])} separate runs, and two intervals hold at most 2"
            )
        place = torch.arange(keys + 1, device=mask.device)
        begin, end = edges > 0, edges < 0
        a0 = torch.where(begin, place, keys).amin(2)
        a1 = torch.where(end, place, keys).amin(2)
        b1 = torch.where(end, place, 0).amax(2)
        b0 = torch.where(runs == 2, torch.where(begin, place, 0).amax(2), b1)
        rows = torch.stack([a0, a1, b0, b1], 2) * (runs > 0)[..., None]
        return cls(rows.to(torch.int32), keys)

    def plot(
        self,
        path: str | Path | None = None,
        *,
        sample: int = 0,
        rows: Parts = (),
        keys: Parts = (),
    ) -> str:
        """Draw one sample's mask: rows are queries, columns are keys.

        Args:
            path: where to write a PNG as well (needs matplotlib).
            sample: which mask of a batch.
            rows: names and sizes of the sequence's parts, for lines between them.
            keys: the same for the keys.

        Returns:
            The drawing as text: ■ allowed, · not. A mask of more than 72 keys is drawn in square
            cells, where ▒ stands for a cell that is allowed in part.
        """
        dense = self.to_dense()[sample].cpu()
        if path is not None:
            _write_png(dense, Path(path), rows, keys)
        return _drawing(dense, rows, keys)

    @classmethod
    def _stack(cls, keys: int, *parts: Tensor) -> RowIntervals:
        """Rows of all parts, each [1 or B, rows, 4], one below the other."""
        batch = max(part.shape[0] for part in parts)
        rows = torch.cat([part.expand(batch, -1, -1) for part in parts], 1)
        return cls(rows.to(torch.int32), keys)


def _filled(slots: int, lengths: Tensor | None, left_pads: Tensor | None) -> tuple[Tensor, Tensor]:
    """[first, last) of the slots that hold tokens, each [1 or B, 1]."""
    for name, value in (("lengths", lengths), ("left_pads", left_pads)):
        if value is not None and (value.dim() != 1 or value.is_floating_point()):
            raise ValueError(
                f"RowIntervals: {name} must be an integer tensor [B], got "
                f"{value.dtype} {tuple(value.shape)}"
            )
    if lengths is not None and left_pads is not None and lengths.shape != left_pads.shape:
        raise ValueError(
            f"RowIntervals: lengths and left_pads must be of one size, got {len(lengths)} and "
            f"{len(left_pads)}"
        )
    given = lengths if left_pads is None else left_pads
    first = (
        torch.zeros(1, dtype=torch.int64, device=None if given is None else given.device)
        if left_pads is None
        else left_pads.long().clamp(0, slots)
    )
    last = torch.full_like(first, slots)
    if lengths is not None:
        last = (first + lengths.long()).clamp(max=slots)
        first = torch.minimum(first.expand_as(last), last)
    return first[:, None], last[:, None]


def _rows(
    count: int, a0: int | Tensor, a1: int | Tensor, b0: int | Tensor = 0, b1: int | Tensor = 0
) -> Tensor:
    """[1 or B, count, 4] from bounds that are numbers or broadcast to [1 or B, count].

    Without a second interval it is the empty one behind the first.
    """
    if isinstance(b1, int) and b1 == 0:
        b0 = b1 = a1
    like = next((x for x in (a0, a1, b0, b1) if isinstance(x, Tensor)), None)
    device = None if like is None else like.device
    bounds = [torch.as_tensor(x, device=device) for x in (a0, a1, b0, b1)]
    bounds = [x.view(1, -1) if x.dim() < 2 else x for x in bounds]
    batch = max(x.shape[0] for x in bounds)
    return torch.stack([x.expand(batch, count) for x in bounds], 2)


def _causal_rows(text: int, a0: int, a1: int, offset: int, first: Tensor, last: Tensor) -> Tensor:
    """Rows of text whose keys start at `offset`: [a0, a1) and the filled slots up to the row's."""
    own = torch.arange(1, text + 1, device=first.device)
    stop = torch.minimum(torch.maximum(own, first), last)
    return _rows(text, a0, a1, offset + first, offset + stop)


def _next(where: Tensor, place: Tensor, otherwise: int) -> Tensor:
    """The smallest of `place` at or after each position of a row at which `where` holds."""
    return torch.where(where, place, otherwise).flip(1).cummin(1).values.flip(1)


def _drawing(dense: Tensor, rows: Parts, keys: Parts) -> str:
    side = -(-max(dense.shape[1], 1) // WIDEST)
    grid, row_cuts, key_cuts = _cells(dense, side), _cuts(rows, side), _cuts(keys, side)
    names = {cut: name for cut, (name, _) in zip([0, *row_cuts], rows, strict=False)}
    margin = max([len(name) + 2 for name in names.values()], default=0)

    def line(cells: Sequence[str]) -> str:
        parts = ["".join(cells[i:j]) for i, j in _spans(key_cuts, len(cells))]
        return "│".join(parts)

    def label(text: str, width: int) -> str:
        return text[:width].ljust(width)

    out = []
    if keys:
        widths = [j - i for i, j in _spans(key_cuts, grid.shape[1])]
        heads = [label(name, width) for (name, _), width in zip(keys, widths, strict=False)]
        out.append(" " * margin + " ".join([*heads[:-1], keys[-1][0]]))
    for i, row in enumerate(grid.tolist()):
        if i in row_cuts:
            ruled = ["─" * (b - a) for a, b in _spans(key_cuts, len(row))]
            out.append(" " * margin + "┼".join(ruled))
        out.append(label(names.get(i, ""), margin) + line([_SIGNS[c] for c in row]))
    return "\n".join(out)


def _cells(dense: Tensor, side: int) -> Tensor:
    """0, 1 or 2 for every square of `side` entries: none, some or all of them allowed."""
    high, wide = dense.shape
    pad = (0, -wide % side, 0, -high % side)

    def squares(value: Tensor, outside: bool) -> Tensor:
        padded = torch.nn.functional.pad(value, pad, value=outside)
        return padded.unflatten(0, (-1, side)).unflatten(2, (-1, side))  # [R, side, C, side]

    some = squares(dense, False).any(3).any(1)
    return some.int() + squares(dense, True).all(3).all(1).int() * some


def _cuts(parts: Parts, side: int) -> list[int]:
    """Cells at which a part begins, the first part's 0 left out."""
    sizes = [size for _, size in parts]
    return [sum(sizes[:i]) // side for i in range(1, len(sizes))]


def _spans(cuts: Sequence[int], end: int) -> list[tuple[int, int]]:
    return list(zip([0, *cuts], [*cuts, end], strict=True))


def _write_png(dense: Tensor, path: Path, rows: Parts, keys: Parts) -> None:
    from matplotlib.figure import Figure

    high, wide = dense.shape
    scale = 6 / max(high, wide, 1)
    figure = Figure(figsize=(max(wide * scale, 1.5) + 1, max(high * scale, 1.5) + 1), dpi=150)
    axes = figure.add_subplot()
    axes.imshow(dense.numpy(), cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
    for parts, place, name, draw in (
        (keys, axes.set_xticks, "key", axes.axvline),
        (rows, axes.set_yticks, "query", axes.axhline),
    ):
        cuts = [0, *_cuts(parts, 1)]
        for cut in cuts[1:]:
            draw(cut - 0.5, color="black", linewidth=0.8)
        if parts:
            sizes = [size for _, size in parts]
            middles = [cut + size / 2 - 0.5 for cut, size in zip(cuts, sizes, strict=True)]
            place(middles, [f"{part}\n{size}" for part, size in parts])
        (axes.set_xlabel if name == "key" else axes.set_ylabel)(name)
    figure.savefig(path, bbox_inches="tight")
