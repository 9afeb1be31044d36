"""One case from inputs to rows: check, time in turn, measure memory, record."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import rows, tables
from benchmarks.calibration import Calibration, clock
from benchmarks.case import (
    OURS,
    Case,
    Loss,
    Plan,
    Suite,
    UnavailableError,
    compulsory_bytes,
    errors,
    exact_outputs,
    flops,
    release,
    step,
)
from benchmarks.memory import cuda_peak_bytes, peak_bytes
from benchmarks.rows import Provenance, Row
from benchmarks.timing import interleave, quantiles
from mmkern import _library

Bench = Callable[[Suite, Case], None]


@dataclass
class Session:
    """What all cases of one pytest run share."""

    plan: Plan
    calibration: Calibration
    provenance: Provenance
    seconds: float  # for the rounds of a case
    longest: float  # a peer whose matrix products alone take longer, in seconds, is left out
    results: Path | None
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def run(self, suite: Suite, case: Case, benchmark: Any) -> None:
        """Measure every variant of a case; `benchmark` is pytest-benchmark's fixture."""
        inputs = suite.inputs(case)
        losses = self._losses(suite, case)
        found, first, gradient_bytes = self._check(suite, case, losses, inputs)
        benchmark.group = f"{suite.op} {case.mode}"
        samples = interleave(
            {name: _call(loss, inputs, case.mode) for name, loss in losses.items()},
            first,
            ours=OURS,
            device=case.device,
            seconds=self.seconds,
            pedantic=benchmark.pedantic,
        )
        peaks: dict[str, int | None] = {}
        for name, loss in losses.items():
            release()
            if case.device == "cuda":
                peaks[name] = cuda_peak_bytes(loss, inputs, case.mode)
            else:
                peaks[name] = peak_bytes(suite.module, name, case, self.provenance.threads)
        new = [
            self._row(suite, case, name, samples[name], peaks[name], found[name], gradient_bytes)
            for name in losses
        ]
        benchmark.extra_info.update({f"{row.variant} p50 ms": row.p50_ms for row in new})
        self.rows += new
        if self.results is not None:
            for row in new:
                rows.append(self.results, row)
        release()

    def _losses(self, suite: Suite, case: Case) -> dict[str, Loss]:
        """The variants that can run here, the others noted with their reason."""
        losses = {}
        for name, variant in suite.variants.items():
            if (case.only and name not in case.only) or case.device not in variant.devices:
                continue
            why = ""
            if variant.compiles and self.plan.short:
                why = "long form only"
            elif variant.kept(case) > _memory(case.device) / 2:
                why = "what it keeps takes more than half of the memory"
            elif name != OURS and self._products(suite, case) > self.longest:
                why = f"its matrix products alone take over {self.longest:.0f} s"
            else:
                try:
                    losses[name] = variant.make()
                except UnavailableError as error:
                    why = str(error)
            if why:
                self.left_out.setdefault(f"{suite.op}: {name}: {why}", []).append(str(case))
        return losses

    def _products(self, suite: Suite, case: Case) -> float:
        """Seconds of the operator's matrix products in the features' own dtype."""
        return flops(suite, case) / self.calibration.gemm[case.dtype]

    def _check(
        self, suite: Suite, case: Case, losses: dict[str, Loss], inputs: tuple[Any, ...]
    ) -> tuple[dict[str, dict[str, float]], dict[str, float], int]:
        """Errors against fp64 and the time of a first (warm) call, by variant; gradient bytes.

        Raises:
            ValueError: ours errs more than twice as much as the worst of the others.
        """
        exact = exact_outputs(suite, case, inputs)
        found, first, gradient_bytes = {}, {}, 0
        for name, loss in list(losses.items()):
            outputs: list[Tensor] = []
            call = _call(loss, inputs, case.mode, outputs)
            try:
                first[name] = clock(call, case.device)
            except Exception as error:  # a peer that fails must not take our row with it
                if name == OURS:
                    raise
                del losses[name]
                why = f"{type(error).__name__}: {str(error)[:100]}"
                self.left_out.setdefault(f"{suite.op}: {name}: {why}", []).append(str(case))
                release()
                continue
            gradient_bytes = sum(x.nbytes for x in outputs[1:])
            floor = suite.variants[name].floor
            judged = {} if exact is None or floor else errors(outputs, exact, suite.names)
            found[name] = judged
            if case.device == "cuda" or suite.variants[name].compiles:
                first[name] = clock(call, case.device)
        others = [e for name, e in found.items() if e and name != OURS]
        if exact is not None and others:
            eps = torch.finfo(getattr(torch, case.dtype)).eps
            worst = max(max(e.values()) for e in others)
            ours = max(found[OURS].values())
            if not ours <= 2 * (worst + eps):
                raise ValueError(
                    f"{suite.op} at {case}: error {ours:.2e} against fp64, the worst of the "
                    f"others {worst:.2e}: a wrong result is not timed"
                )
        return found, first, gradient_bytes

    def _row(
        self,
        suite: Suite,
        case: Case,
        name: str,
        samples: list[float],
        peak: int | None,
        found: dict[str, float],
        gradient_bytes: int,
    ) -> Row:
        p20, p50, p80 = quantiles(samples)
        work = flops(suite, case)
        limit = self.calibration.limit(case.dtype, work, compulsory_bytes(suite, case))
        where, kernel = self.provenance, suite.kernel or f"{suite.op}_fwd"
        return Row(
            op=suite.op,
            variant=name,
            backend=_library.backend(kernel, case.device)[0] if name == OURS else "",
            mode=case.mode,
            dtype=case.dtype,
            shape=case.shape,
            distribution=case.distribution,
            p20_ms=_rounded(p20 * 1e3),
            p50_ms=_rounded(p50 * 1e3),
            p80_ms=_rounded(p80 * 1e3),
            rounds=len(samples),
            peak_bytes=peak,
            gradient_bytes=gradient_bytes,
            error=_rounded(max(found.values())) if found else None,
            errors={key: _rounded(value) for key, value in found.items()},
            sol=_rounded(limit / p50),
            tflops=_rounded(work / p50 / 1e12),
            gemm_tflops=_rounded(self.calibration.rate(case.dtype) / 1e12),
            copy_gbps=_rounded(self.calibration.copy / 1e9),
            device=where.device,
            isa=where.isa,
            threads=where.threads,
            versions=where.versions,
            commit=where.commit,
            dirty=where.dirty,
            date=rows.now(),
        )


