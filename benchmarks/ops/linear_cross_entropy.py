"""Linear cross-entropy against dense, compacted and chunked PyTorch, and two GPU packages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import peers
from benchmarks.case import MODES, OURS, Case, Plan, Suite, Variant
from benchmarks.harness import Bench
from benchmarks.reference import on_reference
from mmkern import ops

ROWS = 512  # rows in a chunk
SMOLLM2 = {"M": 2048, "H": 576, "V": 49_152}  # 8 x 256 tokens
LLAMA = {"M": 1024, "H": 1024, "V": 32_000}
FROZEN = "frozen"  # a distribution: 80 % ignored, and the weight wants no gradient
IGNORED = {"0% ignored": 0.0, "80% ignored": 0.8, FROZEN: 0.8}


def cases(plan: Plan) -> Iterator[Case]:
    """The short form, and sizes from the command line as M, take the first shape alone."""
    shapes = [SMOLLM2, LLAMA]
    if plan.sizes or plan.short:
        shapes = [{**SMOLLM2, "M": m} for m in plan.sizes or (256,)]
    elif plan.device == "cuda":
        shapes = [{"M": 16_384, "H": 4096, "V": 32_000}, {"M": 16_384, "H": 4096, "V": 128_256}]
    for dtype, shape, share in product(("float32", "bfloat16"), shapes, IGNORED):
        for mode in MODES if shape is SMOLLM2 and share == "80% ignored" else ("fwd+bwd",):
            yield Case(shape, dtype, mode, distribution=share, device=plan.device)


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden rows and a head whose logits have a standard deviation of 3; labels."""
    g = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)
    rows, width, vocabulary = case["M"], case["H"], case["V"]
    hidden = torch.randn(rows, width, generator=g).to(case.device, dtype)
    weight = (torch.randn(vocabulary, width, generator=g) * 3 / width**0.5).to(case.device, dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=g)
    labels[torch.rand(rows, generator=g) < IGNORED[case.distribution]] = -100
    weight.requires_grad_(case.distribution != FROZEN)
    return hidden.requires_grad_(), weight, labels.to(case.device)


def dense(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """All logits, in fp32 before the softmax."""
    return F.cross_entropy(peers.accumulated(F.linear(hidden, weight)), labels)


def compacted(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Labelled rows first: on a GPU the mask waits for the device."""
    labelled = labels != -100
    return F.cross_entropy(F.linear(hidden[labelled], weight), labels[labelled])


def _chunk(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = peers.accumulated(F.linear(hidden, weight))
    return F.cross_entropy(logits, labels, reduction="sum")


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Plain PyTorch in little memory: chunks of all rows, recomputed in the backward."""
    total = torch.zeros((), device=hidden.device)
    for h, y in zip(hidden.split(ROWS), labels.split(ROWS), strict=True):
        total = total + checkpoint(
            _chunk, h, weight, y, use_reentrant=False, preserve_rng_state=False
        )
    return total / (labels != -100).sum()


def exact(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return compacted(hidden, weight, labels)


def labelled(case: Case) -> int:
    return int((inputs(replace(case, device="cpu"))[2] != -100).sum())


def flops(case: Case) -> int:
    """Of the labelled rows: one product forward, one a gradient."""
    gradients = (case.mode == "fwd+bwd") * (1 if case.distribution == FROZEN else 2)
    return 2 * (1 + gradients) * labelled(case) * case["H"] * case["V"]


def fewer(case: Case) -> Case:
    """The same with at most 128 rows and 4096 classes."""
    shape = {"M": min(case["M"], 128), "V": min(case["V"], 4096)}
    return replace(case, shape={**case.shape, **shape})


def logits_bytes(case: Case, copies: int = 4) -> float:
    return 4.0 * copies * case["M"] * case["V"]


SUITE = Suite(
    op="linear_cross_entropy",
    module=__name__,
    cases=cases,
    variants={
        OURS: Variant(lambda: ops.linear_cross_entropy),
        "reference": Variant(partial(on_reference, "linear_cross_entropy", ("fwd", "bwd"))),
        "dense": Variant(lambda: dense, kept=logits_bytes),
        "compacted": Variant(lambda: compacted, kept=logits_bytes),
        "chunked": Variant(lambda: chunked),
        "compiled": Variant(partial(peers.compiled, dense), kept=logits_bytes, compiles=True),
        "liger": Variant(peers.liger, devices=("cuda",)),
        "cce": Variant(partial(peers.labelled_cross_entropy, "cce"), devices=("cuda",)),
        "cce_exact": Variant(partial(peers.labelled_cross_entropy, "cce_exact"), devices=("cuda",)),
    },
    inputs=inputs,
    names=("hidden", "weight"),
    exact=exact,
    small=fewer,
    flops=flops,
)


def test_linear_cross_entropy(case: Case, bench: Bench) -> None:
    """Time, memory and error of every variant at one case."""
    bench(SUITE, case)
