"""Sigmoid contrastive loss in Triton: row sums and 16-bit weights from one pass over the tiles.

Costs at N images and texts of width D: 2 N² D FLOPs here, 4 N² D in library GEMMs, and 6 N² bytes
of weights written once and read twice; the forward alone has neither GEMMs nor weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkern import _triton
from mmkern._triton import LN2, LOG2E, SIZES, Variant, mask_tile, similarity_tile, store_tile


@triton.jit
def log1p_unit(e):
    """log(1 + e) for 0 <= e <= 1 to 1e-7 of itself. log2(1 + e) would lose small e, and a call
    of log1p costs a branch and a division; this is nine multiply-adds."""
    p = -0.0044662116
    p = p * e + 0.0252240544
    p = p * e - 0.0667577251
    p = p * e + 0.115618454
    p = p * e - 0.158475657
    p = p * e + 0.198541062
    p = p * e - 0.249865262
    p = p * e + 0.333328419
    p = p * e - 0.49999997
    return (p * e + 1.0) * e


@triton.jit
def fold(q, BM: tl.constexpr, N: tl.constexpr):
    """(1 + a)(1 + b) - 1, which keeps what is far below 1, of the left and right half of a tile."""
    a, b = tl.split(tl.permute(tl.reshape(q, [BM, 2, N // 2]), [0, 2, 1]))
    return a + b + a * b


@triton.jit
def log1p(q):
    """log(1 + q) for q >= 0, to fp32's precision."""
    return tl.where(q < 1, log1p_unit(q), tl.log2(1.0 + q) * LN2)


