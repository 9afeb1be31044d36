"""What every data set here has in common: an epoch, and a count of what was skipped in it.

Both live in shared memory, so that DataLoader workers (forked, spawned, persistent) see the epoch
that the main process sets, and the main process sees what the workers skipped.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

__all__ = ["EpochAware"]

_LOGGER = logging.getLogger(__name__)
_EPOCH = 0
# One counter a worker, so that no two processes write to the same one.
_FIRST_COUNTER, _COUNTERS = 1, 256


class EpochAware:
    """Mixin for data sets: ``set_epoch``, and broken samples counted and reported once an epoch."""

    def __init__(self) -> None:
        self._shared: Tensor = torch.zeros(
            _FIRST_COUNTER + _COUNTERS, dtype=torch.int64
        ).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch that random choices derive from."""
        return int(self._shared[_EPOCH])

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; what was skipped in the one before is reported first."""
        self.report_skipped()
        self._shared[_EPOCH] = epoch

    @property
    def skipped(self) -> int:
        """Broken samples met in this epoch so far, in all workers."""
        return int(self._shared[_FIRST_COUNTER:].sum())

    def report_skipped(self) -> int:
        """Log one warning if this epoch had broken samples; return how many and count anew."""
        skipped = self.skipped
        if skipped:
            _LOGGER.warning(
                "%s: %d broken samples were skipped in epoch %d",
                type(self).__name__,
                skipped,
                self.epoch,
            )
            self._shared[_FIRST_COUNTER:] = 0
        return skipped

    def _count_skipped(self, error: Exception) -> None:
        worker = get_worker_info()
        counter = 0 if worker is None else 1 + worker.id % (_COUNTERS - 1)
        self._shared[_FIRST_COUNTER + counter] += 1
        _LOGGER.debug("skipped: %s", error)
