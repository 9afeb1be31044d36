"""Interleaved timing: A B C A B C ..., so that a slow minute of the machine falls on all alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.calibration import clock

ROUNDS = (3, 50)
PATIENCE = 15.0  # seconds; a call that took longer is not repeated
CACHE_BYTES = 256 << 20  # beyond the L2 of any GPU


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of one call; on a GPU with a cold L2 cache."""
    if device == "cuda":
        torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device).zero_()
        torch.cuda._sleep(2_000_000)  # about 1 ms: launches run ahead, as they do in training
    return clock(call, device)


def interleave(
    calls: dict[str, Callable[[], object]],
    first: dict[str, float],
    *,
    ours: str,
    device: str,
    seconds: float,
    pedantic: Callable[..., Any],
) -> dict[str, list[float]]:
    """Time every call in turn, round after round.

    pytest-benchmark drives the rounds: its `pedantic` times ours, and the turn of the others is
    the set-up of each round. All samples kept here come from one clock.

    Args:
        calls: what to time, warm.
        first: seconds of an earlier call; one beyond PATIENCE stands as the only sample.
        ours: the call that pytest-benchmark sees.
        seconds: budget; the number of rounds follows from it, within ROUNDS.
        pedantic: `benchmark.pedantic`.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    repeated = [name for name in calls if first[name] <= PATIENCE]
    for name in calls:
        if name not in repeated:
            samples[name].append(first[name])
    total = sum(first[name] for name in repeated)
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(seconds / total))) if repeated else 1

    def turn_of_the_others() -> None:
        for name in repeated:
            if name != ours:
                samples[name].append(timed(calls[name], device))

    def turn_of_ours() -> None:
        if ours in repeated:
            samples[ours].append(timed(calls[ours], device))

    pedantic(turn_of_ours, setup=turn_of_the_others, rounds=rounds)
    return samples


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    values = torch.tensor(samples, dtype=torch.float64)
    p20, p50, p80 = values.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return p20, p50, p80
