"""Batches chosen by what is in them: no label twice, or samples of one kind and length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from mmkern.data.randomness import Stream, permutation, sample_keys, uniform

__all__ = ["GroupedBatchSampler", "UniqueBatchSampler"]


class _BatchSampler(Sampler[list[int]]):
    """Whole global batches of an epoch, of which each rank gets its own rows.

    Subclasses deal the epoch's batches, from (seed, epoch) alone.
    """

    def __init__(self, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._start = 0
        self._batches = 0
        if not 0 <= rank < world_size or batch_size < 1:
            raise ValueError(
                f"{type(self).__name__}: needs batch_size >= 1 and 0 <= rank < world_size, got "
                f"{batch_size}, {rank}, {world_size}"
            )

    def __len__(self) -> int:
        return self._batches - self._start

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch and, to resume inside it, the number of batches already used.

        Raises:
            ValueError: more batches than an epoch has.
        """
        if not 0 <= start <= self._batches:
            raise ValueError(
                f"{type(self).__name__}: start must be 0..{self._batches} batches, got {start}"
            )
        self.epoch = epoch
        self._start = start

    def __iter__(self) -> Iterator[list[int]]:
        place = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        for batch in self._deal()[self._start :]:
            yield batch[place].tolist()

    def _deal(self) -> NDArray[np.int64]:
        """int64 [batches, batch_size * world_size]: the epoch's indices."""
        raise NotImplementedError


class UniqueBatchSampler(_BatchSampler):
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
        super().__init__(batch_size, seed, rank, world_size)
        self.labels = torch.as_tensor(labels).numpy().astype(np.int64)
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

    def _deal(self) -> NDArray[np.int64]:
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


class GroupedBatchSampler(_BatchSampler):
    """Yields whole batches of one kind and about one length; give it as ``batch_sampler``.

    LLaVA's ``group_by_modality_length``: texts alone do not wait for pictures, and little is
    padding. Samples of a kind come in random order, are cut into stretches of ``stretch`` global
    batches, sorted by length within one and cut into batches; batches come in random order. What
    is left of each kind fills batches of several kinds; what then does not fill one is left out,
    other samples in other epochs. Everything depends on (seed, epoch) alone.

    Args:
        lengths: [n], of each sample, in any unit.
        kinds: [n], which kind each sample is of (whether it has a picture).
        batch_size: samples a batch, on this rank.
        seed: of the order.
        stretch: global batches sorted together: more, and lengths are more alike and neighbours
            less random.
        rank, world_size: with more ranks, each gets every ``world_size``-th sample of a sorted
            global batch, so that ranks have about equal work.

    Raises:
        ValueError: numbers that differ, fewer samples than a global batch, a stretch below 1, or a
            rank outside the world.
    """

    def __init__(
        self,
        lengths: Sequence[int] | NDArray[np.int64],
        kinds: Sequence[int] | NDArray[Any],
        batch_size: int,
        seed: int = 0,
        *,
        stretch: int = 50,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(batch_size, seed, rank, world_size)
        self.lengths, self.kinds = np.asarray(lengths), np.asarray(kinds)
        rows = batch_size * world_size
        if self.lengths.shape != self.kinds.shape or len(self.lengths) < rows or stretch < 1:
            raise ValueError(
                f"GroupedBatchSampler: needs a kind for each length, at least {rows} of them and "
                f"stretch >= 1, got {self.lengths.shape}, {self.kinds.shape} and {stretch}"
            )
        self.stretch = stretch
        self._batches = len(self.lengths) // rows

    def _deal(self) -> NDArray[np.int64]:
        rows = self.batch_size * self.world_size
        order = permutation(self.seed, self.epoch, len(self.lengths), Stream.SAMPLE_ORDER)
        batches: list[NDArray[np.int64]] = []
        left: list[NDArray[np.int64]] = []
        for kind in np.unique(self.kinds):
            own = order[self.kinds[order] == kind]
            whole = len(own) // rows * rows
            batches += self._sorted(own[:whole])
            left.append(own[whole:])
        mixed = np.concatenate(left)
        batches += self._sorted(mixed[: len(mixed) // rows * rows])
        # Rank r's rows r, r + world, ... stand together, as all samplers here have them.
        dealt = np.stack(batches).reshape(-1, self.batch_size, self.world_size)
        table = dealt.transpose(0, 2, 1).reshape(-1, rows)
        return table[permutation(self.seed, self.epoch, self._batches, Stream.BATCH_ORDER)]

    def _sorted(self, samples: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Whole batches of alike lengths."""
        rows = self.batch_size * self.world_size
        found: list[NDArray[np.int64]] = []
        for start in range(0, len(samples), self.stretch * rows):
            part = samples[start : start + self.stretch * rows]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            found += list(part.reshape(-1, rows))
        return found
