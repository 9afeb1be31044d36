"""Partial LoRA on the GPU: the base product is the library's; Triton reads and adds to visual rows.

Visual rows are read and written where they are, by a list of their indices that the collator made:
tiles hold visual rows only, whatever their pattern, and the host asks the device nothing. -1 in the
list is no row. Dropout is one byte for eight features, made once a pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mmkern import _triton
from mmkern._triton import Tile, Variant

_PROGRAMS = 264  # programs that a reduction aims for: two for each multiprocessor of an H100
_CHUNK_ROWS = 256  # fewest rows of a part of a reduction


def shrink_tile(rank: int, dtype: torch.dtype) -> Tile:
    """Rows by ranks. Bound by the read of x, so ranks of one tile are padded without a cost."""
    if dtype == torch.float32:
        return Tile(32, 16 if rank <= 16 else 64, 32, warps=4, stages=3)
    return Tile(32, 16, 128, 4, 4) if rank <= 16 else Tile(64, 128, 64, 4, 4)


def expand_tile(rank: int, dtype: torch.dtype) -> Tile:
    """Rows by outputs."""
    k = 16 if rank <= 16 else 32 if dtype == torch.float32 else 64
    return Tile(64, 64, k, 4, 3) if dtype == torch.float32 else Tile(128, 128, k, 8, 3)


def reduce_tile(rank: int, dtype: torch.dtype) -> Tile:
    """Features by ranks, summed over rows."""
    if dtype == torch.float32:
        return Tile(64, 16 if rank <= 16 else 64, 32, 4, 3)
    return Tile(128, 16 if rank <= 16 else 128, 64, 8, 3)


@triton.jit(do_not_specialize=["count", "width", "threshold"])
def plora_keep(index, seed, keep, count, width, threshold, BM: tl.constexpr, BN: tl.constexpr):
    """Bit g of keep[i, j]: whether feature 256 (j // 32) + 32 g + j % 32 of index[i] is kept."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    row = tl.load(index + i, mask=i < count, other=-1)
    c0 = tl.broadcast_to(row[:, None], [BM, BN])
    c1 = tl.broadcast_to(j[None, :], [BM, BN])
    zero = tl.zeros([BM, BN], dtype=tl.int32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), c0, c1, zero, zero)
    bits = draws(w0, threshold) | (draws(w1, threshold) << 2)
    bits |= (draws(w2, threshold) << 4) | (draws(w3, threshold) << 6)
    mask = (row >= 0)[:, None] & (j < width)[None, :]
    tl.store(keep + i.to(tl.int64)[:, None] * width + j[None, :], bits.to(tl.uint8), mask=mask)


@triton.jit
def draws(word, threshold):
    """Bits 0 and 1: whether the low and the high half of a word keep their feature."""
    low = (word & 0xFFFF).to(tl.int32) >= threshold
    high = (word >> 16).to(tl.int32) >= threshold
    return low.to(tl.int32) | (high.to(tl.int32) << 1)


