"""BLIP-2's image-text contrast in Triton: products with all queries live in registers only.

Costs at N images and texts, Q queries, width D: forward 2 N² Q D FLOPs, of which [N, N] best
products and the bytes of their queries are written and read by statistics of rows and of columns
(about 17 N² bytes). Backward 4 N² Q D in two kernels whose left operand is spread out from [N, N]
weights in registers, and 2 N² Q D more only where the forward's products were not kept.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkern import _triton
from mmkern._triton import LN2, LOG2E, Config, Variant

BAND_BYTES = 256 << 20  # scratch for products that are not kept

_MOST_PROGRAMS = 256  # programs that d_text is split up for: about two a multiprocessor
# Tiles of a program of row and of column statistics, by AXIS.
_STATISTICS: dict[int, dict[str, int]] = {
    1: {"AXIS": 1, "BR": 1, "BC": 1024, "num_warps": 4},
    0: {"AXIS": 0, "BR": 64, "BC": 32, "num_warps": 8},
}
_WEIGHT_ROWS, _WEIGHT_COLUMNS = 16, 128

_HALF = Config(128, 128, 64, warps=8, stages=3, descriptors=False, flatten=False)
_SINGLE = Config(64, 64, 32, warps=4, stages=3, descriptors=False, flatten=False)
_INTEGERS = [*("images", "texts", "queries", "first", "offset", "chunk_images", "count", "columns")]


@triton.jit
def step(x, valid, top, total, AXIS: tl.constexpr):
    """Running maximum and sum of exp(x - maximum), with the valid ones of tile x taken in.

    NaN stays: tl.max may pass over it, x - top does not. +inf gives inf - inf, NaN.
    """
    x = tl.where(valid, x, float("-inf"))
    new_top = tl.maximum(top, tl.max(x, AXIS))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # no term yet: exp(-inf), not NaN
    e = tl.exp2((x - tl.expand_dims(safe, AXIS)) * LOG2E)
    return new_top, total * tl.exp2((top - safe) * LOG2E) + tl.sum(e, AXIS)


@triton.jit
def log_exponential(word):
    """ln E with E = -ln(1 - v), v = (word + 1/2) 2^-32. Small v by its series: a logarithm near 1
    has few digits on a GPU."""
    v = tl.minimum((word.to(tl.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
    series = v * (1.0 + v * (0.5 + v * (0.33333334 + v * 0.25)))
    return tl.log(tl.where(v < 2.0**-6, series, -tl.log(1.0 - v)))


@triton.jit
def draw_keys(seed, i, j, WORD: tl.constexpr):
    """ln E of word WORD of Philox2x32-10 at the counters (i, j): reference.py specifies it."""
    value = tl.load(seed)
    key = (value ^ (value >> 32)).to(tl.uint32)
    zero = i * 0 + j * 0  # both as large as the tile
    left, right = zero + i, zero + j
    for _ in tl.static_range(10):
        high = tl.umulhi(left, zero + 0xD256D193)
        low = left * 0xD256D193
        left, right = high ^ key ^ right, low
        key = key + 0x9E3779B9
    return log_exponential(right if WORD else left)


@triton.jit
def nearest(keys, valid, index, least, where, AXIS: tl.constexpr):
    """Running least key and its index; the lower index of two that tie."""
    keys = tl.where(valid & (keys == keys), keys, float("inf"))
    found = tl.min(keys, AXIS)
    matches = keys == tl.expand_dims(found, AXIS)
    place = tl.min(tl.where(matches, index, 0x7FFFFFFF), AXIS)
    nearer = found < least
    return tl.where(nearer, found, least), tl.where(nearer, place, where)


@triton.jit(do_not_specialize=_INTEGERS)
def query_similarity(rows, text, dots, best, images, texts, queries, row_stride, text_stride, D,
                     BT: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, QP: tl.constexpr,
                     PRECISION: tl.constexpr):  # fmt: skip
    """dots[i, j] = max_q <rows[i Q + q], text_j> and the first q that attains it.

    Queries lie on the accumulator's columns, QP (a power of two) to an image: a maximum over them
    needs no word from another warp. Those past Q repeat the last one, which never wins then.
    """
    blocks = tl.cdiv(texts, BT)
    t = tl.program_id(0) % blocks * BT + tl.arange(0, BT)
    c = tl.arange(0, BC)
    image = tl.program_id(0) // blocks * (BC // QP)
    row = tl.minimum(image + c // QP, images - 1).to(tl.int64) * queries
    row += tl.minimum(c % QP, queries - 1)
    text_rows = tl.minimum(t, texts - 1).to(tl.int64) * text_stride
    tile = tl.zeros([BT, BC], dtype=tl.float32)
    for k in tl.range(0, D, BK):
        features = k + tl.arange(0, BK)
        mask = features < D
        a = tl.load(text + text_rows[:, None] + features[None, :], mask=mask[None, :], other=0.0)
        b = tl.load(rows + row[:, None] * row_stride + features[None, :], mask=mask[None, :],
                    other=0.0)  # fmt: skip
        tile = tl.dot(a, b.T, tile, input_precision=PRECISION)
    tile = tl.reshape(tile, [BT, BC // QP, QP])  # [texts, images, queries]
    top = tl.max(tile, 2)
    q = tl.arange(0, QP)[None, None, :]
    where = tl.min(tl.where(tile == top[:, :, None], q, QP), 2)
    bad = tl.max(tl.where(tile == tile, 0, 1), 2) > 0  # tl.max may pass over NaN
    top = tl.where(bad, float("nan"), top)
    where = tl.where(bad | (where == QP), 0, where)
    i = image + tl.arange(0, BC // QP)
    out = i.to(tl.int64)[None, :] * texts + t[:, None]
    mask = (t < texts)[:, None] & (i < images)[None, :]
    tl.store(dots + out, top, mask=mask)
    tl.store(best + out, where.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=_INTEGERS)
def query_statistics(dots, scale, ids, seed, stats, keys, draws, images, texts, first, offset,
                     count, AXIS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Statistics and draws of a band of images: of rows (AXIS 1) or of columns (AXIS 0).

    stats is [7, count] and keys and draws are [count], from the first row or column on. Columns go
    on from what earlier bands (first > 0) left there.
    """
    s = tl.load(scale).to(tl.float32)
    if AXIS == 1:
        r = tl.program_id(0) + tl.arange(0, BR)  # one row
        out = first + r
        keep = r < images
        steps = tl.cdiv(texts, BC)
    else:
        c = tl.program_id(0) * BC + tl.arange(0, BC)
        out = c
        keep = c < texts
        steps = tl.cdiv(images, BR)
    BLOCK: tl.constexpr = BR if AXIS == 1 else BC
    zero = tl.zeros([BLOCK], dtype=tl.float32)
    top, positive_top, least = zero + float("-inf"), zero + float("-inf"), zero + float("inf")
    total, positive_total, sums, number, every = zero, zero, zero, zero, zero
    where = tl.full([BLOCK], -1, dtype=tl.int32)
    if AXIS == 0:
        resume = keep & (tl.zeros([BLOCK], dtype=tl.int32) + first > 0)
        top = tl.load(stats + out, mask=resume, other=float("-inf"))
        total = tl.load(stats + count + out, mask=resume, other=0.0)
        positive_top = tl.load(stats + 2 * count + out, mask=resume, other=float("-inf"))
        positive_total = tl.load(stats + 3 * count + out, mask=resume, other=0.0)
        sums = tl.load(stats + 4 * count + out, mask=resume, other=0.0)
        number = tl.load(stats + 5 * count + out, mask=resume, other=0.0)
        every = tl.load(stats + 6 * count + out, mask=resume, other=0.0)
        if seed is not None:
            least = tl.load(keys + out, mask=resume, other=float("inf"))
            where = tl.load(draws + out, mask=resume, other=-1).to(tl.int32)
    for n in tl.range(0, steps):
        if AXIS == 1:
            c = n * BC + tl.arange(0, BC)
        else:
            r = n * BR + tl.arange(0, BR)
        i = (offset + first + r)[:, None]
        j = c[None, :]
        valid = (r < images)[:, None] & (c < texts)[None, :]
        x = tl.load(dots + r.to(tl.int64)[:, None] * texts + j, mask=valid, other=0.0) * s
        own = tl.load(ids + offset + first + r, mask=r < images, other=0)[:, None]
        positive = valid & (own == tl.load(ids + c, mask=c < texts, other=0)[None, :])
        negative = valid & (positive == 0)
        top, total = step(x, negative, top, total, AXIS)
        positive_top, positive_total = step(x, positive, positive_top, positive_total, AXIS)
        sums += tl.sum(tl.where(positive, x, 0.0), AXIS)
        number += tl.sum(tl.where(positive, 1.0, 0.0), AXIS)
        every += tl.sum(tl.where(valid, x, 0.0), AXIS)
        if seed is not None:
            k = draw_keys(seed, i.to(tl.uint32), j.to(tl.uint32), 1 - AXIS) - x
            index = tl.broadcast_to(j if AXIS == 1 else i, [BR, BC])
            least, where = nearest(k, negative, index, least, where, AXIS)
    tl.store(stats + out, top, mask=keep)
    tl.store(stats + count + out, total, mask=keep)
    tl.store(stats + 2 * count + out, positive_top, mask=keep)
    tl.store(stats + 3 * count + out, positive_total, mask=keep)
    tl.store(stats + 4 * count + out, sums, mask=keep)
    tl.store(stats + 5 * count + out, number, mask=keep)
    tl.store(stats + 6 * count + out, every, mask=keep)
    if seed is not None:
        tl.store(keys + out, least, mask=keep)
        tl.store(draws + out, where.to(tl.int64), mask=keep)


