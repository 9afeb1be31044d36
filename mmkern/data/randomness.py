"""Random numbers that depend on (seed, epoch, index) and on nothing else.

A run that is stopped and resumed, or that uses another number of workers, must see the same
pictures with the same augmentation. Numbers are therefore computed, never drawn from a state: each
is a hash (the SplitMix64 finalizer; Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014) of the place it is for. The results are the same on every platform and
with every version of NumPy and PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Keys", "Stream", "generator", "permutation", "sample_keys", "uniform"]

Keys = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_WORD = (1 << 64) - 1


class Stream(IntEnum):
    """What a number is for; numbers of two streams have nothing to do with each other."""

    SHIFT = 1
    JITTER = 2
    REPLACEMENT = 3
    TEMPLATE = 4
    SAMPLE_ORDER = 5
    BATCH_ORDER = 6
    BATCH_CHOICE = 7
    SHUFFLE_BUFFER = 8
    RESERVE = 9
    QUESTION = 10
    PREFIX = 11
    MIXTURE = 12
    ANSWER = 13
    UNSEEN = 14
    CHOICE = 16
    ROUNDS = 20
    # Families with one stream a row or a pass: the rest of the range.
    ROW_ORDER = 1 << 32
    SHARD_ORDER = 2 << 32
    MIXTURE_ORDER = 3 << 32


def _mix(words: Keys) -> Keys:
    words = words + _GOLDEN
    words = (words ^ (words >> np.uint64(30))) * _MULTIPLIERS[0]
    words = (words ^ (words >> np.uint64(27))) * _MULTIPLIERS[1]
    return words ^ (words >> np.uint64(31))


def _words(values: int | Sequence[int] | NDArray[np.int64]) -> Keys:
    if isinstance(values, int):
        return np.array([values & _WORD], dtype=np.uint64)
    return np.asarray(values, dtype=np.int64).astype(np.uint64)


def sample_keys(
    seed: int, epoch: int | Sequence[int], indices: Sequence[int] | NDArray[np.int64]
) -> Keys:
    """A 64-bit key for each sample: uint64 [B] from a seed, an epoch (or one a sample), indices."""
    return _mix(_mix(_mix(_words(seed)) ^ _words(epoch)) ^ _words(indices))


def uniform(keys: Keys, draws: int, stream: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), float64 [B, draws], of one ``Stream``."""
    counters = _mix(_words(stream)) ^ np.arange(draws, dtype=np.uint64)[None, :]
    bits = _mix(_mix(keys)[:, None] ^ _mix(counters))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, epoch: int, count: int, stream: int) -> NDArray[np.int64]:
    """A permutation of range(count), int64 [count], that depends on (seed, epoch, stream) only."""
    order = uniform(sample_keys(seed, epoch, [0]), count, stream)[0]
    return np.argsort(order, kind="stable").astype(np.int64)


def generator(key: int | np.uint64) -> torch.Generator:
    """A CPU generator seeded with one sample's key."""
    return torch.Generator().manual_seed(int(key) & (_WORD >> 1))
