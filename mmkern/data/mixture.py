"""Several data sets as one, each with its share.

InstructBLIP (arXiv 2305.06500, section 2.5) draws data set d with probability
``p_d = w_d·√S_d / Σ w·√S``, S_d its size: with equal shares small sets would be overfitted, with
shares by size hardly seen. The weights w_d are set by hand; the paper lowers A-OKVQA's multiple
choice and raises OKVQA, without giving numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from mmkern.data.epochs import EpochAware
from mmkern.data.randomness import Stream, permutation, sample_keys, uniform

__all__ = ["INSTRUCTBLIP", "INSTRUCTBLIP_HELD_OUT", "INSTRUCTBLIP_WEIGHTS", "Mixture", "shares"]

# The 13 of InstructBLIP's 26 data sets that it trains on, with the sizes of the paper's table 4
# (images or pairs, rounded as there); kind of instruction. LLaVA's parts as LLaVA publishes them.
# "ask" are questions to be generated, made from the same three sets.
INSTRUCTBLIP: dict[str, tuple[int, str]] = {
    "coco-caption": (82_000, "caption"),
    "web-capfilt": (14_000_000, "caption"),
    "textcaps": (21_000, "caption"),
    "vqav2": (82_000, "question"),
    "okvqa": (9_000, "question"),
    "aokvqa": (17_000, "choice"),
    "ocr-vqa": (800_000, "question"),
    "vqav2-ask": (82_000, "ask"),
    "okvqa-ask": (9_000, "ask"),
    "aokvqa-ask": (17_000, "ask"),
    "llava-conversation": (58_000, "verbatim"),
    "llava-detail": (23_000, "verbatim"),
    "llava-reasoning": (77_000, "verbatim"),
}
# The 13 that it is only tested on.
INSTRUCTBLIP_HELD_OUT = (
    "nocaps", "flickr30k", "gqa", "vsr", "iconqa", "textvqa", "vizwiz", "visual-dialog",
    "scienceqa", "msvd-qa", "msrvtt-qa", "ivqa", "hateful-memes",
)  # fmt: skip
# The paper's directions; the sizes of the steps are ours.
INSTRUCTBLIP_WEIGHTS = {"aokvqa": 0.5, "okvqa": 2.0}


def shares(
    sizes: Mapping[str, int], weights: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Probability of each data set: its weight (1 if not given) times √size, normalised.

    Raises:
        ValueError: an empty data set or none at all, a weight that is negative or of no data set,
            or nothing left.
    """
    weights = weights or {}
    if not sizes or min(sizes.values()) < 1:
        raise ValueError(f"mixture: needs data sets with at least one sample, got {dict(sizes)}")
    if unknown := set(weights) - set(sizes):
        raise ValueError(
            f"mixture: weights for {sorted(unknown)}, which are not among {sorted(sizes)}"
        )
    if not all(np.isfinite(w) and w >= 0 for w in weights.values()):
        raise ValueError(f"mixture: weights must be at least 0, got {dict(weights)}")
    parts = {name: weights.get(name, 1.0) * size**0.5 for name, size in sizes.items()}
    total = sum(parts.values())
    if total <= 0:
        raise ValueError(f"mixture: all weights are 0: {dict(weights)}")
    return {name: part / total for name, part in parts.items()}


class Mixture(EpochAware, Dataset[Any]):
    """Map-style data sets, mixed: ``mixture[i]`` is a sample of the data set drawn for place i.

    What is drawn depends on (seed, epoch, i) alone. Within a data set samples come in a random
    order, each once before any comes again. ``index`` of a sample is its place in the mixture, so
    that a sample that comes twice in an epoch is augmented in two ways; ``source`` names its set.

    Args:
        datasets: name -> data set.
        weights: name -> factor of its share, 1 where not given.
        samples: length of an epoch; the sum of all sizes when None.
        seed: of the draws.

    Raises:
        ValueError: see ``shares``; fewer than one sample an epoch.
    """

    def __init__(
        self,
        datasets: Mapping[str, Any],
        *,
        weights: Mapping[str, float] | None = None,
        samples: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.datasets = dict(datasets)
        sizes = {name: len(data) for name, data in self.datasets.items()}
        self.shares = shares(sizes, weights)
        self.samples = sum(sizes.values()) if samples is None else samples
        self.seed = seed
        if self.samples < 1:
            raise ValueError(f"Mixture: samples must be at least 1, got {samples}")
        self._dealt: tuple[int, NDArray[np.int16], NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return self.samples

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, in every data set too."""
        super().set_epoch(epoch)
        for data in self.datasets.values():
            if hasattr(data, "set_epoch"):
                data.set_epoch(epoch)

    def report_skipped(self) -> int:
        """Broken samples of all data sets, each reported by itself."""
        reports = (getattr(data, "report_skipped", None) for data in self.datasets.values())
        return sum(report() for report in reports if report is not None)

    def __getitem__(self, index: int) -> dict[str, Any]:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"Mixture: index {index} of {count} samples")
        index %= count
        choices, rows = self._deal(self.epoch)
        name = list(self.datasets)[choices[index]]
        return {**self.datasets[name][int(rows[index])], "index": index, "source": name}

    def _deal(self, epoch: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        """For each place of the epoch which data set, and which of its samples."""
        if self._dealt is None or self._dealt[0] != epoch:
            bounds = np.cumsum(list(self.shares.values()))
            draws = uniform(sample_keys(self.seed, epoch, [0]), len(self), Stream.MIXTURE)[0]
            last = len(bounds) - 1  # rounding may leave the last bound a little below 1
            choices = np.minimum(np.searchsorted(bounds, draws, side="right"), last)
            rows = np.empty(len(self), dtype=np.int64)
            for number, data in enumerate(self.datasets.values()):
                places = np.flatnonzero(choices == number)
                rounds = range(-(-len(places) // len(data)))
                orders = [
                    permutation(
                        self.seed, epoch, len(data), Stream.MIXTURE_ORDER + (number << 24) + r
                    )
                    for r in rounds
                ]
                if orders:
                    rows[places] = np.concatenate(orders)[: len(places)]
            self._dealt = (epoch, choices.astype(np.int16), rows)
        return self._dealt[1], self._dealt[2]
