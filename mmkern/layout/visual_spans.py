"""Which rows of a batch of tokens are visual."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class VisualSpans:
    """The rows of a batch that belong to images, built once in a collator, used by every layer.

    Rows are counted through the whole batch: token l of sample b is row b · L + l. A run of visual
    rows may cross from one sample into the next.

    Attributes:
        shape: of the batch of tokens, (B, L) or (M,).
        rows: int32 [number of visual rows], ascending. Built from a mask on a GPU, whose number of
            visual rows the host does not know, it has an entry for every row of the batch and is
            -1 behind the last visual one.
        runs: [start, stop) of every run of visual rows, on the host; None where the host does not
            know.
    """

    shape: tuple[int, ...]
    rows: Tensor
    runs: tuple[tuple[int, int], ...] | None

    def __post_init__(self) -> None:
        if self.rows.dtype != torch.int32:
            raise TypeError(f"VisualSpans: rows must be int32, got {self.rows.dtype}")
        if self.rows.dim() != 1:
            raise ValueError(f"VisualSpans: rows must be [n], got {tuple(self.rows.shape)}")

    @classmethod
    def from_mask(cls, mask: Tensor) -> VisualSpans:
        """From a bool mask [B, L] or [M], True on visual rows; any pattern.

        Does not wait for a GPU, so it may stand inside a CUDA graph: a replay then reads the mask
        that the buffer holds by then. Better give it the collator's mask, on the CPU, and move the
        result: kernels then launch for visual rows alone, and for a batch of text not at all.

        Raises:
            TypeError: not bool. An integer mask says ``mask != 0``.
            ValueError: a mask without a dimension.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"VisualSpans.from_mask: mask must be bool (True = visual), got {got}")
        if mask.dim() == 0:
            raise ValueError("VisualSpans.from_mask: mask must be [B, L] or [M], got shape ()")
        shape, flat = tuple(mask.shape), mask.reshape(-1)
        _check_size("from_mask", shape)
        if mask.device.type == "cpu":
            edges = torch.nn.functional.pad(flat, (1, 1)).int().diff().nonzero()
            runs = tuple((start, stop) for start, stop in edges.view(-1, 2).tolist())
            return cls(shape, flat.nonzero().view(-1).to(torch.int32), runs)
        return cls(shape, _compact(flat), None)

    @classmethod
    def from_lengths(
        cls, starts: Sequence[int], lengths: Sequence[int], shape: Sequence[int]
    ) -> VisualSpans:
        """From runs of `lengths` rows that begin at `starts`, in a batch of `shape`.

        Raises:
            ValueError: runs that are unsorted, overlap, are empty or leave the batch; the message
                names the run and the numbers.
        """
        op, shape = "VisualSpans.from_lengths", tuple(int(size) for size in shape)
        _check_size("from_lengths", shape)
        starts, lengths = [int(x) for x in starts], [int(x) for x in lengths]
        if len(starts) != len(lengths):
            raise ValueError(
                f"{op}: starts and lengths must be of one size, got {len(starts)} and "
                f"{len(lengths)}"
            )
        total, end = math.prod(shape), 0
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            if length < 1:
                raise ValueError(f"{op}: lengths[{i}] must be at least 1, got {length}")
            if i and start < starts[i - 1]:
                raise ValueError(
                    f"{op}: starts must ascend, but starts[{i}] is {start} after {starts[i - 1]}"
                )
            if start < end:
                raise ValueError(
                    f"{op}: starts[{i}] is {start}, but "
                    + (f"the run before it ends at {end}" if i else "rows count from 0")
                )
            end = start + length
            if end > total:
                raise ValueError(
                    f"{op}: run {i} is rows {start} to {end}, but a batch of {shape} has {total}"
                )
        runs = [(start, start + n) for start, n in zip(starts, lengths, strict=True)]
        parts = [torch.arange(*run, dtype=torch.int32) for run in runs]
        rows = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)
        return cls(shape, rows, tuple(runs))

    @classmethod
    def all_text(cls, shape: Sequence[int], device: torch.device | str = "cpu") -> VisualSpans:
        """No visual row, as while text is generated."""
        empty = torch.empty(0, dtype=torch.int32, device=device)
        return cls(tuple(int(size) for size in shape), empty, ())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> VisualSpans:
        """The same spans for layers on another device."""
        return VisualSpans(self.shape, self.rows.to(device, non_blocking=non_blocking), self.runs)

    def to_mask(self) -> Tensor:
        """bool, of `shape`: True on visual rows."""
        total = math.prod(self.shape)
        rows = self.rows.long()
        mask = self.rows.new_zeros(total + 1, dtype=torch.bool)  # the last takes the padding
        return mask.index_fill(0, torch.where(rows < 0, total, rows), True)[:-1].view(self.shape)


def _check_size(constructor: str, shape: tuple[int, ...]) -> None:
    if math.prod(shape) >= 2**31:
        raise ValueError(
            f"VisualSpans.{constructor}: a batch has at most 2^31 - 1 rows, got {shape}"
        )


def _compact(flat: Tensor) -> Tensor:
    """int32 [M]: indices of the true entries, then -1, without asking how many there are."""
    total = flat.shape[0]
    place = torch.where(flat, flat.cumsum(0) - 1, total)  # all false ones to a slot of their own
    rows = torch.full((total + 1,), -1, dtype=torch.int32, device=flat.device)
    rows.scatter_(0, place, torch.arange(total, dtype=torch.int32, device=flat.device))
    return rows[:total]
