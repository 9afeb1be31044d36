"""Attention under row intervals against SDPA with the dense mask, eager PyTorch and GPU peers."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import MODES, OURS, Case, Loss, Plan, Suite, UnavailableError, Variant
from benchmarks.harness import Bench
from benchmarks.reference import on_reference
from mmkern import ops
from mmkern.layout import RowIntervals

QUERIES = 32
# What a case attends to: kinds of masks (with text lengths from a quarter to all slots), dropout,
# or several samples that read one image.
MATCHING, CAUSAL, DROPOUT = "matching", "generation", "generation, dropout 0.1"
ALL, READERS = "all keys", "128 readers of one image"
SHAPES = [
    ((64, 12, 64, 64, 64), MATCHING),
    ((64, 12, 64, 64, 64), CAUSAL),
    ((64, 12, 64, 64, 64), DROPOUT),
    ((64, 12, 32, 257, 64), ALL),
    ((8, 12, 544, 544, 64), CAUSAL),
    ((8, 16, 257, 257, 88), ALL),  # ViT-g
    ((32, 12, 160, 160, 64), MATCHING),  # InstructBLIP's Q-Former
    ((128, 12, 32, 257, 64), READERS),  # re-ranking
]
SIZES = ("B", "H", "Lq", "Lk", "E")


def cases(plan: Plan) -> Iterator[Case]:
    """The short form, and sizes from the command line as B, take 64 x 64 alone."""
    for dtype in ("float32", "bfloat16"):
        if plan.sizes or plan.short:
            for batch in plan.sizes or (8,):
                shape = dict(zip(SIZES, (batch, 12, 64, 64, 64), strict=True))
                yield Case(shape, dtype, "fwd+bwd", distribution=DROPOUT, device=plan.device)
            continue
        for sizes, kind in SHAPES:
            shape = dict(zip(SIZES, sizes, strict=True))
            for mode in MODES if kind in (MATCHING, READERS) else ("fwd+bwd",):
                yield Case(shape, dtype, mode, distribution=kind, device=plan.device)


def inputs(case: Case) -> tuple[Any, ...]:
    """q, k, v as a projection leaves them, the mask, its dense form, kv_row, dropout."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, queries, keys, width = (case[size] for size in SIZES)
    rows = 1 if case.distribution == READERS else batch

    def projected(samples: int, length: int) -> Tensor:
        x = torch.randn(samples, length, heads, width, generator=generator)
        return x.to(case.device, getattr(torch, case.dtype)).transpose(1, 2).requires_grad_()

    operands = projected(batch, queries), projected(rows, keys), projected(rows, keys)
    mask = kv_row = None
    if case.distribution in (MATCHING, CAUSAL, DROPOUT):
        text = keys - QUERIES
        lengths = torch.randint(text // 4, text + 1, (batch,), generator=generator)
        make = RowIntervals.bidirectional
        if case.distribution != MATCHING:
            make = RowIntervals.multimodal_causal
        mask = make(QUERIES, text, lengths).to(case.device)
    if case.distribution == READERS:
        kv_row = torch.zeros(batch, dtype=torch.int32, device=case.device)
    dense = None if mask is None else mask.to_dense()[:, None]
    return *operands, mask, dense, kv_row, 0.1 if case.distribution == DROPOUT else 0.0


def ours(q: Tensor, k: Tensor, v: Tensor, mask: RowIntervals | None, dense: Tensor | None,
         kv_row: Tensor | None, dropout_p: float) -> Tensor:  # fmt: skip
    return ops.attention(q, k, v, mask, kv_row=kv_row, dropout_p=dropout_p)


def _read(x: Tensor, kv_row: Tensor | None) -> Tensor:
    return x if kv_row is None else x.expand(len(kv_row), -1, -1, -1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: RowIntervals | None, dense: Tensor | None,
         kv_row: Tensor | None, dropout_p: float) -> Tensor:  # fmt: skip
    """torch's own, with a bool mask [B, 1, Lq, Lk]."""
    k, v = _read(k, kv_row), _read(v, kv_row)
    return F.scaled_dot_product_attention(q, k, v, dense, dropout_p=dropout_p)


def eager(q: Tensor, k: Tensor, v: Tensor, mask: RowIntervals | None, dense: Tensor | None,
          kv_row: Tensor | None, dropout_p: float) -> Tensor:  # fmt: skip
    """The formula in the inputs' dtype, as BERT's code has it."""
    scores = q @ _read(k, kv_row).mT / math.sqrt(q.shape[-1])
    if dense is not None:
        scores = scores.masked_fill(~dense, -torch.inf)
    return F.dropout(scores.softmax(-1), dropout_p) @ _read(v, kv_row)


def flex() -> Loss:
    """Compiled FlexAttention; it has no dropout. The mask is made into blocks once an input."""
    module = importlib.import_module("torch.nn.attention.flex_attention")
    attend = torch.compile(module.flex_attention, dynamic=False)

    @functools.lru_cache(maxsize=1)
    def blocks(mask: RowIntervals, batch: int, keys: int) -> Any:
        rows = mask.intervals

        def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            a0, a1, b0, b1 = (rows[b, i, n] for n in range(4))
            return ((a0 <= j) & (j < a1)) | ((b0 <= j) & (j < b1))

        return module.create_block_mask(allowed, batch, None, rows.shape[1], keys, rows.device)

    def call(q: Tensor, k: Tensor, v: Tensor, mask: RowIntervals | None, dense: Tensor | None,
             kv_row: Tensor | None, dropout_p: float) -> Tensor:  # fmt: skip
        if dropout_p:
            raise UnavailableError("FlexAttention has no dropout")
        block_mask = None if mask is None else blocks(mask, q.shape[0], k.shape[2])
        out: Tensor = attend(q, _read(k, kv_row), _read(v, kv_row), block_mask=block_mask)
        return out

    return call


def flash_attn() -> Loss:
    """flash-attn where every row sees every key: its fixed-length call."""
    try:
        attend = importlib.import_module("flash_attn").flash_attn_func
    except ImportError as error:
        raise UnavailableError(f"flash-attn: {error}") from None

    def call(q: Tensor, k: Tensor, v: Tensor, mask: RowIntervals | None, dense: Tensor | None,
             kv_row: Tensor | None, dropout_p: float) -> Tensor:  # fmt: skip
        if mask is not None:
            raise UnavailableError("flash-attn takes no mask of this kind")
        k, v = _read(k, kv_row), _read(v, kv_row)
        out: Tensor = attend(*(x.transpose(1, 2) for x in (q, k, v)), dropout_p=dropout_p)
        return out.transpose(1, 2)

    return call


def seen(case: Case) -> int:
    """Pairs of a row and a key that the mask allows, over the batch."""
    dense = inputs(replace(case, device="cpu", dtype="bfloat16"))[4]
    if dense is None:
        return case["B"] * case["Lq"] * case["Lk"]
    return int(dense.sum())


def flops(case: Case) -> int:
    """Of the allowed pairs: two products forward, five backward."""
    products = 2 if case.mode == "fwd" else 7
    return 2 * products * seen(case) * case["H"] * case["E"]


def read_bytes(case: Case) -> int:
    """Inputs and the output's gradient read, the output and gradients written."""
    batch, heads, queries, keys, width = (case[size] for size in SIZES)
    rows = 1 if case.distribution == READERS else batch
    small, large = batch * queries, 2 * rows * keys
    once = small + large + small
    numbers = once if case.mode == "fwd" else once + 2 * (small + large) + small
    return numbers * heads * width * getattr(torch, case.dtype).itemsize


def fewer(case: Case) -> Case:
    """The same with at most 2 samples."""
    return replace(case, shape={**case.shape, "B": min(case["B"], 2)})


def weight_bytes(case: Case, copies: int = 4) -> float:
    return float(copies * 4 * case["B"] * case["H"] * case["Lq"] * case["Lk"])


SUITE = Suite(
    op="attention",
    module=__name__,
    cases=cases,
    variants={
        OURS: Variant(lambda: ours),
        "reference": Variant(partial(on_reference, "attention", ("fwd", "bwd"), ours)),
        "sdpa": Variant(lambda: sdpa),
        "eager": Variant(lambda: eager, kept=weight_bytes),
        "flex": Variant(flex, devices=("cuda",), compiles=True),
        "flash-attn": Variant(flash_attn, devices=("cuda",)),
    },
    inputs=inputs,
    names=("q", "k", "v"),
    exact=eager,
    small=fewer,
    flops=flops,
    read_bytes=read_bytes,
    drawn=lambda case: case.distribution == DROPOUT,
)


def test_attention(case: Case, bench: Bench) -> None:
    """Time, memory and error of every variant at one case."""
    bench(SUITE, case)
