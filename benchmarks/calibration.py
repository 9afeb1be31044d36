"""What this device gives: matrix products and copies, measured before anything is judged."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# (M, N, K): tiles as in a contrastive loss, and a large square one.
SHAPES = {
    "cpu": ((1024, 1024, 512), (2048, 2048, 512), (4096, 2048, 512), (2048, 2048, 2048)),
    "cuda": ((4096, 4096, 512), (8192, 8192, 1024), (8192, 8192, 8192)),
}
DTYPES = ("float32", "bfloat16")
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # far beyond the last cache


@dataclass(frozen=True)
class Calibration:
    """Best rates seen: FLOP/s of a @ b.T by dtype, bytes/s (read + written) of a copy."""

    gemm: dict[str, float]
    copy: float

    def rate(self, dtype: str) -> float:
        """FLOP/s open to inputs of `dtype`: where fp32 is faster, they may be converted."""
        return max(self.gemm[dtype], self.gemm["float32"])

    def limit(self, dtype: str, flops: float, size: float) -> float:
        """The least time, in seconds, of that much work."""
        return max(flops / self.rate(dtype), size / self.copy)


def clock(call: Callable[[], object], device: str) -> float:
    """Seconds of one call, to its last kernel's end."""
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _best(call: Callable[[], object], device: str, seconds: float) -> float:
    call()
    times = [clock(call, device)]
    while sum(times) < seconds and len(times) < 50:
        times.append(clock(call, device))
    return min(times)


def calibrate(device: str, seconds: float, shapes: int | None = None) -> Calibration:
    """Measure `device`; `seconds` bounds the repetitions of each of the first `shapes` shapes."""
    gemm = {}
    for dtype in DTYPES:
        rates = []
        for m, n, k in SHAPES[device][:shapes]:
            a = torch.randn(m, k, device=device).to(getattr(torch, dtype))
            b = torch.randn(n, k, device=device).to(a.dtype)
            rates.append(2 * m * n * k / _best(lambda a=a, b=b: a @ b.T, device, seconds))  # type: ignore[misc]
        gemm[dtype] = max(rates)
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    took = _best(lambda: target.copy_(source), device, seconds)
    return Calibration(gemm, 2 * COPY_BYTES[device] / took)