def _call(
    loss: Loss, inputs: tuple[Any, ...], mode: str, keep: list[Tensor] | None = None
) -> Callable[[], None]:
    """A step as a call without arguments; its outputs go to `keep` or are freed."""

    def call() -> None:
        outputs = step(loss, inputs, mode)
        if keep is not None:
            keep[:] = outputs

    return call


def _memory(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def summary(session: Session, against: str) -> list[str]:
    """Lines for the terminal: every variant of every case, with its ratio to `against`."""
    best = session.calibration
    gemm = ", ".join(f"{key} {value / 1e12:.3g}" for key, value in best.gemm.items())
    where = session.provenance
    lines = [
        f"{where.device}, {where.isa}, {where.threads} threads: a @ b.T {gemm} TFLOP/s, "
        f"copy {best.copy / 1e9:.3g} GB/s",
        f"{'case':<54}{'variant':<20}{'p50 ms':>11}{'p20':>11}{'p80':>11}{'rounds':>7}"
        f"{'× ' + (against or 'peer'):>9}{'MiB':>8}{'error':>8}{'sol':>6}",
    ]
    base = {
        _of_case(row): row.p50_ms
        for row in session.rows
        if row.variant == (against or tables.against(row.op))
    }
    for row in session.rows:
        other = base.get(_of_case(row))
        ratio = f"{other / row.p50_ms:.2f}" if other else ""
        peak = f"{row.peak_bytes / 2**20:.1f}" if row.peak_bytes is not None else ""
        error = f"{row.error:.0e}" if row.error is not None else ""
        name = row.variant + (f" ({row.backend})" if row.backend else "")
        lines.append(
            f"{_of_case(row):<54}{name:<20}{row.p50_ms:>11.3f}{row.p20_ms:>11.3f}"
            f"{row.p80_ms:>11.3f}{row.rounds:>7}{ratio:>9}{peak:>8}{error:>8}{row.sol:>6.2f}"
        )
    lines += [f"left out: {what}: {' '.join(cases)}" for what, cases in session.left_out.items()]
    return lines


def _of_case(row: Row) -> str:
    size = "x".join(str(value) for value in row.shape.values())
    return f"{row.op} {row.mode} {row.dtype} {row.distribution} {size}"
