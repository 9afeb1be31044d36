"""Attention under row intervals in Triton: no mask tensor, no scores in memory, counted dropout.

At the sizes of a Q-Former the bytes decide. A backward whose rows all fit one tile (up to 64 in 16
bit) is one program a sample and head that walks over the keys once and finishes all three
gradients. With more rows, or samples that share a K/V row (kv_row), one kernel walks over the keys
for dq and another over the rows for dk and dv. A sum has one program and one order either way.

NaN in a key reaches only rows that see it. Keys outside the hulls of a tile's intervals are not
read. Inside, 0 * NaN can occur; it shows as a sum that is not finite, and such rows alone are done
again, with the keys that they see themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkern import _triton
from mmkern._triton import (
    LN2,
    LOG2E,
    Variant,
    allowed,
    common,
    covers,
    hulls,
    inside,
    load_intervals,
    of_sample,
    row_range,
    tile_ranges,
)

_READERS: tl.constexpr = tl.constexpr(256)  # entries of kv_row searched at a time


@triton.jit
def load_rows(x, start, mask, stride, R: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
              VEC: tl.constexpr):  # fmt: skip
    """Rows start to start + R of one sample and head: [R, BE], zeros where the mask is off and past
    E. The tile's place is 64 bits, in one register; within it 32 bits do."""
    e = tl.arange(0, BE)
    offsets = (tl.arange(0, R) * stride * VEC)[:, None] + e[None, :]
    keep = mask[:, None] if E == BE else mask[:, None] & (e < E)[None, :]
    return tl.load(at(x, start, stride, VEC) + offsets, mask=keep, other=0.0)


@triton.jit
def store_rows(x, tile, start, mask, stride, R: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
               VEC: tl.constexpr):  # fmt: skip
    e = tl.arange(0, BE)
    offsets = (tl.arange(0, R) * stride * VEC)[:, None] + e[None, :]
    keep = mask[:, None] if E == BE else mask[:, None] & (e < E)[None, :]
    tl.store(at(x, start, stride, VEC) + offsets, tile.to(x.dtype.element_ty), mask=keep)


@triton.jit
def at(x, index, stride, VEC: tl.constexpr):
    return x + tl.cast(index, tl.int64) * stride * VEC


@triton.jit
def exponential(x, EXACT: tl.constexpr):
    """exp(x). Without EXACT scores come in units of log 2, which saves a product an element; with
    it the product follows the subtraction of the maximum and rounds what is then small."""
    if EXACT:
        return tl.exp2(x * LOG2E)
    else:
        return tl.exp2(x)


@triton.jit
def row_words(seed, sample, head, i):
    """The two words of rows from which their keys' draws follow (reference.py specifies them)."""
    row = i.to(tl.uint32)
    if seed is None:
        return row, row
    else:
        zero = row * 0
        k0, k1, _, _ = tl.philox(tl.load(seed), row, zero + head, zero + sample, zero)
        return k0, k1


@triton.jit
def kept(words, j, threshold):
    """Rows x keys: the weights that dropout leaves."""
    k0, k1 = words
    j = j.to(tl.uint32)[None, :]
    x = k0[:, None] ^ ((j >> 1) * 0x9E3779B9)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = ((x ^ (x >> 15)) + k1[:, None]) * 0x846CA68B
    x = x ^ (x >> 16)
    return ((x >> ((j & 1) * 16)) & 0xFFFF) >= threshold


@triton.jit
def bad_rows(sums, rows):
    """1 for the rows of a tile that hold a NaN or an infinity, else 0."""
    finite = tl.abs(sums) < float("inf")
    return tl.max(tl.where(finite, 0, 1), 1) * rows.to(tl.int32)


@triton.jit
def next_bad(bad, i, after, end):
    """The first bad row behind `after`; `end` if there is none."""
    return tl.min(tl.where((bad > 0) & (i > after), i, end), 0)


