"""Flamingo's media cross-attention against the dense-mask form of OpenFlamingo.

Text of T tokens attends to N pictures of n latents each, every segment to its own picture; pictures
stand at random places, the first at the beginning. Both forms begin with the picture that each
token belongs to. The peer makes OpenFlamingo's boolean mask [B, 1, T, N·n] and hands it to
scaled_dot_product_attention; "eager" is OpenFlamingo's own code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.case import OURS, Case, Plan, Suite, Variant
from benchmarks.harness import Bench
from mmkern import ops
from mmkern.layout import RowIntervals

IMAGES, LATENTS, HEADS, WIDTH = 6, 64, 8, 64
SIZES = ("B", "H", "T", "N", "n", "E")


def cases(plan: Plan) -> Iterator[Case]:
    for dtype in ("float32", "bfloat16"):
        for length in (256, 2048):
            shape = dict(zip(SIZES, (2, HEADS, length, IMAGES, LATENTS, WIDTH), strict=True))
            modes = ("fwd+bwd",) if plan.short else ("fwd", "fwd+bwd")
            for mode in modes:
                yield Case(shape, dtype, mode, "immediate", plan.device)
            if not plan.short:
                yield Case(shape, dtype, "fwd+bwd", "all previous", plan.device)


def inputs(case: Case) -> tuple[Any, ...]:
    """q, k, v as projections leave them, the picture of each token, the case."""
    generator = torch.Generator().manual_seed(0)

    def projected(length: int) -> Tensor:
        x = torch.randn(case["B"], length, case["H"], case["E"], generator=generator)
        return x.to(case.device, getattr(torch, case.dtype)).transpose(1, 2).requires_grad_()

    keys = case["N"] * case["n"]
    operands = projected(case["T"]), projected(keys), projected(keys)
    starts = torch.zeros(case["B"], case["T"], dtype=torch.int64)
    for row in range(case["B"]):
        places = torch.randperm(case["T"] - 1, generator=generator)[: case["N"] - 1] + 1
        starts[row, [0, *places.tolist()]] = 1
    return *operands, starts.cumsum(1).to(case.device), case


def ours(q: Tensor, k: Tensor, v: Tensor, owner: Tensor, case: Case) -> Tensor:
    mask = RowIntervals.media(
        owner, case["n"], case["N"], all_previous=case.distribution != "immediate"
    )
    return ops.attention(q, k, v, mask)


def allowed(owner: Tensor, case: Case) -> Tensor:
    """bool [B, 1, T, N·n]."""
    image = torch.arange(1, case["N"] + 1, device=owner.device).repeat_interleave(case["n"])
    own = owner[:, None, :, None]
    return (image == own) if case.distribution == "immediate" else (image <= own)


def sdpa(q: Tensor, k: Tensor, v: Tensor, owner: Tensor, case: Case) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, allowed(owner, case))


def eager(q: Tensor, k: Tensor, v: Tensor, owner: Tensor, case: Case) -> Tensor:
    """The formula in the inputs' dtype."""
    scores = q @ k.mT * case["E"] ** -0.5
    return scores.masked_fill(~allowed(owner, case), -torch.inf).softmax(-1) @ v


def seen(case: Case) -> int:
    """Pairs of a token and a latent that the mask allows, over the batch."""
    cpu = replace(case, device="cpu", dtype="bfloat16")
    return int(allowed(inputs(cpu)[3], case).sum())


def flops(case: Case) -> int:
    """Of the allowed pairs: two products forward, five backward."""
    products = 2 if case.mode == "fwd" else 7
    return 2 * products * seen(case) * case["H"] * case["E"]


def read_bytes(case: Case) -> int:
    """Inputs and the output's gradient read, the output and gradients written."""
    text, media = case["B"] * case["T"], 2 * case["B"] * case["N"] * case["n"]
    numbers = 2 * text + media
    numbers += 0 if case.mode == "fwd" else 3 * text + 2 * media
    return numbers * case["H"] * case["E"] * getattr(torch, case.dtype).itemsize


def fewer(case: Case) -> Case:
    """The same with short texts."""
    return replace(case, shape={**case.shape, "T": min(case["T"], 256), "B": 1})


def weight_bytes(case: Case, copies: int = 4) -> float:
    keys = case["N"] * case["n"]
    return float(copies * 4 * case["B"] * case["H"] * case["T"] * keys)


SUITE = Suite(
    op="flamingo",
    module=__name__,
    cases=cases,
    variants={
        OURS: Variant(lambda: ours),
        "sdpa": Variant(lambda: sdpa),
        "eager": Variant(lambda: eager, kept=weight_bytes),
    },
    inputs=inputs,
    names=("q", "k", "v"),
    exact=eager,
    small=fewer,
    flops=flops,
    read_bytes=read_bytes,
    kernel="attention_fwd",
)


def test_flamingo(case: Case, bench: Bench) -> None:
    """Time, memory and error of every variant at one case."""
    bench(SUITE, case)
