"""What the contrastive operators share across ranks.

Each rank holds its own image and text rows. One tower (text) is gathered, the column statistics
are exchanged, and the gathered tower's gradient is reduce-scattered. Without a group, or in a group
of one, every method returns its argument, so both cases run the same code.

Bytes per rank, b rows of N in all, D wide: gather 2ND (16-bit), column statistics 12N, reduce-
scatter 4ND (fp32).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# Renamed in torch 2.13, where the old names warn; called with positional arguments, they agree.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class RowShard:
    """How the rows of a global batch lie over the ranks of `group`.

    Attributes:
        group: process group, or None for a batch that one process holds.
        rank: this process's rank in the group.
        images: image rows of each rank, in rank order.
        texts: text rows of each rank; rank r's first images[r] of them are its labelled ones.
    """

    group: ProcessGroup | None
    rank: int
    images: tuple[int, ...]
    texts: tuple[int, ...]

    @staticmethod
    def of(
        op: str, image: Tensor, text: Tensor, group: ProcessGroup | None, name: str = "image"
    ) -> RowShard:
        """Exchange the row counts (one host synchronisation where the group has several ranks).

        Args:
            name: what `op` calls the argument that `image` is.

        Raises:
            ValueError: on every rank alike, when a rank has no rows or the widths differ.
        """
        if group is None or dist.get_world_size(group) == 1:
            rank, sizes = 0, [[image.shape[0], text.shape[0], image.shape[1]]]
        else:
            rank = dist.get_rank(group)
            mine = torch.tensor([image.shape[0], text.shape[0], image.shape[1]])
            every = torch.empty(dist.get_world_size(group) * 3, dtype=torch.int64)
            every = every.to(image.device)
            _all_gather(every, mine.to(image.device), group=group)
            sizes = every.view(-1, 3).tolist()
        images, texts, widths = zip(*sizes, strict=True)
        if min(images) == 0:
            where = f" on rank {images.index(0)}" if len(images) > 1 else ""
            raise ValueError(f"{op}: {name} needs at least one row, got 0{where}")
        if len(set(widths)) > 1:
            raise ValueError(f"{op}: {name} must have one width on all ranks, got {list(widths)}")
        return RowShard(group, rank, images, texts)

    @property
    def world(self) -> int:
        """Number of ranks."""
        return len(self.images)

    @property
    def offset(self) -> int:
        """Column, among all ranks' texts, of this rank's first text row."""
        return sum(self.texts[: self.rank])

    def gather(self, local: Tensor) -> Tensor:
        """All ranks' rows of a [texts[rank], ...] tensor, in rank order."""
        if self.world == 1:
            return local
        padded = _pad(local, max(self.texts))
        out = local.new_empty(self.world, *padded.shape)
        _all_gather(out.view(-1, *padded.shape[1:]), padded, group=self.group)
        return self._unpad(out)

    def log_sum_exp(self, columns: Tensor) -> Tensor:
        """[sum(texts)] log-sum-exps over local rows -> [texts[rank]], over all ranks' rows."""
        return columns if self.world == 1 else self.exchange(columns).logsumexp(0)

    def exchange(self, columns: Tensor) -> Tensor:
        """[sum(texts), ...], what each rank found for every text -> [world, texts[rank], ...]."""
        if self.world == 1:
            return columns[None]
        widest = max(self.texts)
        parts = torch.stack([_pad(part, widest) for part in columns.split(self.texts)])
        out = torch.empty_like(parts)
        dist.all_to_all_single(out, parts, group=self.group)
        return out[:, : self.texts[self.rank]]

    def reduce_scatter(self, partial: Tensor) -> Tensor:
        """Sum of all ranks' [sum(texts), D] tensors; this rank keeps its own rows."""
        if self.world == 1:
            return partial
        widest = max(self.texts)
        if min(self.texts) < widest:
            partial = torch.cat([_pad(part, widest) for part in partial.split(self.texts)])
        out = partial.new_empty(widest, *partial.shape[1:])
        _reduce_scatter(out, partial.contiguous(), group=self.group)
        return out[: self.texts[self.rank]]

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a tensor over the ranks."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value, group=self.group)
        return value

    def labelled(self, device: torch.device) -> Tensor:
        """[sum(texts)] bool: columns that are some image's own text."""
        parts = []
        for count, total in zip(self.images, self.texts, strict=True):
            parts.append(torch.arange(total, device=device) < count)
        return torch.cat(parts)

    def _unpad(self, padded: Tensor) -> Tensor:
        if min(self.texts) == max(self.texts):
            return padded.flatten(0, 1)
        return torch.cat([padded[r, :count] for r, count in enumerate(self.texts)])


def _pad(local: Tensor, rows: int) -> Tensor:
    """`local` with zero rows appended up to `rows`; collectives need equal sizes on all ranks."""
    missing = rows - local.shape[0]
    if missing == 0:
        return local.contiguous()
    return torch.cat([local, local.new_zeros(missing, *local.shape[1:])])