@triton.jit
def forward_step(start, acc, top, total, q_tile, k, v, seed, bounds, hull, full, words,
                 k_row, v_row, factor, threshold, BN: tl.constexpr, E: tl.constexpr,
                 BE: tl.constexpr, VEC: tl.constexpr, EXACT: tl.constexpr, ONE: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """Take keys start to start + BN into the running output, maximum and sum of each row."""
    j = start + tl.arange(0, BN)
    keys = load_rows(k, start, inside(hull, j), k_row, BN, E, BE, VEC)
    x = tl.dot(q_tile, keys.T, input_precision=PRECISION) * factor
    if full == 0:
        x = tl.where(allowed(bounds, j), x, float("-inf"))
    new_top = tl.maximum(top, tl.max(x, 1))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key yet: exp(-inf), not NaN
    p = exponential(x - safe[:, None], EXACT)
    if ONE:
        total = tl.sum(p, 1)
    else:
        shrink = exponential(top - safe, EXACT)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
    if seed is not None:
        p = tl.where(kept(words, j, threshold), p, 0.0)
    values = load_rows(v, start, inside(hull, j), v_row, BN, E, BE, VEC)
    acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def forward_tile(q_tile, k, v, seed, bounds, rows, hull, words, k_row, v_row, Lk, factor,
                 threshold, keep_scale, BM: tl.constexpr, BN: tl.constexpr, E: tl.constexpr,
                 BE: tl.constexpr, VEC: tl.constexpr, EXACT: tl.constexpr, ONE: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """Output and log-sum-exp of a tile's rows from the keys in a hull: what a row may see outside
    is missing, and what lies outside is not read."""
    acc = tl.zeros([BM, BE], dtype=tl.float32)
    top = tl.full([BM], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BM], dtype=tl.float32)
    if ONE:
        acc, top, total = forward_step(
            0, acc, top, total, q_tile, k, v, seed, bounds, hull, 0, words, k_row, v_row,
            factor, threshold, BN, E, BE, VEC, EXACT, ONE, PRECISION)  # fmt: skip
    else:
        tile, count, second, second_count = tile_ranges(hull, BN)
        all_see = common(bounds, rows, Lk)
        for t in tl.range(0, count + second_count):
            start = tl.where(t < count, tile + t, second + t - count) * BN
            acc, top, total = forward_step(
                start, acc, top, total, q_tile, k, v, seed, bounds, hull,
                covers(all_see, start, start + BN), words, k_row, v_row,
                factor, threshold, BN, E, BE, VEC, EXACT, ONE, PRECISION)  # fmt: skip
    acc = acc * (keep_scale / tl.where(total == 0, 1.0, total))[:, None]
    # -inf where no key is seen
    return acc, top + tl.log2(total) * LN2 if EXACT else (top + tl.log2(total)) * LN2


# Run-time integers that Triton must not compile for: see `_triton.SIZES`.
INTEGERS = [
    "q_sample", "q_head", "q_row", "k_sample", "k_head", "k_row", "v_sample", "v_head", "v_row",
    "out_sample", "out_head", "out_row", "grad_sample", "grad_head", "grad_row",
    "dq_sample", "dq_head", "dq_row", "dk_sample", "dk_head", "dk_row",
    "dv_sample", "dv_head", "dv_row", "mask_sample", "B", "H", "Lq", "Lk", "threshold",
]  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def attention_fwd_kernel(
    q, k, v, intervals, kv_row, seed, out, lse,
    q_sample, q_head, q_row, k_sample, k_head, k_row, v_sample, v_head, v_row,
    out_sample, out_head, out_row, mask_sample, H, Lq, Lk, factor, threshold, keep_scale,
    BM: tl.constexpr, BN: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, VEC: tl.constexpr,
    EXACT: tl.constexpr, ONE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q kᵀ) v and its log-sum-exp, BM rows of one sample and head."""
    program = tl.program_id(0)
    tiles = tl.cdiv(Lq, BM)
    first = program % tiles * BM
    head = program // tiles % H
    sample = program // tiles // H
    source = sample if kv_row is None else tl.load(kv_row + sample)
    q = at(at(q, sample, q_sample, VEC), head, q_head, VEC)
    k = at(at(k, source, k_sample, VEC), head, k_head, VEC)
    v = at(at(v, source, v_sample, VEC), head, v_head, VEC)
    out = at(at(out, sample, out_sample, VEC), head, out_head, VEC)
    mask = of_sample(intervals, sample, mask_sample)
    i = first + tl.arange(0, BM)
    rows = i < Lq
    bounds = load_intervals(mask, i, Lq, Lk)
    words = row_words(seed, sample, head, i)
    q_tile = load_rows(q, first, rows, q_row, BM, E, BE, VEC)
    acc, logarithm = forward_tile(
        q_tile, k, v, seed, bounds, rows, hulls(bounds, Lk), words, k_row, v_row, Lk, factor,
        threshold, keep_scale, BM, BN, E, BE, VEC, EXACT, ONE, PRECISION)  # fmt: skip
    tl.store(lse + (tl.cast(sample, tl.int64) * H + head) * Lq + i, logarithm, mask=rows)
    bad = bad_rows(acc, rows)
    store_rows(out, acc, first, rows & (bad == 0), out_row, BM, E, BE, VEC)
    r = next_bad(bad, i, -1, Lq)
    while r < Lq:
        hull = load_intervals(mask, r, Lq, Lk)
        acc, logarithm = forward_tile(
            q_tile, k, v, seed, bounds, rows, hull, words, k_row, v_row, Lk, factor,
            threshold, keep_scale, BM, BN, E, BE, VEC, EXACT, ONE, PRECISION)  # fmt: skip
        store_rows(out, acc, first, i == r, out_row, BM, E, BE, VEC)
        r = next_bad(bad, i, r, Lq)


@triton.jit
def weights(keys, values, q_tile, grad_tile, top, seed, words, j, factor, threshold, keep_scale,
            EXACT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Of rows x keys, [BM, BN]: the softmax weights, those after dropout, and the gradient of the
    former.

    Not the transpose, although dk and dv want that: a thread holds two rows of a product, and many
    columns, so what belongs to rows (top, delta, intervals, words of dropout) costs few registers.
    """
    x = tl.dot(q_tile, keys.T, input_precision=PRECISION) * factor
    p = exponential(x - top[:, None], EXACT)
    dp = tl.dot(grad_tile, values.T, input_precision=PRECISION)
    dropped = p
    if seed is not None:
        keep = kept(words, j, threshold)
        dp = tl.where(keep, dp * keep_scale, 0.0)
        dropped = tl.where(keep, p, 0.0)
    return p, dropped, dp


@triton.jit
def load_top(lse, i, rows, EXACT: tl.constexpr):
    """Rows' log-sum-exps in the unit of scores; +inf, which makes every weight 0, for rows that see
    no key and rows past the last."""
    top = tl.load(lse + i, mask=rows, other=float("inf"))
    top = tl.where(top == float("-inf"), float("inf"), top)
    if EXACT:
        return top
    else:
        return top * LOG2E


@triton.jit
def first_reader(kv_row, row, B):
    """The first sample that reads K/V row `row`: the row's own without kv_row."""
    if kv_row is None:
        return row
    else:
        return next_reader(kv_row, row, 0, B)


@triton.jit
def next_reader(kv_row, row, start, B):
    """The first sample from `start` on that reads K/V row `row`; B if none does. Found by search:
    sorting kv_row would take several launches."""
    found = B
    if kv_row is not None:
        start = tl.cast(start, tl.int32)
        while (start < B) & (found == B):
            b = start + tl.arange(0, _READERS)
            rows = tl.load(kv_row + b, mask=b < B, other=-1)
            found = tl.min(tl.where(rows == row, b, B), 0)
            start += _READERS
    return found


@triton.jit
def backward_step(start, dq_tile, delta, q_tile, grad_tile, k, v, dk, dv, seed, top, bounds, hull,
                  full, words, k_row, v_row, dk_row, dv_row, Lk, scale, factor, threshold,
                  keep_scale, BN: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
                  VEC: tl.constexpr, EXACT: tl.constexpr, ONE: tl.constexpr, WHOLE: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """Add what keys start to start + BN give to dq; WHOLE: store their dk and dv. ONE: these are
    all keys, and delta is summed here."""
    j = start + tl.arange(0, BN)
    keys = load_rows(k, start, inside(hull, j), k_row, BN, E, BE, VEC)
    values = load_rows(v, start, inside(hull, j), v_row, BN, E, BE, VEC)
    p, dropped, dp = weights(keys, values, q_tile, grad_tile, top, seed, words, j, factor,
                             threshold, keep_scale, EXACT, PRECISION)  # fmt: skip
    if ONE:
        delta = tl.sum(tl.where(allowed(bounds, j), p * dp, 0.0), 1)
    ds = p * (dp - delta[:, None])
    if full == 0:
        see = allowed(bounds, j)
        dropped = tl.where(see, dropped, 0.0)
        ds = tl.where(see, ds, 0.0)
    ds = ds.to(keys.dtype)
    dq_tile = tl.dot(ds, keys, dq_tile, input_precision=PRECISION)
    if WHOLE:
        dropped = dropped.to(keys.dtype)
        dv_tile = tl.dot(dropped.T, grad_tile, input_precision=PRECISION) * keep_scale
        store_rows(dv, dv_tile, start, j < Lk, dv_row, BN, E, BE, VEC)
        dk_tile = tl.dot(ds.T, q_tile, input_precision=PRECISION) * scale
        store_rows(dk, dk_tile, start, j < Lk, dk_row, BN, E, BE, VEC)
    return dq_tile, delta


@triton.jit
def backward_tile(q_tile, grad_tile, k, v, dk, dv, seed, top, delta, bounds, rows, hull, words,
                  k_row, v_row, dk_row, dv_row, Lk, scale, factor, threshold, keep_scale,
                  BM: tl.constexpr, BN: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
                  VEC: tl.constexpr, EXACT: tl.constexpr, ONE: tl.constexpr,
                  WHOLE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dq and delta of a tile's rows from the keys in a hull; WHOLE: dk and dv are stored."""
    dq_tile = tl.zeros([BM, BE], dtype=tl.float32)
    if ONE:
        dq_tile, delta = backward_step(
            0, dq_tile, delta, q_tile, grad_tile, k, v, dk, dv, seed, top, bounds, hull, 0, words,
            k_row, v_row, dk_row, dv_row, Lk, scale, factor, threshold, keep_scale,
            BN, E, BE, VEC, EXACT, ONE, WHOLE, PRECISION)  # fmt: skip
    else:
        all_see = common(bounds, rows, Lk)
        tile, count, second, second_count = tile_ranges(hull, BN)
        if EXACT:
            for t in tl.range(0, count + second_count):
                start = tl.where(t < count, tile + t, second + t - count) * BN
                j = start + tl.arange(0, BN)
                keys = load_rows(k, start, inside(hull, j), k_row, BN, E, BE, VEC)
                values = load_rows(v, start, inside(hull, j), v_row, BN, E, BE, VEC)
                p, _, dp = weights(keys, values, q_tile, grad_tile, top, seed, words, j, factor,
                                   threshold, keep_scale, EXACT, PRECISION)  # fmt: skip
                delta += tl.sum(tl.where(allowed(bounds, j), p * dp, 0.0), 1)
        if WHOLE:  # every key gets its gradients, if only zeros
            tile, count, second, second_count = 0, tl.cdiv(Lk, BN), 0, 0
        for t in tl.range(0, count + second_count):
            start = tl.where(t < count, tile + t, second + t - count) * BN
            dq_tile, delta = backward_step(
                start, dq_tile, delta, q_tile, grad_tile, k, v, dk, dv, seed, top, bounds, hull,
                covers(all_see, start, start + BN), words, k_row, v_row, dk_row, dv_row, Lk,
                scale, factor, threshold, keep_scale, BN, E, BE, VEC, EXACT, ONE, WHOLE,
                PRECISION)  # fmt: skip
    return dq_tile * scale, delta


@triton.jit(do_not_specialize=INTEGERS)
def attention_bwd_rows_kernel(
    q, k, v, out, grad, lse, intervals, kv_row, seed, dq, dk, dv, deltas,
    q_sample, q_head, q_row, k_sample, k_head, k_row, v_sample, v_head, v_row,
    out_sample, out_head, out_row, grad_sample, grad_head, grad_row,
    dq_sample, dq_head, dq_row, dk_sample, dk_head, dk_row, dv_sample, dv_head, dv_row,
    mask_sample, H, Lq, Lk, scale, factor, threshold, keep_scale,
    BM: tl.constexpr, BN: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, VEC: tl.constexpr,
    EXACT: tl.constexpr, ONE: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BM rows of one sample and head, and delta = Σ P dP for the other kernel. WHOLE, where
    these are all the rows that read the keys: dk and dv as well, and no delta.

    delta is <grad, out>, at the price of its rounding. Where one tile holds all keys (ONE) it is
    the sum itself and `out` is not read; EXACT takes a pass of its own for it, as in rows that see
    few keys the scores' gradient cancels."""
    program = tl.program_id(0)
    tiles = tl.cdiv(Lq, BM)
    first = program % tiles * BM
    head = program // tiles % H
    sample = program // tiles // H
    source = sample if kv_row is None else tl.load(kv_row + sample)
    q = at(at(q, sample, q_sample, VEC), head, q_head, VEC)
    k = at(at(k, source, k_sample, VEC), head, k_head, VEC)
    v = at(at(v, source, v_sample, VEC), head, v_head, VEC)
    out = at(at(out, sample, out_sample, VEC), head, out_head, VEC)
    grad = at(at(grad, sample, grad_sample, VEC), head, grad_head, VEC)
    dq = at(at(dq, sample, dq_sample, VEC), head, dq_head, VEC)
    dk = at(at(dk, sample, dk_sample, VEC), head, dk_head, VEC)
    dv = at(at(dv, sample, dv_sample, VEC), head, dv_head, VEC)
    mask = of_sample(intervals, sample, mask_sample)
    i = first + tl.arange(0, BM)
    rows = i < Lq
    bounds = load_intervals(mask, i, Lq, Lk)
    words = row_words(seed, sample, head, i)
    q_tile = load_rows(q, first, rows, q_row, BM, E, BE, VEC)
    grad_tile = load_rows(grad, first, rows, grad_row, BM, E, BE, VEC)
    start_delta = tl.zeros([BM], dtype=tl.float32)
    if not (ONE or EXACT):
        out_tile = load_rows(out, first, rows, out_row, BM, E, BE, VEC)
        start_delta = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    statistics = (tl.cast(sample, tl.int64) * H + head) * Lq
    top = load_top(lse + statistics, i, rows, EXACT)
    dq_tile, delta = backward_tile(
        q_tile, grad_tile, k, v, dk, dv, seed, top, start_delta, bounds, rows, hulls(bounds, Lk),
        words, k_row, v_row, dk_row, dv_row, Lk, scale, factor, threshold, keep_scale,
        BM, BN, E, BE, VEC, EXACT, ONE, WHOLE, PRECISION)  # fmt: skip
    if not WHOLE:
        tl.store(deltas + statistics + i, delta, mask=rows)
    bad = bad_rows(dq_tile, rows)
    store_rows(dq, dq_tile, first, rows & (bad == 0), dq_row, BM, E, BE, VEC)
    r = next_bad(bad, i, -1, Lq)
    while r < Lq:
        hull = load_intervals(mask, r, Lq, Lk)
        dq_tile, delta = backward_tile(
            q_tile, grad_tile, k, v, dk, dv, seed, top, start_delta, bounds, rows, hull, words,
            k_row, v_row, dk_row, dv_row, Lk, scale, factor, threshold, keep_scale,
            BM, BN, E, BE, VEC, EXACT, ONE, False, PRECISION)  # fmt: skip
        store_rows(dq, dq_tile, first, i == r, dq_row, BM, E, BE, VEC)
        r = next_bad(bad, i, r, Lq)


@triton.jit(do_not_specialize=INTEGERS)
def attention_bwd_keys_kernel(
    q, k, v, grad, lse, deltas, intervals, kv_row, seed, dk, dv,
    q_sample, q_head, q_row, k_sample, k_head, k_row, v_sample, v_head, v_row,
    grad_sample, grad_head, grad_row, dk_sample, dk_head, dk_row, dv_sample, dv_head, dv_row,
    mask_sample, B, H, Lq, Lk, scale, factor, threshold, keep_scale,
    BM: tl.constexpr, BN: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, VEC: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN keys of one K/V row and head, summed over the samples that read it."""
    program = tl.program_id(0)
    tiles = tl.cdiv(Lk, BN)
    start = program % tiles * BN
    head = program // tiles % H
    row = program // tiles // H
    q = at(q, head, q_head, VEC)
    grad = at(grad, head, grad_head, VEC)
    k = at(at(k, row, k_sample, VEC), head, k_head, VEC)
    v = at(at(v, row, v_sample, VEC), head, v_head, VEC)
    dk = at(at(dk, row, dk_sample, VEC), head, dk_head, VEC)
    dv = at(at(dv, row, dv_sample, VEC), head, dv_head, VEC)
    j = start + tl.arange(0, BN)
    valid = j < Lk
    keys = load_rows(k, start, valid, k_row, BN, E, BE, VEC)
    values = load_rows(v, start, valid, v_row, BN, E, BE, VEC)
    dk_tile = tl.zeros([BN, BE], dtype=tl.float32)
    dv_tile = tl.zeros([BN, BE], dtype=tl.float32)

    sample = first_reader(kv_row, row, B)
    while sample < B:
        mask = of_sample(intervals, sample, mask_sample)
        rows_q = at(q, sample, q_sample, VEC)
        rows_grad = at(grad, sample, grad_sample, VEC)
        statistics = (tl.cast(sample, tl.int64) * H + head) * Lq
        low, high = row_range(mask, start, start + BN, Lq, Lk)
        for first in tl.range(low, high, BM):
            i = first + tl.arange(0, BM)
            rows = i < high
            bounds = load_intervals(mask, i, Lq, Lk)
            q_tile = load_rows(rows_q, first, rows, q_row, BM, E, BE, VEC)
            grad_tile = load_rows(rows_grad, first, rows, grad_row, BM, E, BE, VEC)
            top = load_top(lse + statistics, i, rows, EXACT)
            delta = tl.load(deltas + statistics + i, mask=rows, other=0.0)
            words = row_words(seed, sample, head, i)
            p, dropped, dp = weights(keys, values, q_tile, grad_tile, top, seed, words, j, factor,
                                     threshold, keep_scale, EXACT, PRECISION)  # fmt: skip
            ds = p * (dp - delta[:, None])
            if intervals is not None:
                full = covers(bounds, start, start + BN) | (i >= high)
                if tl.min(full.to(tl.int32), 0) == 0:
                    see = allowed(bounds, j)
                    dropped = tl.where(see, dropped, 0.0)
                    ds = tl.where(see, ds, 0.0)
            dropped, ds = dropped.to(keys.dtype), ds.to(keys.dtype)
            dv_tile = tl.dot(dropped.T, grad_tile, dv_tile, input_precision=PRECISION)
            dk_tile = tl.dot(ds.T, q_tile, dk_tile, input_precision=PRECISION)
        sample = next_reader(kv_row, row, sample + 1, B)

    dk_tile *= scale
    dv_tile *= keep_scale
    store_rows(dk, dk_tile, start, valid, dk_row, BN, E, BE, VEC)
    store_rows(dv, dv_tile, start, valid, dv_row, BN, E, BE, VEC)


@dataclass(frozen=True)
class Config:
    """Tile of a kernel: block_m rows and block_n keys."""

    block_m: int
    block_n: int
    warps: int
    stages: int = 2

    @property
    def name(self) -> str:
        return f"{self.block_m}x{self.block_n}"

    def constants(self, width: int, dtype: torch.dtype) -> dict[str, object]:
        """The compile-time arguments that every kernel here takes but for VEC."""
        return {
            "BM": self.block_m,
            "BN": self.block_n,
            "E": width,
            "BE": max(16, triton.next_power_of_2(width)),
            "EXACT": dtype == torch.float32,
            "PRECISION": "ieee" if dtype == torch.float32 else "tf32",  # TF32 has 10 bits
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


@dataclass(frozen=True)
class Configs:
    """The tiles for one dtype and head width; those of a list by rising number of rows."""

    forward: tuple[Config, ...]
    whole: tuple[Config, ...]  # backward in one program, for up to block_m rows
    rows: tuple[Config, ...]  # backward in two kernels: dq,
    keys: Config  # and dk, dv


_CONFIGS = {  # by 16 bit or not, and the head width up to which they serve
    (True, 64): Configs(
        forward=(Config(32, 64, 4), Config(64, 64, 4), Config(128, 64, 8)),
        whole=(Config(32, 32, 4), Config(64, 32, 8)),
        rows=(Config(32, 64, 4), Config(64, 64, 8), Config(128, 64, 8)),
        keys=Config(64, 64, 8),
    ),
    (True, 128): Configs(
        forward=(Config(32, 32, 4), Config(64, 64, 8)),
        whole=(Config(32, 32, 4),),
        rows=(Config(64, 32, 8),),
        keys=Config(32, 32, 8),
    ),
    (False, 64): Configs(
        forward=(Config(32, 32, 4),),
        whole=(Config(32, 16, 4),),
        rows=(Config(32, 16, 4),),
        keys=Config(32, 16, 4),
    ),
    (False, 128): Configs(
        forward=(Config(16, 16, 4),),
        whole=(Config(16, 16, 4),),
        rows=(Config(16, 16, 4),),
        keys=Config(16, 16, 4),
    ),
}
_MANY_ROWS = 256  # from here on tiles of 128 rows, which read keys half as often, are filled enough


def configs(arch: int, width: int, dtype: torch.dtype) -> Configs:
    """The tiles for an architecture, head width and dtype."""
    chosen = _CONFIGS[dtype != torch.float32, 64 if width <= 64 else 128]
    if chosen.keys.block_n == 64 and not 90 <= arch < 120:  # mma.sync's operands take registers
        return replace(chosen, keys=Config(64, 32, 8))
    return chosen


def pick(choices: tuple[Config, ...], queries: int) -> Config:
    """The lowest tile that holds all rows; for more rows the highest that they fill well."""
    choices = tuple(c for c in choices if c.block_m <= 64 or queries > _MANY_ROWS)
    return next((c for c in choices if queries <= c.block_m), choices[-1])


@_triton.launcher
def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, intervals: Tensor | None, kv_row: Tensor | None,
    seed: Tensor | None, dropout_p: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The contract of `reference.attention_fwd`. fp64 and head widths outside 16 to 128 raise
    NotImplementedError."""
    batch, heads, queries, width = q.shape
    _check_width("attention_fwd", width)
    out = q.new_empty(batch, queries, heads, width).transpose(1, 2)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    config = pick(configs(_triton.capability(q), width, q.dtype).forward, queries)
    attention_fwd_kernel[(batch * heads * triton.cdiv(queries, config.block_m),)](
        **_operands(q=_rows_dense(q), k=_rows_dense(k), v=_rows_dense(v), out=out),
        **_options(q, k, intervals, kv_row, seed, dropout_p, scale),
        lse=lse,
        ONE=k.shape[2] <= config.block_n,
        **config.constants(width, q.dtype),
    )
    return out, lse


@_triton.launcher
def attention_bwd(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    intervals: Tensor | None, kv_row: Tensor | None, seed: Tensor | None,
    dropout_p: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The contract of `reference.attention_bwd`; limits as those of the forward."""
    batch, heads, queries, width = q.shape
    keys, dtype = k.shape[2], q.dtype
    _check_width("attention_bwd", width)
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    if lse.numel() == 0:
        return gradients[0], gradients[1].zero_(), gradients[2].zero_()
    options = {"scale": scale} | _options(q, k, intervals, kv_row, seed, dropout_p, scale)
    q, k, v, grad, out = (_rows_dense(x) for x in (q, k, v, grad, out))
    # Kernels write rows whose numbers lie side by side; into other layouts goes a copy.
    dq, dk, dv = (x if x.stride(3) == 1 else x.new_empty(x.shape) for x in gradients)
    chosen = configs(_triton.capability(q), width, dtype)
    whole = kv_row is None and queries <= chosen.whole[-1].block_m  # one tile holds all readers
    rows = pick(chosen.whole if whole else chosen.rows, queries)
    deltas = None if whole else torch.empty_like(lse)
    attention_bwd_rows_kernel[(batch * heads * triton.cdiv(queries, rows.block_m),)](
        **_operands(q=q, k=k, v=v, out=out, grad=grad, dq=dq, dk=dk, dv=dv),
        **options,
        lse=lse,
        deltas=deltas,
        ONE=keys <= rows.block_n,
        WHOLE=whole,
        **rows.constants(width, dtype),
    )
    if not whole and dk.numel() > 0:
        config = chosen.keys
        attention_bwd_keys_kernel[(k.shape[0] * heads * triton.cdiv(keys, config.block_n),)](
            **_operands(q=q, k=k, v=v, grad=grad, dk=dk, dv=dv),
            **options,
            B=batch,
            lse=lse,
            deltas=deltas,
            **config.constants(width, dtype),
        )
    made = zip(gradients, (dq, dk, dv), strict=True)
    d_q, d_k, d_v = (x if x is y else x.copy_(y) for x, y in made)
    return d_q, d_k, d_v


def _check_width(name: str, width: int) -> None:
    if not 16 <= width <= 128:
        raise NotImplementedError(f"{name}: Triton takes head widths of 16 to 128, got {width}")


def _rows_dense(x: Tensor) -> Tensor:
    """`x`, or a copy in which the numbers of a row lie side by side."""
    return x if x.stride(3) == 1 else x.contiguous()


def _operands(**tensors: Tensor) -> dict[str, object]:
    """Tensors [B, H, L, E] and their strides, in units of VEC elements: 16 bytes where all of them
    allow it, so that Triton knows every row to start on 16 bytes whatever the numbers are."""
    strides = {
        f"{name}_{axis}": x.stride(dim) if x.shape[dim] > 1 else 0
        for name, x in tensors.items()
        for dim, axis in enumerate(("sample", "head", "row"))
    }
    vec = 16 // tensors["q"].element_size()
    if any(s % vec for s in strides.values()) or any(x.data_ptr() % 16 for x in tensors.values()):
        vec = 1
    return {**tensors, **{name: s // vec for name, s in strides.items()}, "VEC": vec}


def _options(
    q: Tensor, k: Tensor, intervals: Tensor | None, kv_row: Tensor | None, seed: Tensor | None,
    dropout_p: float, scale: float,
) -> dict[str, object]:  # fmt: skip
    """The arguments that all kernels take but for q, k, v and their strides."""
    threshold = round(dropout_p * 65536)
    own = intervals is not None and intervals.shape[0] > 1
    return {
        "intervals": None if intervals is None else intervals.contiguous(),
        "mask_sample": 4 * q.shape[2] if own else 0,
        "kv_row": None if kv_row is None else kv_row.contiguous(),
        "seed": seed if threshold > 0 else None,
        "threshold": threshold,
        "keep_scale": 65536 / (65536 - threshold) if threshold < 65536 else 0.0,
        "factor": scale if q.dtype == torch.float32 else scale * math.log2(math.e),
        "H": q.shape[1],
        "Lq": q.shape[2],
        "Lk": k.shape[2],
    }


# Head widths that stand for all: a full tile, ViT-g's (padded), and one whose rows start anywhere.
_WIDTHS = (64, 88, 36)


def variants(arch: int, dtype: torch.dtype) -> list[Variant]:
    """What this module can ask Triton to compile for one architecture and dtype.

    Each tile with all of mask, dropout and kv_row ("all") and with none of them ("plain").
    """
    features = ("q", "k", "v", "out", "grad", "dq", "dk", "dv")
    arguments = dict.fromkeys(features, f"*{_triton._TYPES[dtype]}")
    arguments |= dict.fromkeys(("lse", "deltas"), "*fp32") | {"intervals": "*i32"}
    arguments |= dict.fromkeys(("scale", "factor", "keep_scale"), "fp32")
    arguments |= dict.fromkeys(("kv_row", "seed"), "*i64")
    found = []
    for width in _WIDTHS:
        chosen = configs(arch, width, dtype)
        whole = {"WHOLE": True, "kv_row": None, "deltas": None}
        kernels = [("bwd_keys", attention_bwd_keys_kernel, chosen.keys, {})]
        for end, one in (("", {"ONE": False}), ("_one", {"ONE": True})):
            kernels += [("fwd" + end, attention_fwd_kernel, c, one) for c in chosen.forward]
            kernels += [
                ("bwd_whole" + end, attention_bwd_rows_kernel, c, one | whole) for c in chosen.whole
            ]
            own = one | {"WHOLE": False}
            kernels += [("bwd_rows" + end, attention_bwd_rows_kernel, c, own) for c in chosen.rows]
        vec = 16 // dtype.itemsize if width % 8 == 0 else 1
        for plain in (False, True):
            off = dict.fromkeys(("intervals", "kv_row", "seed") if plain else ())
            for name, kernel, config, options in kernels:
                constants = config.constants(width, dtype) | {"VEC": vec} | off | options
                title = f"attention_{name} {config.name} E={width} {'plain' if plain else 'all'}"
                usual = arch in (80, 90) and width == 64 and not plain and "one" not in name
                found.append(
                    Variant(title, kernel, dtype, None, arguments, constants, True, not usual)
                )
    return found
