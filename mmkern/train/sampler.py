"""Which samples form which batch, from (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import Dataset, Sampler

from mmkern.data.randomness import Stream, permutation


class EpochBatchSampler(Sampler[list[int]]):
    """Whole batches of a random order of ``range(count)``; give it as ``batch_sampler``.

    The order depends on (seed, epoch), not on the number of ranks: rank r gets rows
    [r·batch_size, (r + 1)·batch_size) of every global batch. An incomplete last batch is left out,
    since the size of a batch is part of a contrastive loss.

    Args:
        count: samples.
        batch_size: samples a batch, on this rank.
        seed: of the order.
        rank, world_size: this process among all.

    Raises:
        ValueError: fewer samples than a global batch.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int = 0, *, rank: int = 0, world_size: int = 1
    ) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        if not 0 <= rank < world_size or batch_size < 1:
            raise ValueError(
                "EpochBatchSampler: needs batch_size >= 1 and 0 <= rank < world_size, got "
                f"{batch_size}, {rank}, {world_size}"
            )
        if count < batch_size * world_size:
            raise ValueError(
                f"EpochBatchSampler: a batch of {batch_size * world_size} needs as many samples, "
                f"got {count}"
            )

    def __len__(self) -> int:
        return self.count // (self.batch_size * self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = permutation(self.seed, self.epoch, self.count, Stream.SAMPLE_ORDER)
        rows = self.batch_size * self.world_size
        for batch in range(len(self)):
            start = batch * rows + self.rank * self.batch_size
            yield order[start : start + self.batch_size].tolist()


class StreamBatches(Dataset[Any]):
    """A data set that can only be read in order, behind the face of a map-style one.

    Asked for a batch, whatever its indices, a DataLoader's worker gets the next rows of its own
    part. The trainer can thus count the batches of an epoch and go on in the middle of one without
    reading what came before.

    Args:
        dataset: iterable, with ``__len__`` (samples an epoch on this rank), ``set_epoch`` and
            ``start_at``, as :class:`mmkern.data.ShardDataset` has them; its samples are divided
            among workers so that the first ones get the odd ones.
        batch_size: samples a batch, on this rank.
        workers: the DataLoader's.

    Raises:
        TypeError: the data set lacks one of these methods.
        ValueError: an epoch that does not fill one batch.
    """

    def __init__(self, dataset: Any, batch_size: int, workers: int) -> None:
        for method in ("__len__", "set_epoch", "start_at"):
            if not hasattr(dataset, method):
                raise TypeError(
                    f"Trainer: an iterable data set needs {method}, which "
                    f"{type(dataset).__name__} lacks"
                )
        self.dataset = dataset
        self.batch_size = batch_size
        self._rows: Iterator[Any] | None = None
        share, parts = len(self.dataset), max(1, workers)
        self.batches = sum(
            (share // parts + (part < share % parts)) // batch_size for part in range(parts)
        )
        if self.batches == 0:
            raise ValueError(
                f"Trainer: an epoch of {share} samples does not fill a batch of {batch_size} for "
                f"each of {parts} workers"
            )

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def begin(self, epoch: int, batches: int) -> None:
        """Go to an epoch, after the batches that were already used."""
        self.dataset.set_epoch(epoch)
        self.dataset.start_at(batches, self.batch_size)
        self._rows = None

    def batch_sampler(self) -> list[list[int]]:
        """One entry a batch; its numbers only say how many rows."""
        return [list(range(self.batch_size))] * self.batches

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        if self._rows is None:
            self._rows = iter(self.dataset)
        rows = list(islice(self._rows, len(indices)))
        if len(rows) < len(indices):
            raise RuntimeError(
                f"{type(self.dataset).__name__} ended before the {len(self.dataset)} samples that "
                "its length promises"
            )
        return rows