@triton.jit
def log1p_exp(x):
    """log(1 + exp x), exact where it is far below 1."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    series = e * (1.0 - e * (0.5 - e * (0.33333334 - e * 0.25)))
    return tl.maximum(x, 0.0) + tl.where(e < 2.0**-6, series, tl.log2(1.0 + e) * LN2) + 0 * x


@triton.jit(do_not_specialize=["texts", "count", "smoothing"])
def query_loss(stats, out, texts, count, smoothing, B: tl.constexpr):
    """Sum of the losses of all rows and columns, one program: the specification's formula."""
    total = tl.zeros([B], dtype=tl.float32)
    for start in tl.range(0, count, B):
        n = start + tl.arange(0, B)
        mask = n < count
        top = tl.load(stats + n, mask=mask, other=float("-inf"))
        negatives = tl.load(stats + count + n, mask=mask, other=0.0)
        positive_top = tl.load(stats + 2 * count + n, mask=mask, other=0.0)
        positives = tl.load(stats + 3 * count + n, mask=mask, other=1.0)
        sums = tl.load(stats + 4 * count + n, mask=mask, other=0.0)
        number = tl.load(stats + 5 * count + n, mask=mask, other=1.0)
        every = tl.load(stats + 6 * count + n, mask=mask, other=0.0)
        mean = sums / number
        margin = (top - positive_top) + tl.log2(negatives / positives) * LN2
        # No negative: log 0 is -inf, whose product with 0 would be NaN.
        loss = tl.where(negatives == 0.0, 0.0, log1p_exp(margin))
        loss += (positive_top - mean) + tl.log2(positives) * LN2
        loss += smoothing * (mean - every / texts)
        total += tl.where(mask, loss, 0.0)
    tl.store(out, tl.sum(total, 0))


