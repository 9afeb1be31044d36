"""InfoNCE in Triton: log-sum-exps from tiles that are never stored, and a two-GEMM backward.

Costs at N images and texts of width D: forward 2 N² D FLOPs and 8 N²/128 bytes of partials;
backward 2 N² D in a kernel here and 4 N² D in library GEMMs, and 6 N² bytes of 16-bit weights
written once and read twice. docs/kernels/info_nce.md derives times from both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkern import _triton
from mmkern._triton import (
    LN2,
    LOG2E,
    SIZES,
    Config,
    Variant,
    mask_tile,
    similarity_tile,
    store_tile,
)

PARTIAL_BYTES = 256 << 20  # largest scratch of row partials; more rows are taken in bands

_MERGE_PARTIALS, _MERGE_COLUMNS = 32, 128  # tile of a merge

# Sums of 2^(x - reference) outside this window may have lost terms to underflow, or overflowed.
_LOW: tl.constexpr = tl.constexpr(2.0**-90)
_HIGH: tl.constexpr = tl.constexpr(2.0**120)


@triton.jit
def log_sum_exp_step(x, top, total, AXIS: tl.constexpr):
    """Running maximum and sum of exp(x - maximum), with the tile x taken in along AXIS.

    NaN stays: tl.max passes over it, x - top does not. +inf gives inf - inf, NaN as in a softmax.
    """
    new_top = tl.maximum(top, tl.max(x, AXIS))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # no term yet: exp(-inf), not NaN
    e = tl.exp2((x - tl.expand_dims(safe, AXIS)) * LOG2E)
    total = total * tl.exp2((top - safe) * LOG2E) + tl.sum(e, AXIS)
    return new_top, total


@triton.jit
def log_sum_exp(top, total):
    return tl.where(top == float("-inf"), 0.0, top) + tl.log2(total) * LN2


@triton.jit(do_not_specialize=SIZES)
def info_nce_partials(image, text, scale, row_partials, column_partials, inexact,
                      rows, columns, image_stride, text_stride, D, offset, chunks, chunk_rows,
                      BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                      DESCRIPTORS: tl.constexpr, FLATTEN: tl.constexpr, PRECISION: tl.constexpr,
                      EXACT: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Log-sum-exp of the negatives by tile row, and by column of a chunk.

    Against one reference for everything, 0.4 |scale|, an element costs one exponential that serves
    both directions and no maximum: with fp32's range that is exact for any row and column whose
    top logit lies between reference - 62 and reference + 60, so all unit-norm features at
    |scale| <= 43, and cosines above -0.22 at 100. Programs that find a sum outside the window
    (NaN included) say so in `inexact`; the launch with EXACT redoes those, and only those, with a
    maximum for each row and column. fp32 features take EXACT alone: their product is slower by far
    than two exponentials, and logits against a maximum keep one more bit.
    """
    program = tl.program_id(0)
    if EXACT and inexact is not None:  # noqa: SIM102 (settled at compile time)
        if tl.load(inexact + program) == 0:
            return
    chunk = program % chunks
    strip = program // chunks
    s = tl.load(scale).to(tl.float32)
    factor = s * LOG2E
    reference = 0.4 * tl.abs(factor)
    column = strip * BN
    start = chunk * chunk_rows
    stop = tl.minimum(start + chunk_rows, rows)
    row_out = row_partials + strip.to(tl.int64) * rows
    j = column + tl.arange(0, BN)
    outside = tl.zeros([BM], dtype=tl.int32)
    if EXACT:
        top = tl.full([BN], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BN], dtype=tl.float32)
    else:
        # A thread adds up its own rows; threads meet once, after the loop.
        total = tl.zeros([BM // (2 * GROUP), BN], dtype=tl.float32)

    for row in tl.range(start, stop, BM, flatten=FLATTEN):
        x = similarity_tile(image, text, row, column, rows, columns, image_stride, text_stride, D,
                            BM, BN, BK, DESCRIPTORS, PRECISION)  # fmt: skip
        i = row + tl.arange(0, BM)
        if EXACT:
            x = mask_tile(x * s, float("-inf"), row, column, rows, columns, offset, BM, BN)
            none = tl.full([BM], float("-inf"), dtype=tl.float32)
            row_top, row_sum = log_sum_exp_step(x, none, tl.zeros([BM], dtype=tl.float32), 1)
            tl.store(row_out + i, log_sum_exp(row_top, row_sum), mask=i < rows)
            top, total = log_sum_exp_step(x, top, total, 0)
        else:
            x = x * factor - reference
            x = mask_tile(x, float("-inf"), row, column, rows, columns, offset, BM, BN)
            e = tl.exp2(x)
            row_sum = tl.sum(e, 1)
            fits = (row_sum > _LOW) & (row_sum < _HIGH)
            outside = outside | tl.where(fits | (i >= rows), 0, 1)
            tl.store(row_out + i, (tl.log2(row_sum) + reference) * LN2, mask=i < rows)
            # Rows 8 apart (and 128 apart, in a tile of 256) are in one thread.
            if GROUP == 2:
                part = tl.sum(tl.sum(tl.reshape(e, [2, BM // 32, 2, 8, BN]), 2), 0)
            else:
                part = tl.sum(tl.reshape(e, [BM // 16, 2, 8, BN]), 1)
            total += tl.reshape(part, [BM // (2 * GROUP), BN])

    column_out = column_partials + chunk.to(tl.int64) * columns + j
    if EXACT:
        tl.store(column_out, log_sum_exp(top, total), mask=j < columns)
    else:
        column_sum = tl.sum(total, 0)
        tl.store(column_out, (tl.log2(column_sum) + reference) * LN2, mask=j < columns)
        fits = (column_sum > _LOW) & (column_sum < _HIGH)
        column_outside = tl.max(tl.where(fits | (j >= columns), 0, 1), 0)
        tl.store(inexact + program, tl.maximum(tl.max(outside, 0), column_outside))


@triton.jit(do_not_specialize=["count", "length"])
def info_nce_merge(partials, out, count, length, BP: tl.constexpr, BL: tl.constexpr):
    """out_j = log Σ_p exp(partials[p, j])."""
    j = tl.program_id(0) * BL + tl.arange(0, BL)
    top = tl.full([BL], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BL], dtype=tl.float32)
    for start in tl.range(0, count, BP):
        p = (start + tl.arange(0, BP)).to(tl.int64)
        mask = (p < count)[:, None] & (j < length)[None, :]
        x = tl.load(partials + p[:, None] * length + j[None, :], mask=mask, other=float("-inf"))
        top, total = log_sum_exp_step(x, top, total, 0)
    tl.store(out + j, log_sum_exp(top, total), mask=j < length)


@triton.jit
def any_far(lse, index, count, reference):
    """1 if exp(reference - lse) is no safe factor; 0, for lse = +inf (no label), is."""
    values = tl.load(lse + index, mask=index < count, other=float("inf"))
    near = (tl.abs(values - reference) < 52) | (values == float("inf"))
    return tl.max(tl.where(near, 0, 1), 0)


@triton.jit
def mask_positives(tile, fill, row, column, offset, BM: tl.constexpr, BN: tl.constexpr):
    """`fill` where column = row + offset."""
    if (row + offset < column + BN) & (row + BM + offset > column):
        i = row + offset + tl.arange(0, BM)
        tile = tl.where((column + tl.arange(0, BN))[None, :] == i[:, None], fill, tile)
    return tile


@triton.jit(do_not_specialize=SIZES)
def info_nce_weights(image, text, scale, row_lse, column_lse, weight,
                     rows, columns, image_stride, text_stride, weight_stride, D, offset,
                     chunks, chunk_rows,
                     BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                     DESCRIPTORS: tl.constexpr, FLATTEN: tl.constexpr, PRECISION: tl.constexpr,
                     EXACT: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    """2^SHIFT (exp(S - row_lse) + exp(S - column_lse)), 0 at the positives.

    Where the program's log-sum-exps lie within 52 of one reference, a single exponential serves
    both terms: exp(S - reference) (exp(reference - row_lse) + exp(reference - column_lse)). EXACT
    (fp32) always takes two, whose arguments are small where the weights are large.
    """
    program = tl.program_id(0)
    chunk = program % chunks
    strip = program // chunks
    s = tl.load(scale).to(tl.float32)
    reference = 0.4 * tl.abs(s)
    column = strip * BN
    j = column + tl.arange(0, BN)
    start = chunk * chunk_rows
    stop = tl.minimum(start + chunk_rows, rows)
    if EXACT:
        far = 1
    else:
        far = any_far(column_lse, j, columns, reference)
        for row in tl.range(start, stop, BM):
            far |= any_far(row_lse, row + tl.arange(0, BM), rows, reference)

    for row in tl.range(start, stop, BM, flatten=FLATTEN):
        x = similarity_tile(image, text, row, column, rows, columns, image_stride, text_stride, D,
                            BM, BN, BK, DESCRIPTORS, PRECISION)  # fmt: skip
        i = row + tl.arange(0, BM)
        # Read for each tile, from L1, and in either branch late: kept, the columns' would cost 32
        # registers a thread, and every one of 255 is taken.
        if far == 0:
            r = tl.load(row_lse + i, mask=i < rows, other=float("inf"))
            c = tl.load(column_lse + j, mask=j < columns, other=float("inf"))
            a = tl.exp2((reference - r) * LOG2E + SHIFT)
            b = tl.exp2((reference - c) * LOG2E + SHIFT)
            w = tl.exp2(x * (s * LOG2E) - reference * LOG2E) * (a[:, None] + b[None, :])
        else:
            r = tl.load(row_lse + i, mask=i < rows, other=float("inf"))
            w = tl.exp2((x * s - r[:, None]) * LOG2E + SHIFT)
            c = tl.load(column_lse + j, mask=j < columns, other=float("inf"))
            w += tl.exp2((x * s - c[None, :]) * LOG2E + SHIFT)
        w = mask_positives(w, 0.0, row, column, offset, BM, BN)
        store_tile(weight, w, row, column, rows, weight_stride, BM, BN, DESCRIPTORS)


@_triton.launcher
def info_nce_fwd(
    image: Tensor, text: Tensor, scale: Tensor, offset: int, dots: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of the negatives of each row and column, and the positives' logits.

    The contract of `reference.info_nce_fwd`, except that `dots` is not read: tiles of it are
    recomputed faster than loaded. fp64 raises NotImplementedError. Memory above inputs
    and outputs: PARTIAL_BYTES and 36 bytes a text, plus copies of features whose rows are not
    16-byte aligned.
    """
    image, text = _triton.padded(image), _triton.padded(text)
    rows, columns = image.shape[0], text.shape[0]
    config = _triton.pick(image, text)
    redo = _triton.configs(_triton.capability(image), image.dtype)[1]
    steps = [(config, False), (redo, True)] if _one_exponential(image.dtype) else [(config, True)]
    diagonal = _triton.positive_dots(image, text, offset) * scale.to(torch.float32).view(())
    row_lse, column_lse = torch.empty_like(diagonal), diagonal.new_empty(columns)

    strips = triton.cdiv(columns, config.block_n)
    band = max(PARTIAL_BYTES // (4 * strips) // config.block_m, 1) * config.block_m
    band = min(band, rows)
    bands = [
        (start, *_triton.chunked(min(band, rows - start), columns, config))
        for start in range(0, rows, band)
    ]
    # A shorter last band can have more chunks than the others.
    most = max(chunks for _, chunks, _ in bands)
    row_partials = diagonal.new_empty(strips * band)
    column_partials = diagonal.new_empty(1 + most, columns)  # [0]: the bands so far
    for start, chunks, chunk_rows in bands:
        part = image[start : start + band]
        inexact = None
        if len(steps) == 2:
            inexact = torch.empty(strips * chunks, dtype=torch.int32, device=image.device)
        for choice, exact in steps:
            info_nce_partials[(strips * chunks,)](
                **_triton.tile_arguments(part, text, choice),
                scale=scale, row_partials=row_partials, column_partials=column_partials[1:],
                inexact=inexact, offset=offset + start, chunks=chunks, chunk_rows=chunk_rows,
                EXACT=exact, GROUP=_group(choice), **choice.constants(image.dtype),
            )  # fmt: skip
        _merge(row_partials, strips, row_lse[start : start + band])
        first, last = start == 0, start + band >= rows
        out = column_lse if last else column_partials[0]
        _merge(column_partials[int(first) :], chunks + 1 - first, out)
    return row_lse, column_lse, diagonal


def _merge(partials: Tensor, count: int, out: Tensor) -> None:
    length = out.shape[0]
    grid = (triton.cdiv(length, _MERGE_COLUMNS),)
    info_nce_merge[grid](partials, out, count, length, BP=_MERGE_PARTIALS, BL=_MERGE_COLUMNS)


def _one_exponential(dtype: torch.dtype) -> bool:
    """Whether exponentials are worth saving, at an error that 16-bit features hide."""
    return dtype != torch.float32


def _group(config: Config) -> int:
    return 2 if config.block_m == 256 else 1


@_triton.launcher
def info_nce_bwd(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    offset: int,
    output_mask: list[bool],
    dots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Products with the off-diagonal softmax weights of both directions.

    The contract of `reference.info_nce_bwd`, `dots` as in the forward. Weights are held in
    the features' dtype, a block of at most `_triton.WEIGHT_BYTES` at a time.
    """
    width = image.shape[1]
    image, text = _triton.padded(image), _triton.padded(text)
    rows, columns = image.shape[0], text.shape[0]
    want_image, want_text = output_mask
    d_image = row_lse.new_empty((rows, width) if want_image else (0,))
    d_text = row_lse.new_empty((columns, width) if want_text else (0,))
    shift = _triton.weight_shift(image.dtype)
    buffer = None
    for r, c in _triton.weight_blocks(rows, columns, image.element_size()):
        if buffer is None:  # the first block is the largest
            buffer = _triton.weight_buffer(r.stop, c.stop, image)
        weight = buffer[: r.stop - r.start, : c.stop - c.start]
        _weights(image[r], text[c], scale, row_lse[r], column_lse[c],
                 offset + r.start - c.start, weight, shift)  # fmt: skip
        if want_image:
            _triton.add_product(
                d_image[r], weight, text[c, :width], first=c.start == 0, shift=shift
            )
        if want_text:
            _triton.add_product(
                d_text[c], weight.T, image[r, :width], first=r.start == 0, shift=shift
            )
    return d_image, d_text


def _weights(
    image: Tensor, text: Tensor, scale: Tensor, row_lse: Tensor, column_lse: Tensor,
    offset: int, weight: Tensor, shift: int,
) -> None:  # fmt: skip
    rows, columns = weight.shape
    config = _triton.pick(image, text)
    chunks, chunk_rows = _triton.chunked(rows, columns, config)
    strips = triton.cdiv(columns, config.block_n)
    info_nce_weights[(strips * chunks,)](
        **_triton.tile_arguments(image, text, config),
        scale=scale, row_lse=row_lse.contiguous(), column_lse=column_lse.contiguous(),
        weight=_triton.operand(weight, [config.block_m, config.block_n], config),
        weight_stride=weight.stride(0), offset=offset, chunks=chunks, chunk_rows=chunk_rows,
        EXACT=not _one_exponential(image.dtype), SHIFT=shift, **config.constants(image.dtype),
    )  # fmt: skip


def variants(arch: int, dtype: torch.dtype) -> list[Variant]:
    """Everything this module can ask Triton to compile for one architecture and dtype."""
    floats = ("scale", "row_partials", "column_partials", "row_lse", "column_lse")
    arguments = dict.fromkeys(floats, "*fp32") | {"inexact": "*i32"}
    fast = _one_exponential(dtype)
    large, small = _triton.configs(arch, dtype)
    merge = {"BP": _MERGE_PARTIALS, "BL": _MERGE_COLUMNS}
    pointers = {"partials": "*fp32", "out": "*fp32"}
    found = [
        _triton.positives_variant(dtype),
        Variant("info_nce_merge", info_nce_merge, dtype, None, pointers, merge),
    ]
    for config in dict.fromkeys((large, small)):
        exacts = ([False] if fast else []) + ([True] if config == small else [])
        for exact in exacts:
            name = f"info_nce_partials{'_exact' * exact} {config.name}"
            constants: dict[str, object] = {"EXACT": exact, "GROUP": _group(config)}
            if not fast:
                constants["inexact"] = None
            found.append(Variant(name, info_nce_partials, dtype, config, arguments, constants))
        constants = {"EXACT": not fast, "SHIFT": _triton.weight_shift(dtype)}
        name = f"info_nce_weights {config.name}"
        found.append(Variant(name, info_nce_weights, dtype, config, arguments, constants))
    return found
