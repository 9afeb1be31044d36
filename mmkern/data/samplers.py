"""Batches in which no label occurs twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from mmkern.data.randomness import Stream, permutation, sample_keys, uniform

__all__ = ["UniqueBatchSampler"]


class UniqueBatchSampler(Sampler[list[int]]):
    """Yields whole batches of indices in which all labels differ; give it as ``batch_sampler``.

    In a contrastive loss two pictures with the same text are each other's false negatives; here
    they never meet. Every sample is used about once an epoch: what does not fill a last batch, and
    what a label has beyond one sample a batch, is left out, other samples in other epochs. The
    batches depend on (seed, epoch) alone.

    Args:
        labels: int [n], the label of each sample.
        batch_size: samples a batch, on this rank.
        seed: of the order.
        rank, world_size: with more than one rank, labels differ within the whole global batch and
            each rank gets its own rows of it.

    Raises:
        ValueError: fewer labels than a global batch has samples, or a rank outside the world.
    """

    def __init__(
        self,
        labels: Tensor | Sequence[int] | NDArray[np.int64],
        batch_size: int,
        seed: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.labels = torch.as_tensor(labels).numpy().astype(np.int64)
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._start = 0
        if not 0 <= rank < world_size or batch_size < 1:
            raise ValueError(
                "UniqueBatchSampler: needs batch_size >= 1 and 0 <= rank < world_size, got "
                f"{batch_size}, {rank}, {world_size}"
            )
        counts = np.unique(self.labels, return_counts=True)[1]
        rows = batch_size * world_size
        if len(counts) < rows:
            raise ValueError(
                f"UniqueBatchSampler: a batch of {rows} needs as many labels, got {len(counts)}"
            )
        # A label can fill one place a batch; fewer batches may leave more of it out, so iterate.
        batches = len(self.labels) // rows
        while np.minimum(counts, batches).sum() < batches * rows:
            batches = int(np.minimum(counts, batches).sum()) // rows
        self._batches = batches

    def __len__(self) -> int:
        return self._batches - self._start

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch and, to resume inside it, the number of batches already used.

        Raises:
            ValueError: more batches than an epoch has.
        """
        if not 0 <= start <= self._batches:
            raise ValueError(
                f"UniqueBatchSampler: start must be 0..{self._batches} batches, got {start}"
            )
        self.epoch = epoch
        self._start = start

    def __iter__(self) -> Iterator[list[int]]:
        place = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        for batch in self._deal()[self._start :]:
            yield batch[place].tolist()

    def _deal(self) -> NDArray[np.int64]:
        """int64 [batches, batch_size * world_size]: the epoch's indices."""
        rows = self.batch_size * self.world_size
        order = permutation(self.seed, self.epoch, len(self.labels), Stream.SAMPLE_ORDER)
        # Samples of a label side by side, labels and samples within them in random order.
        _, first, label_of = np.unique(self.labels[order], return_index=True, return_inverse=True)
        by_label = order[np.argsort(first[label_of], kind="stable")]
        starts = np.flatnonzero(
            np.diff(self.labels[by_label], prepend=self.labels[by_label[0]] - 1)
        )
        groups = [group[: self._batches] for group in np.split(by_label, starts[1:])]
        excess = sum(map(len, groups)) - self._batches * rows

        # Each label goes to the emptiest batches, ties at random. That keeps all batches within
        # one sample of each other, so there is always a batch for every sample of a label.
        free = np.full(self._batches, rows)
        dealt: list[list[int]] = [[] for _ in range(self._batches)]
        keys = sample_keys(self.seed, self.epoch, range(len(groups)))
        ties = uniform(keys, self._batches, Stream.BATCH_CHOICE)
        for group, tie in zip(groups, ties, strict=True):
            if excess > 0:
                group, excess = group[1:], excess - 1
            emptiest = np.argsort(tie - free, kind="stable")[: len(group)]
            free[emptiest] -= 1
            for batch, index in zip(emptiest, group, strict=True):
                dealt[batch].append(int(index))
        within = [
            permutation(self.seed, self.epoch, rows, Stream.ROW_ORDER + b)
            for b in range(self._batches)
        ]
        table = np.array(dealt, dtype=np.int64).reshape(self._batches, rows)
        table = np.take_along_axis(table, np.array(within).reshape(table.shape), axis=1)
        return table[permutation(self.seed, self.epoch, self._batches, Stream.BATCH_ORDER)]