@triton.jit
def direction(stats, n, count, mask):
    """Of rows or columns n: maximum, 1 / sum, the positives' two, the probability of all negatives,
    the number of positives."""
    top = tl.load(stats + n, mask=mask, other=0.0)
    negatives = tl.load(stats + count + n, mask=mask, other=0.0)
    positive_top = tl.load(stats + 2 * count + n, mask=mask, other=0.0)
    positives = tl.load(stats + 3 * count + n, mask=mask, other=1.0)
    number = tl.load(stats + 5 * count + n, mask=mask, other=1.0)
    most = tl.maximum(top, positive_top)
    missed = negatives * tl.exp2((top - most) * LOG2E)
    all_of = missed + positives * tl.exp2((positive_top - most) * LOG2E)
    return most, 1.0 / all_of, positive_top, 1.0 / positives, missed / all_of, number


@triton.jit
def softmax_less_target(x, positive, most, inverse, positive_top, inverse_positives, miss, number,
                        smoothing, spread):  # fmt: skip
    """softmax - P; `_weights` of the specification says why in this form."""
    e = tl.exp2((x - positive_top) * LOG2E) * inverse_positives
    of_positive = (e - ((1.0 - smoothing) / number + spread)) - e * miss
    of_negative = tl.exp2((x - most) * LOG2E) * inverse - spread
    return tl.where(positive, of_positive, of_negative)


