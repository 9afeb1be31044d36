"""Partial LoRA against upstream's boolean mask, index lists, a masked product, and no adapter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.case import MODES, OURS, Case, Plan, Suite, Variant
from benchmarks.harness import Bench
from mmkern import ops
from mmkern.layout import VisualSpans

SIDE = 2048  # rows, inputs and outputs on a CPU
# (inputs, outputs) of InternLM2-7B's linears; on a GPU.
LINEARS = ((4096, 6144), (4096, 4096), (4096, 14336), (14336, 4096))
RANKS = (8, 64, 256)
SHARES = (0.1, 0.5, 0.9)
EAGER = (OURS, "plain", "mask", "indices", "dense")


def cases(plan: Plan) -> Iterator[Case]:
    on_gpu = plan.device == "cuda"

    def case(
        dtype: str, rows: int, share: float, features: tuple[int, int], rank: int, mode: str
    ) -> Case:
        sizes = {"rows": rows, "visual": round(rows * share), "in": features[0], "out": features[1]}
        # Compiling takes longer than the rest of a case together: on a CPU, once a dtype and mode.
        only = () if on_gpu or (rank, share) == (256, 0.5) else EAGER
        return Case({**sizes, "rank": rank}, dtype, mode, device=plan.device, only=only)

    for dtype in ("bfloat16",) if on_gpu else ("float32", "bfloat16"):
        if plan.sizes or plan.short:
            for side in plan.sizes or (512,):
                for mode in MODES if plan.sizes else ("fwd+bwd",):
                    yield case(dtype, side, 0.5, (side, side), 8, mode)
            continue
        rows = 8192 if on_gpu else SIDE
        for features in LINEARS if on_gpu else ((SIDE, SIDE),):
            for rank in RANKS:
                for share in SHARES:
                    yield case(dtype, rows, share, features, rank, "fwd+bwd")
            for mode in MODES:
                yield case(dtype, rows, 0.0, features, 256, mode)
            yield case(dtype, rows, 0.5, features, 256, "fwd")


def inputs(case: Case) -> tuple[Any, ...]:
    """x, a frozen weight, A, B, and a run of visual rows in the middle, as a mask and as spans."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, over: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator) / over
        return values.to(case.device, getattr(torch, case.dtype))

    rows, visual, rank = case["rows"], case["visual"], case["rank"]
    start = (rows - visual) // 2
    spans = VisualSpans.from_lengths([start] * (visual > 0), [visual] * (visual > 0), (rows,))
    mask = torch.zeros(rows, dtype=torch.bool, device=case.device)
    mask[start : start + visual] = True
    return (
        normal(rows, case["in"]).requires_grad_(),
        normal(case["out"], case["in"], over=case["in"] ** 0.5),
        normal(rank, case["in"], over=case["in"] ** 0.5).requires_grad_(),
        normal(case["out"], rank, over=rank**0.5).requires_grad_(),
        mask,
        spans.to(case.device),
    )


def ours(x: Tensor, w: Tensor, a: Tensor, b: Tensor, mask: Tensor, spans: VisualSpans) -> Tensor:
    return ops.plora_linear(x, w, None, a, b, spans)


def masked(x: Tensor, w: Tensor, a: Tensor, b: Tensor, mask: Tensor, spans: VisualSpans) -> Tensor:
    """As upstream's module: rows taken out and added back by a boolean mask; without a visual row
    the adapter runs on row 0, times 0."""
    y = F.linear(x, w)
    if mask.sum() > 0:
        y[mask] += F.linear(F.linear(x[mask], a), b)
    else:
        y[:1] += F.linear(F.linear(x[:1], a), b) * 0
    return y


def indexed(x: Tensor, w: Tensor, a: Tensor, b: Tensor, mask: Tensor, spans: VisualSpans) -> Tensor:
    """The same with a list of rows that was made once: no host synchronisation."""
    seen = F.linear(F.linear(x.index_select(0, spans.rows), a), b)
    return F.linear(x, w).index_add(0, spans.rows, seen)


def dense(x: Tensor, w: Tensor, a: Tensor, b: Tensor, mask: Tensor, spans: VisualSpans) -> Tensor:
    """The adapter on every row, times the mask."""
    return F.linear(x, w) + F.linear(F.linear(x, a), b) * mask[:, None].to(x.dtype)


class _Plain(torch.autograd.Function):
    """A linear layer, with zeros for the adapters' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(w, a, b)
        return F.linear(x, w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w, a, b = ctx.saved_tensors
        return grad @ w, None, torch.zeros_like(a), torch.zeros_like(b)


def plain(x: Tensor, w: Tensor, a: Tensor, b: Tensor, mask: Tensor, spans: VisualSpans) -> Tensor:
    y: Tensor = _Plain.apply(x, w, a, b)
    return y


def small(case: Case) -> Case:
    """The same with at most 64 rows."""
    rows = min(case["rows"], 64)
    visual = min(case["visual"], rows)
    return replace(case, shape={**case.shape, "rows": rows, "visual": visual})


SUITE = Suite(
    op="plora_linear",
    module=__name__,
    cases=cases,
    variants={
        OURS: Variant(lambda: ours),
        "plain": Variant(lambda: plain, floor=True),
        "mask": Variant(lambda: masked),
        "indices": Variant(lambda: indexed),
        "dense": Variant(lambda: dense),
        "compiled": Variant(partial(peers.compiled, dense), compiles=True),
    },
    inputs=inputs,
    names=("x", "a", "b"),
    exact=dense,
    small=small,
)


def test_plora_linear(case: Case, bench: Bench) -> None:
    """Time, memory and error of every variant at one case."""
    bench(SUITE, case)