@triton.jit
def keep_tile(keep, i, k, seen, D, width):
    """Whether dropout keeps features k of visual rows i: [rows, features]."""
    mask = seen[:, None] & (k < D)[None, :]
    place = k // 256 * 32 + k % 32
    byte = tl.load(keep + i.to(tl.int64)[:, None] * width + place[None, :], mask=mask, other=0)
    return ((byte.to(tl.int32) >> (k // 32 % 8)[None, :]) & 1) != 0


@triton.jit(do_not_specialize=["count", "width"])
def plora_shrink(source, index, matrix, keep, out, scale, count, width, D,
                 source_stride, matrix_stride,
                 RANK: tl.constexpr, OUT_STRIDE: tl.constexpr, FEATURES_LAST: tl.constexpr,
                 KEEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """out[i, j] = scale Σ_k source[index[i], k] matrix(j, k), features k kept by dropout.

    matrix is [RANK, D] (FEATURES_LAST) or [D, RANK].
    """
    strips: tl.constexpr = (RANK + BN - 1) // BN
    program = tl.program_id(0)
    i = program // strips * BM + tl.arange(0, BM)
    j = program % strips * BN + tl.arange(0, BN)
    row = tl.load(index + i, mask=i < count, other=-1)
    if tl.max(row, 0) < 0:  # behind the last visual row
        return
    seen = row >= 0
    own = source + row.to(tl.int64)[:, None] * source_stride
    tile = tl.zeros([BM, BN], dtype=tl.float32)
    for start in tl.range(0, D, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(own + k[None, :], mask=seen[:, None] & (k < D)[None, :], other=0.0)
        if KEEP:
            x = tl.where(keep_tile(keep, i, k, seen, D, width), x, 0.0)
        if FEATURES_LAST:
            pointers = matrix + j.to(tl.int64)[:, None] * matrix_stride + k[None, :]
            m = tl.load(pointers, mask=(j < RANK)[:, None] & (k < D)[None, :], other=0.0).T
        else:
            pointers = matrix + k.to(tl.int64)[:, None] * matrix_stride + j[None, :]
            m = tl.load(pointers, mask=(k < D)[:, None] & (j < RANK)[None, :], other=0.0)
        tile = tl.dot(x, m, tile, input_precision=PRECISION)
    pointers = out + i.to(tl.int64)[:, None] * OUT_STRIDE + j[None, :]
    mask = seen[:, None] & (j < RANK)[None, :]
    tl.store(pointers, (tile * scale).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count", "width"])
def plora_expand(low, index, matrix, keep, out, scale, count, width, D, matrix_stride, out_stride,
                 RANK: tl.constexpr, LOW_STRIDE: tl.constexpr, FEATURES_LAST: tl.constexpr,
                 KEEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """out[index[i], n] += scale Σ_r low[i, r] matrix(r, n), where dropout keeps n.

    matrix is [RANK, D] (FEATURES_LAST) or [D, RANK].
    """
    strips = tl.cdiv(D, BN)
    program = tl.program_id(0)
    i = program // strips * BM + tl.arange(0, BM)
    n = program % strips * BN + tl.arange(0, BN)
    row = tl.load(index + i, mask=i < count, other=-1)
    if tl.max(row, 0) < 0:
        return
    seen = row >= 0
    tile = tl.zeros([BM, BN], dtype=tl.float32)
    for start in tl.range(0, RANK, BK):
        r = start + tl.arange(0, BK)
        pointers = low + i.to(tl.int64)[:, None] * LOW_STRIDE + r[None, :]
        x = tl.load(pointers, mask=seen[:, None] & (r < RANK)[None, :], other=0.0)
        if FEATURES_LAST:
            pointers = matrix + r.to(tl.int64)[:, None] * matrix_stride + n[None, :]
            m = tl.load(pointers, mask=(r < RANK)[:, None] & (n < D)[None, :], other=0.0)
        else:
            pointers = matrix + n.to(tl.int64)[:, None] * matrix_stride + r[None, :]
            m = tl.load(pointers, mask=(n < D)[:, None] & (r < RANK)[None, :], other=0.0).T
        tile = tl.dot(x, m, tile, input_precision=PRECISION)
    tile *= scale
    if KEEP:
        tile = tl.where(keep_tile(keep, i, n, seen, D, width), tile, 0.0)
    pointers = out + row.to(tl.int64)[:, None] * out_stride + n[None, :]
    mask = seen[:, None] & (n < D)[None, :]
    tile += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(pointers, tile.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count", "width", "chunk_rows"])
def plora_reduce(source, index, low, keep, out, scale, count, width, chunk_rows, D, source_stride,
                 RANK: tl.constexpr, LOW_STRIDE: tl.constexpr, FEATURES_LAST: tl.constexpr,
                 KEEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """out[chunk] = scale Σ_i source[index[i], :]ᵀ low[i, :] over a chunk's rows, features kept by
    dropout; fp32, [D, RANK] or (FEATURES_LAST) [RANK, D]. Rows of a chunk are summed in order, and
    so are chunks later: two runs are bit-equal."""
    strips: tl.constexpr = (RANK + BN - 1) // BN
    program = tl.program_id(0)
    chunk = tl.program_id(1)
    k = program // strips * BM + tl.arange(0, BM)
    j = program % strips * BN + tl.arange(0, BN)
    tile = tl.zeros([BM, BN], dtype=tl.float32)
    first = chunk * chunk_rows
    for start in tl.range(first, tl.minimum(first + chunk_rows, count), BK):
        i = start + tl.arange(0, BK)
        row = tl.load(index + i, mask=i < count, other=-1)
        seen = row >= 0
        pointers = source + row.to(tl.int64)[:, None] * source_stride + k[None, :]
        x = tl.load(pointers, mask=seen[:, None] & (k < D)[None, :], other=0.0)
        if KEEP:
            x = tl.where(keep_tile(keep, i, k, seen, D, width), x, 0.0)
        pointers = low + i.to(tl.int64)[:, None] * LOW_STRIDE + j[None, :]
        y = tl.load(pointers, mask=seen[:, None] & (j < RANK)[None, :], other=0.0)
        tile = tl.dot(x.T, y, tile, input_precision=PRECISION)
    part = out + chunk.to(tl.int64) * D * RANK
    if FEATURES_LAST:
        pointers = part + j.to(tl.int64)[None, :] * D + k[:, None]
    else:
        pointers = part + k.to(tl.int64)[:, None] * RANK + j[None, :]
    tl.store(pointers, tile * scale, mask=(k < D)[:, None] & (j < RANK)[None, :])


class _Visual:
    """Visual rows of a batch, with what dropout keeps of their features."""

    def __init__(self, rows: Tensor, features: int, threshold: int, seed: Tensor | None) -> None:
        self.rows, self.count = rows, rows.shape[0]
        self.width = triton.cdiv(features, 256) * 32
        self.keep = None
        if seed is not None:
            self.keep = torch.empty(self.count, self.width, dtype=torch.uint8, device=rows.device)
            grid = (triton.cdiv(self.count, 32), triton.cdiv(self.width, 32))
            plora_keep[grid](rows, seed, self.keep, self.count, self.width, threshold, BM=32, BN=32)

    def shrink(
        self, source: Tensor, matrix: Tensor, out: Tensor, scale: float, *,
        transposed: bool = False, dropout: bool = False,
    ) -> None:  # fmt: skip
        """out = scale source[rows] · matrixᵀ (or matrix, if transposed)."""
        rank = out.shape[1]
        tile = shrink_tile(rank, source.dtype)
        grid = (triton.cdiv(self.count, tile.m) * triton.cdiv(rank, tile.n),)
        plora_shrink[grid](
            source, self.rows, matrix, self.keep if dropout else None, out, scale, self.count,
            self.width, source.shape[1], source.stride(0), matrix.stride(0),
            RANK=rank, OUT_STRIDE=out.stride(0), FEATURES_LAST=not transposed,
            KEEP=dropout and self.keep is not None, **tile.constants(source.dtype),
        )  # fmt: skip

    def expand(
        self, low: Tensor, matrix: Tensor, out: Tensor, scale: float, *,
        transposed: bool = False, dropout: bool = False,
    ) -> None:  # fmt: skip
        """out[rows] += scale low · matrix (or matrixᵀ, if transposed)."""
        rank, features = low.shape[1], out.shape[1]
        tile = expand_tile(rank, out.dtype)
        grid = (triton.cdiv(self.count, tile.m) * triton.cdiv(features, tile.n),)
        plora_expand[grid](
            low, self.rows, matrix, self.keep if dropout else None, out, scale, self.count,
            self.width, features, matrix.stride(0), out.stride(0),
            RANK=rank, LOW_STRIDE=low.stride(0), FEATURES_LAST=not transposed,
            KEEP=dropout and self.keep is not None, **tile.constants(out.dtype),
        )  # fmt: skip

    def reduce(
        self, source: Tensor, low: Tensor, scale: float, *,
        transposed: bool = False, dropout: bool = False,
    ) -> Tensor:  # fmt: skip
        """scale source[rows]ᵀ · low, [features, rank], or its transpose; in source's dtype."""
        rank, features = low.shape[1], source.shape[1]
        tile = reduce_tile(rank, source.dtype)
        tiles = triton.cdiv(features, tile.m) * triton.cdiv(rank, tile.n)
        chunks = min(triton.cdiv(_PROGRAMS, tiles), triton.cdiv(self.count, _CHUNK_ROWS))
        chunk_rows = triton.cdiv(triton.cdiv(self.count, chunks), tile.k) * tile.k
        chunks = triton.cdiv(self.count, chunk_rows)
        shape = (rank, features) if transposed else (features, rank)
        parts = source.new_empty(chunks, *shape, dtype=torch.float32)
        plora_reduce[(tiles, chunks)](
            source, self.rows, low, self.keep if dropout else None, parts, scale, self.count,
            self.width, chunk_rows, features, source.stride(0),
            RANK=rank, LOW_STRIDE=low.stride(0), FEATURES_LAST=transposed,
            KEEP=dropout and self.keep is not None, **tile.constants(source.dtype),
        )  # fmt: skip
        return parts.sum(0).to(source.dtype)


def _matrix(t: Tensor) -> Tensor:
    """[rows, width], features side by side: a view where that is possible."""
    flat = t.reshape(-1, t.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


@_triton.launcher
def plora_linear_fwd(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    a: Tensor,
    b: list[Tensor],
    rows: Tensor,
    scaling: list[float],
    threshold: int,
    seed: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """The contract of `reference.plora_linear_fwd`; h is in the order of `rows`."""
    ys = [F.linear(x, w, bias).contiguous() for w, bias in zip(weights, biases, strict=True)]
    h = x.new_empty(rows.shape[0], a.shape[0])
    if rows.shape[0] == 0:
        return ys, h
    visual = _Visual(rows, x.shape[-1], threshold, seed)
    visual.shrink(_matrix(x), _matrix(a), h, 1.0, dropout=True)
    parts = h.split([b_i.shape[1] for b_i in b], 1)
    for y, part, b_i, s in zip(ys, parts, b, scaling, strict=True):
        visual.expand(part, _matrix(b_i), y.view(-1, y.shape[-1]), s, transposed=True)
    return ys, h


@_triton.launcher
def plora_linear_bwd(
    a: Tensor,
    dy: list[Tensor],
    x: Tensor | None,
    weights: list[Tensor],
    b: list[Tensor],
    h: Tensor | None,
    rows: Tensor,
    scaling: list[float],
    threshold: int,
    seed: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, list[Tensor]]:
    """The contract of `reference.plora_linear_bwd`."""
    want_x, want_weight, want_bias, want_a, want_b = output_mask
    grads = [_matrix(grad) for grad in dy]
    none = a.new_empty(0)
    dx, da, db = none, none, [none.clone() for _ in b]
    features = None if x is None else _matrix(x)
    if want_x:
        dx = grads[0] @ weights[0]
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            dx.addmm_(grad, weight)
    ranks = [b_i.shape[1] for b_i in b]
    if rows.shape[0] and (want_x or want_a or want_b):
        visual = _Visual(rows, a.shape[1], threshold, seed)
        if want_b:
            parts = zip(grads, h.split(ranks, 1), scaling, strict=True)
            db = [visual.reduce(grad, part, s) for grad, part, s in parts]
        if want_x or want_a:
            g = a.new_empty(rows.shape[0], a.shape[0])
            for grad, b_i, part, s in zip(grads, b, g.split(ranks, 1), scaling, strict=True):
                visual.shrink(grad, _matrix(b_i), part, s, transposed=True)
            if want_a:
                da = visual.reduce(features, g, 1.0, transposed=True, dropout=True)
            if want_x:
                visual.expand(g, _matrix(a), dx, 1.0, dropout=True)
    d_weight = [grad.T @ features if want_weight else none.clone() for grad in grads]
    d_bias = [grad.sum(0) if want_bias else none.clone() for grad in grads]
    if want_x:
        dx = dx.view(*dy[0].shape[:-1], a.shape[1])
    return dx, d_weight, d_bias, da, db


def variants(arch: int, dtype: torch.dtype) -> list[Variant]:
    """What this module asks Triton to compile, a rank for each tile.

    A matrix with features last and no dropout is left out: that is the form with dropout less one
    step.
    """
    features = _triton._TYPES[dtype]
    pointers = dict.fromkeys(("source", "matrix", "out", "low"), f"*{features}")
    pointers |= {"index": "*i32", "scale": "fp32", "keep": "*u8", "seed": "*i64"}
    found = [Variant("plora_keep", plora_keep, dtype, None, pointers, {"BM": 32, "BN": 32})]
    for rank in (8, 256):
        for kernel, tile, stride in (
            (plora_shrink, shrink_tile, "OUT_STRIDE"),
            (plora_expand, expand_tile, "LOW_STRIDE"),
            (plora_reduce, reduce_tile, "LOW_STRIDE"),
        ):
            for dropout in (True, False):
                kinds = pointers | ({"out": "*fp32"} if kernel is plora_reduce else {})
                constants = {"RANK": rank, stride: rank, "FEATURES_LAST": dropout, "KEEP": dropout}
                constants |= tile(rank, dtype).constants(dtype)
                if not dropout:
                    constants["keep"] = None
                name = f"{kernel.__name__} {rank}{' dropout' * dropout}"
                found.append(Variant(name, kernel, dtype, None, kinds, constants))
    return found