@triton.jit(do_not_specialize=[*_INTEGERS, "smoothing"])
def query_weights(dots, scale, ids, stats, row_weight, column_weight, sums, images, texts, first,
                  offset, count, columns, smoothing, DETACH: tl.constexpr, SHIFT: tl.constexpr,
                  BR: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """2^SHIFT times the weights of the queries' gradient and, with DETACH, of the texts'; and
    Σ (R + C) dots of each program. stats is [7, count], the columns' from `columns` on."""
    blocks = tl.cdiv(texts, BC)
    r = tl.program_id(0) // blocks * BR + tl.arange(0, BR)
    c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    valid = (r < images)[:, None] & (c < texts)[None, :]
    place = r.to(tl.int64)[:, None] * texts + c[None, :]
    d = tl.load(dots + place, mask=valid, other=0.0)
    x = d * tl.load(scale).to(tl.float32)
    own = tl.load(ids + offset + first + r, mask=r < images, other=0)
    positive = own[:, None] == tl.load(ids + c, mask=c < texts, other=0)[None, :]
    spread = smoothing / texts
    m, n, pm, pn, miss, number = direction(stats, first + r, count, r < images)
    a = softmax_less_target(x, positive, m[:, None], n[:, None], pm[:, None], pn[:, None],
                            miss[:, None], number[:, None], smoothing, spread)  # fmt: skip
    m, n, pm, pn, miss, number = direction(stats, columns + c, count, c < texts)
    b = softmax_less_target(x, positive, m[None, :], n[None, :], pm[None, :], pn[None, :],
                            miss[None, :], number[None, :], smoothing, spread)  # fmt: skip
    both = a + b
    total = tl.sum(tl.sum(tl.where(valid, both * d, 0.0), 1), 0)
    tl.store(sums + tl.program_id(0), total)
    dtype = row_weight.dtype.element_ty
    if DETACH:
        tl.store(row_weight + place, (a * 2.0**SHIFT).to(dtype), mask=valid)
        tl.store(column_weight + place, (b * 2.0**SHIFT).to(dtype), mask=valid)
    else:
        tl.store(row_weight + place, (both * 2.0**SHIFT).to(dtype), mask=valid)


@triton.jit
def spread_weights(weight, best, i, q, t, images, texts):
    """Weights of texts t for queries (i, q): where q is the best one, else 0. [queries, texts]"""
    place = tl.minimum(i, images - 1).to(tl.int64)[:, None] * texts + t[None, :]
    valid = (i < images)[:, None] & (t < texts)[None, :]
    w = tl.load(weight + place, mask=valid, other=0.0)
    chosen = tl.load(best + place, mask=valid, other=0).to(tl.int32)
    return tl.where(chosen == q[:, None], w, 0.0)


@triton.jit(do_not_specialize=_INTEGERS)
def query_gradient(weight, best, text, factor, out, images, texts, queries, text_stride, out_stride,
                   D, BC: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, QP: tl.constexpr,
                   SHIFT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """out[i Q + q] = factor Σ_j weight[i, j] [best[i, j] = q] text_j."""
    blocks = tl.cdiv(D, BD)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    c = tl.program_id(0) // blocks * BC + tl.arange(0, BC)
    i, q = c // QP, c % QP
    tile = tl.zeros([BC, BD], dtype=tl.float32)
    for start in tl.range(0, texts, BT):
        t = start + tl.arange(0, BT)
        w = spread_weights(weight, best, i, q, t, images, texts)
        features = text + t.to(tl.int64)[:, None] * text_stride + d[None, :]
        b = tl.load(features, mask=(t < texts)[:, None] & (d < D)[None, :], other=0.0)
        tile = tl.dot(w.to(b.dtype), b, tile, input_precision=PRECISION)
    tile *= tl.load(factor) * 2.0**-SHIFT
    row = i.to(tl.int64) * queries + q
    mask = ((i < images) & (q < queries))[:, None] & (d < D)[None, :]
    pointers = out + row[:, None] * out_stride + d[None, :]
    tl.store(pointers, tile.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_INTEGERS)
def text_gradient(weight, best, rows, factor, out, images, texts, queries, row_stride, out_stride,
                  D, chunk_images, BC: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
                  QP: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """out[chunk, j] = factor Σ_i weight[i, j] rows[i Q + best[i, j]] over a chunk of images."""
    blocks = tl.cdiv(D, BD)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    t = tl.program_id(0) // blocks * BT + tl.arange(0, BT)
    begin = tl.program_id(1) * chunk_images
    end = tl.minimum(begin + chunk_images, images)
    tile = tl.zeros([BT, BD], dtype=tl.float32)
    for start in tl.range(begin * QP, end * QP, BC):
        c = start + tl.arange(0, BC)
        i, q = c // QP, c % QP
        w = spread_weights(weight, best, i, q, t, end, texts)
        row = tl.minimum(i, end - 1).to(tl.int64) * queries + tl.minimum(q, queries - 1)
        mask = ((i < end) & (q < queries))[:, None] & (d < D)[None, :]
        b = tl.load(rows + row[:, None] * row_stride + d[None, :], mask=mask, other=0.0)
        tile = tl.dot(w.to(b.dtype).T, b, tile, input_precision=PRECISION)
    tile *= tl.load(factor) * 2.0**-SHIFT
    place = tl.program_id(1).to(tl.int64) * texts + t
    mask = (t < texts)[:, None] & (d < D)[None, :]
    tl.store(out + place[:, None] * out_stride + d[None, :], tile, mask=mask)


def _config(dtype: torch.dtype, queries: int) -> tuple[Config, int]:
    """Tile and the power of two that an image's queries are padded to."""
    config = _SINGLE if dtype == torch.float32 else _HALF
    padded = triton.next_power_of_2(queries)
    if padded > config.block_n:  # all queries of an image in one tile
        config = replace(config, block_m=64, block_n=padded, warps=8)
    return config, padded


def _constants(config: Config, padded: int, dtype: torch.dtype) -> dict[str, object]:
    """Compile-time arguments of the kernels with products."""
    precision = "ieee" if dtype == torch.float32 else "tf32"
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return {
        "BT": config.block_m,
        "BC": config.block_n,
        "QP": padded,
        "PRECISION": precision,
    } | options


def _gradient_constants(padded: int, dtype: torch.dtype, texts: int) -> dict[str, object]:
    """Those of the backward's, `texts` at a time; an image's queries may lie in several tiles."""
    config = _SINGLE if dtype == torch.float32 else _HALF
    constants = _constants(replace(config, block_m=texts), padded, dtype)
    return constants | {"BD": config.block_n, "SHIFT": _triton.weight_shift(dtype)}


def _gradient_rows(dtype: torch.dtype) -> tuple[int, int]:
    """Texts in a tile of the queries' gradient, which sums over them, and of the texts'."""
    return 32, 32 if dtype == torch.float32 else 64


def _flat(queries: Tensor) -> Tensor:
    return _triton.padded(queries.reshape(-1, queries.shape[2]))


def _similarity(rows: Tensor, text: Tensor, queries: int, dots: Tensor, best: Tensor) -> None:
    """Into dots and best [images, texts]."""
    images, texts = dots.shape
    config, padded = _config(rows.dtype, queries)
    grid = triton.cdiv(texts, config.block_m) * triton.cdiv(images, config.block_n // padded)
    query_similarity[(grid,)](
        rows, text, dots, best, images, texts, queries, rows.stride(0), text.stride(0),
        rows.shape[1], BK=config.block_k, **_constants(config, padded, rows.dtype),
    )  # fmt: skip


def _bands(images: int, texts: int, kept: bool) -> list[slice]:
    band = images if kept else max(1, min(images, BAND_BYTES // (5 * texts)))
    return [slice(start, min(start + band, images)) for start in range(0, images, band)]


def _scratch(like: Tensor, bands: list[slice], texts: int) -> tuple[Tensor, Tensor]:
    shape = (bands[0].stop, texts)  # the first band is the largest
    return like.new_empty(shape, dtype=torch.float32), like.new_empty(shape, dtype=torch.uint8)


@_triton.launcher
def query_info_nce_fwd(
    queries: Tensor,
    text: Tensor,
    scale: Tensor,
    ids: Tensor,
    offset: int,
    keep: bool,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics, draws, and the best products and queries.

    The contract of `reference.query_info_nce_fwd`; fp64 raises NotImplementedError. Memory above
    inputs and outputs: BAND_BYTES, plus copies of features whose rows are not 16-byte aligned.
    """
    images, count, texts = queries.shape[0], queries.shape[1], text.shape[0]
    rows, text, ids = _flat(queries), _triton.padded(text), ids.contiguous()
    stats = text.new_empty((7, images + texts), dtype=torch.float32)
    drawn = images + texts if seed is not None else 0
    keys, draws = stats.new_empty(drawn), ids.new_empty(drawn)
    bands = _bands(images, texts, keep)
    dots, best = _scratch(text, bands, texts)
    common = {"scale": scale, "ids": ids, "seed": seed, "texts": texts, "offset": offset}
    common["count"] = images + texts
    for band in bands:
        n = band.stop - band.start
        _similarity(rows[band.start * count : band.stop * count], text, count, dots[:n], best[:n])
        parts = {"dots": dots, "images": n, "first": band.start} | common
        query_statistics[(n,)](**parts, stats=stats, keys=keys, draws=draws, **_STATISTICS[1])
        query_statistics[(triton.cdiv(texts, _STATISTICS[0]["BC"]),)](
            **parts, stats=stats[:, images:], keys=keys[images:], draws=draws[images:],
            **_STATISTICS[0],
        )  # fmt: skip
    return stats, keys, draws, *((dots, best) if keep else (dots[:0, 0], best[:0, 0]))


@_triton.launcher
def query_info_nce_loss(stats: Tensor, label_smoothing: float, texts: int) -> Tensor:
    """The contract of `reference.query_info_nce_loss`."""
    stats = stats.contiguous()
    out = stats.new_empty(())
    query_loss[(1,)](stats, out, texts, stats.shape[1], label_smoothing, B=1024)
    return out


@_triton.launcher
def query_info_nce_bwd(
    queries: Tensor,
    text: Tensor,
    scale: Tensor,
    ids: Tensor,
    offset: int,
    stats: Tensor,
    grad: Tensor,
    world: int,
    label_smoothing: float,
    detach_columns: bool,
    output_mask: list[bool],
    dots: Tensor | None = None,
    best: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the loss. The contract of `reference.query_info_nce_bwd`."""
    images, count, width = queries.shape
    texts, dtype = text.shape[0], queries.dtype
    rows, wide = _flat(queries), _triton.padded(text)
    ids, stats = ids.contiguous(), stats.contiguous()
    constant = grad.to(torch.float32).view(()) * (world / (2 * texts))
    factor = constant * scale.to(torch.float32).view(())
    want_queries, want_text = output_mask
    padded_width = wide.shape[1]
    d_queries = queries.new_empty((images, count, padded_width) if want_queries else (0,))
    d_text = stats.new_zeros((texts, padded_width) if want_text else (0,))
    kept = dots is not None and best is not None
    bands = _bands(images, texts, kept)
    if not kept:
        dots, best = _scratch(text, bands, texts)
    padded = triton.next_power_of_2(count)
    of_queries, of_text = (_gradient_constants(padded, dtype, n) for n in _gradient_rows(dtype))
    block = max(1, of_text["BC"] // padded)  # images
    slices = triton.cdiv(padded_width, of_text["BD"])
    weights = text.new_empty((1 + detach_columns, bands[0].stop, texts))
    d_scale = stats.new_zeros(())
    for band in bands:
        n = band.stop - band.start
        part = rows[band.start * count : band.stop * count]
        d, b = (dots[band], best[band]) if kept else (dots[:n], best[:n])
        if not kept:
            _similarity(part, wide, count, d, b)
        grid = triton.cdiv(n, _WEIGHT_ROWS) * triton.cdiv(texts, _WEIGHT_COLUMNS)
        sums = stats.new_empty(grid)
        query_weights[(grid,)](
            d, scale, ids, stats, weights[0], weights[-1], sums, n, texts, band.start, offset,
            images + texts, images, label_smoothing, DETACH=detach_columns,
            SHIFT=of_text["SHIFT"], BR=_WEIGHT_ROWS, BC=_WEIGHT_COLUMNS,
        )  # fmt: skip
        d_scale += sums.sum()
        if want_queries:
            out = d_queries[band]
            query_gradient[(triton.cdiv(n * padded, of_queries["BC"]) * slices,)](
                weights[0], b, wide, factor, out, n, texts, count, wide.stride(0), padded_width,
                padded_width, **of_queries,
            )  # fmt: skip
        if want_text:
            programs = triton.cdiv(texts, of_text["BT"]) * slices
            chunks = max(1, min(_MOST_PROGRAMS // programs, triton.cdiv(n, 4 * block)))
            chunk = triton.cdiv(triton.cdiv(n, chunks), block) * block
            partial = stats.new_empty(triton.cdiv(n, chunk), texts, padded_width)
            text_gradient[(programs, partial.shape[0])](
                weights[-1], b, part, factor, partial, n, texts, count, part.stride(0),
                padded_width, padded_width, chunk, **of_text,
            )  # fmt: skip
            d_text += partial.sum(0)
    if padded_width > width:
        d_queries = d_queries[..., :width].contiguous()
        d_text = d_text[..., :width].contiguous()
    return d_queries, d_text, d_scale * constant


def variants(arch: int, dtype: torch.dtype) -> list[Variant]:
    """What this module asks Triton to compile for one architecture and dtype, at one, 32 (BLIP-2's)
    and 256 queries. Without draws and detached columns kernels lose code only."""
    features = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    arguments = dict.fromkeys(("rows", "text", "weight", "row_weight", "column_weight"), features)
    arguments |= dict.fromkeys(("dots", "scale", "stats", "keys", "sums", "factor"), "*fp32")
    arguments |= {"ids": "*i64", "seed": "*i64", "draws": "*i64", "best": "*u8"}
    arguments |= {"smoothing": "fp32", "out": "*fp32"}

    def variant(kernel: object, name: str, constants: dict[str, object], **types: str) -> Variant:
        return Variant(name, kernel, dtype, None, arguments | types, constants)

    weights = {"DETACH": True, "SHIFT": _triton.weight_shift(dtype)}
    weights |= {"BR": _WEIGHT_ROWS, "BC": _WEIGHT_COLUMNS}
    found = [
        variant(query_statistics, "query_statistics rows", {**_STATISTICS[1]}),
        variant(query_statistics, "query_statistics columns", {**_STATISTICS[0]}),
        variant(query_loss, "query_loss", {"B": 1024}),
        variant(query_weights, "query_weights", weights),
    ]
    for queries in (1, 32, 256):
        config, padded = _config(dtype, queries)
        constants = _constants(config, padded, dtype) | {"BK": config.block_k}
        found.append(variant(query_similarity, f"query_similarity {queries}", constants))
        if padded == 256:
            continue  # in the gradients' kernels a number to divide by
        of_queries, of_text = (_gradient_constants(padded, dtype, n) for n in _gradient_rows(dtype))
        found += [
            variant(query_gradient, f"query_gradient {queries}", of_queries, out=features),
            variant(text_gradient, f"text_gradient {queries}", of_text),
        ]
    return found