@triton.jit(do_not_specialize=SIZES)
def sigmoid_tiles(image, text, scale, bias, loss_partials, grad_partials, weight,
                  rows, columns, image_stride, text_stride, weight_stride, D, offset,
                  chunks, chunk_rows,
                  BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                  DESCRIPTORS: tl.constexpr, FLATTEN: tl.constexpr, PRECISION: tl.constexpr,
                  GRADIENT: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    """Row sums over a strip of log(1 + exp X) and, with GRADIENT, of sigmoid(X); weights
    2^SHIFT sigmoid(X). Positives give 0 in all of them."""
    program = tl.program_id(0)
    chunk = program % chunks
    strip = program // chunks
    factor = tl.load(scale).to(tl.float32)
    shift = tl.load(bias).to(tl.float32)
    column = strip * BN
    start = chunk * chunk_rows
    stop = tl.minimum(start + chunk_rows, rows)
    partial = strip.to(tl.int64) * rows
    for row in tl.range(start, stop, BM, flatten=FLATTEN):
        x = similarity_tile(image, text, row, column, rows, columns, image_stride, text_stride, D,
                            BM, BN, BK, DESCRIPTORS, PRECISION) * factor + shift  # fmt: skip
        x = mask_tile(x, float("-inf"), row, column, rows, columns, offset, BM, BN)
        i = row + tl.arange(0, BM)
        # log(1 + exp x) = max(x, 0) + log(1 + e) with e = exp -|x|. Sixteen logarithms are one, of
        # the product of columns that a thread has anyway. From here on one number a logit, e with
        # the sign of -x, so that a tile fits in registers. It is never +0, which would read as a
        # negative x; NaN, which tl.maximum drops, is in it.
        loss = tl.sum(tl.maximum(x, 0.0), 1)
        e = tl.exp2(-tl.abs(x) * LOG2E)
        e = tl.where(x <= 0, -e, e + 1e-37)
        products = fold(fold(fold(fold(tl.abs(e), BM, BN), BM, BN // 2), BM, BN // 4), BM, BN // 8)
        loss += tl.sum(log1p(products), 1)
        tl.store(loss_partials + partial + i, loss, mask=i < rows)
        if GRADIENT:
            w = tl.where(e <= 0, -e, 1.0) / (1.0 + tl.abs(e))
            tl.store(grad_partials + partial + i, tl.sum(w, 1), mask=i < rows)
            if SHIFT:
                w *= 2.0**SHIFT
            store_tile(weight, w, row, column, rows, weight_stride, BM, BN, DESCRIPTORS)


@_triton.launcher
def sigmoid_contrastive_fwd(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int
) -> tuple[Tensor, Tensor]:
    """Loss of each row's negatives, and the positives' logits.

    The contract of `reference.sigmoid_contrastive_fwd`; fp64 raises NotImplementedError.
    """
    row_loss, diagonal, *_ = _run(image, text, scale, bias, offset, [False, False], gradient=False)
    return row_loss, diagonal


@_triton.launcher
def sigmoid_contrastive_fwd_bwd(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As sigmoid_contrastive_fwd, with the gradient in the same pass.

    The contract of `reference.sigmoid_contrastive_fwd_bwd`; fp64 raises NotImplementedError.
    Weights are held in the features' dtype, a block of at most `_triton.WEIGHT_BYTES` at a time.
    """
    return _run(image, text, scale, bias, offset, output_mask, gradient=True)


def _run(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int,
    output_mask: list[bool], *, gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    width = image.shape[1]
    image, text = _triton.padded(image), _triton.padded(text)
    rows, columns = image.shape[0], text.shape[0]
    diagonal = _triton.positive_dots(image, text, offset)
    diagonal = diagonal * scale.to(torch.float32).view(()) + bias.to(torch.float32).view(())
    want_image, want_text = output_mask
    row_loss, row_grad = torch.zeros_like(diagonal), torch.zeros_like(diagonal)
    d_image = diagonal.new_empty((rows, width) if want_image else (0,))
    d_text = diagonal.new_empty((columns, width) if want_text else (0,))
    shift = _triton.weight_shift(image.dtype)
    buffer = None
    for r, c in _triton.weight_blocks(rows, columns, image.element_size()):
        if buffer is None and gradient:  # the first block is the largest
            buffer = _triton.weight_buffer(r.stop, c.stop, image)
        weight = buffer[: r.stop - r.start, : c.stop - c.start] if gradient else None
        loss, grad = _tiles(image[r], text[c], scale, bias, offset + r.start - c.start, weight)
        row_loss[r] += loss
        if grad is not None:
            row_grad[r] += grad
        if want_image:
            _triton.add_product(
                d_image[r], weight, text[c, :width], first=c.start == 0, shift=shift
            )
        if want_text:
            _triton.add_product(
                d_text[c], weight.T, image[r, :width], first=r.start == 0, shift=shift
            )
    return row_loss, diagonal, row_grad, d_image, d_text


def _tiles(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Row sums of the losses and, where there is a block for the weights, of the gradient."""
    rows, columns = image.shape[0], text.shape[0]
    config = _triton.pick(image, text)
    chunks, chunk_rows = _triton.chunked(rows, columns, config)
    strips = triton.cdiv(columns, config.block_n)
    partials = image.new_empty(1 if weight is None else 2, strips, rows, dtype=torch.float32)
    block, stride = None, 0
    if weight is not None:
        block = _triton.operand(weight, [config.block_m, config.block_n], config)
        stride = weight.stride(0)
    sigmoid_tiles[(strips * chunks,)](
        **_triton.tile_arguments(image, text, config),
        scale=scale, bias=bias, loss_partials=partials[0],
        grad_partials=None if weight is None else partials[1],
        weight=block, weight_stride=stride, offset=offset, chunks=chunks, chunk_rows=chunk_rows,
        GRADIENT=weight is not None, SHIFT=_triton.weight_shift(image.dtype),
        **config.constants(image.dtype),
    )  # fmt: skip
    sums = partials.sum(1)
    return sums[0], None if weight is None else sums[1]


def variants(arch: int, dtype: torch.dtype) -> list[Variant]:
    """Everything this module can ask Triton to compile for one architecture and dtype."""
    arguments = dict.fromkeys(("scale", "bias", "loss_partials", "grad_partials"), "*fp32")
    found = []
    for config in dict.fromkeys(_triton.configs(arch, dtype)):
        for gradient in (False, True):
            constants: dict[str, object] = {
                "GRADIENT": gradient,
                "SHIFT": _triton.weight_shift(dtype),
            }
            if not gradient:
                constants |= {"weight": None, "grad_partials": None, "weight_stride": 0}
            name = f"sigmoid_{'weights' if gradient else 'sums'} {config.name}"
            found.append(Variant(name, sigmoid_tiles, dtype, config, arguments, constants))
    return found
