"""InfoNCE, the symmetric contrastive loss of CLIP, at any batch size in linear memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmkern import _checks, _library
from mmkern._distributed import RowShard
from mmkern.ops.info_nce import reference

# Up to this size fp32 products on a CPU are kept for the backward: three quarters of the work.
KEPT_BYTES = 32 << 20


def _fake_fwd(
    image: Tensor, text: Tensor, scale: Tensor, offset: int, dots: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    row = image.new_empty(image.shape[0], dtype=_checks.accumulator(image.dtype))
    return row, row.new_empty(text.shape[0]), torch.empty_like(row)


def _fake_bwd(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    offset: int,
    output_mask: list[bool],
    dots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    d_image = row_lse.new_empty(image.shape if output_mask[0] else (0,))
    return d_image, row_lse.new_empty(text.shape if output_mask[1] else (0,))


def _flops_fwd(
    image: Any,
    text: Any,
    scale: Any,
    offset: Any,
    dots: Any = None,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    return int(2 * (dots is None) * image[0] * text[0] * image[1])


def _flops_bwd(
    image: Any,
    text: Any,
    scale: Any,
    row: Any,
    column: Any,
    offset: Any,
    output_mask: list[bool],
    dots: Any = None,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    return int(2 * ((dots is None) + sum(output_mask)) * image[0] * text[0] * image[1])


_fwd = _library.define(
    "info_nce_fwd(Tensor image, Tensor text, Tensor scale, SymInt offset,"
    " Tensor? dots=None) -> (Tensor row_lse, Tensor column_lse, Tensor diagonal)",
    reference=reference.info_nce_fwd,
    fake=_fake_fwd,
    triton="mmkern.ops.info_nce.triton:info_nce_fwd",
    flops=_flops_fwd,
)
_bwd = _library.define(
    "info_nce_bwd(Tensor image, Tensor text, Tensor scale, Tensor row_lse, Tensor column_lse,"
    " SymInt offset, bool[2] output_mask, Tensor? dots=None) -> (Tensor d_image, Tensor d_text)",
    reference=reference.info_nce_bwd,
    fake=_fake_bwd,
    triton="mmkern.ops.info_nce.triton:info_nce_bwd",
    flops=_flops_bwd,
)


def info_nce(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    *,
    label_smoothing: float = 0.0,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Symmetric cross-entropy over the similarities of N pairs, without the N x N matrix.

    .. math::
        S = s\, I T^\top, \qquad
        L = \tfrac12 \big( \mathrm{CE}(S, \mathrm{arange}(N))
                         + \mathrm{CE}(S^\top, \mathrm{arange}(N)) \big)

    CLIP (Radford et al. 2021, arXiv 2103.00020, figure 3). Row and column statistics come from the
    same tiles of S, the backward recomputes them: 8 N² D FLOPs in all (6 where the products are
    kept), O((N + M) D) memory.

    Args:
        image: [N, D] in fp32, bf16, fp16 or fp64, any strides. The caller normalises the rows.
        text: [M, D], M >= N, same dtype. Row i belongs to image i; rows from N on are further
            negatives of every image and have no loss of their own.
        logit_scale: s (not its logarithm), a number or a tensor of shape [] or [1].
        label_smoothing: as in ``torch.nn.functional.cross_entropy``, in both directions.
        group: each rank passes its local rows, equal counts or not, and gets the loss of the whole
            batch. Gradients, that of `logit_scale` included, are scaled by the number of ranks, so
            that the average DDP takes is the gradient of this loss.

    Returns:
        0-d tensor, fp32 (fp64 for fp64 inputs). Under autocast, inputs are cast as for a matmul.

    Saved for backward: the inputs and 2 N + M numbers, and on a CPU in fp32 the N M products where
    they take at most 32 MiB. Sums are fp32 and the scale is applied to them, not to the inputs; the
    loss keeps full relative precision down to where it underflows. Two runs are bit-equal. A second
    derivative raises NotImplementedError.

    Raises:
        ValueError: N = 0 (on every rank, if it holds for one), shapes, devices, label_smoothing.
        TypeError: dtypes that differ or are not floating point.
    """
    op = "info_nce"
    _checks.feature_pair(op, image, text)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    scale = _checks.scalar(op, "logit_scale", logit_scale, image)
    image, text = _checks.autocast(image, text)
    shard = RowShard.of(op, image, text, group)
    with _checks.exact(image):
        if torch.is_grad_enabled() and any(t.requires_grad for t in (image, text, scale)):
            loss: Tensor = _InfoNCE.apply(image, text, scale, label_smoothing, shard)
            return loss
        return _forward(image, shard.gather(text), scale, label_smoothing, shard, ())[0]


def _kept(image: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
    """The products of all pairs, if the backward should find them, for both operators to use."""
    size = 4 * image.shape[0] * texts.shape[0]
    if image.device.type != "cpu" or image.dtype != torch.float32 or size > KEPT_BYTES:
        return ()
    return (image @ texts.T,)


def _forward(
    image: Tensor,
    texts: Tensor,
    scale: Tensor,
    smoothing: float,
    shard: RowShard,
    kept: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and what the backward needs: row LSE, column LSE, positives' gradient.

    `texts` are all ranks', [M, D].
    """
    count, own = sum(shard.images), shard.texts[shard.rank]
    row, column, diagonal = _fwd(image, texts, scale, shard.offset, *kept)
    # Column statistics cover local rows only: collect all ranks' for the texts of this one.
    column = shard.log_sum_exp(column)[: image.shape[0]]
    # LSE - S_ii as log(1 + exp(negatives - S_ii)): exact where the loss is far below 1.
    row_margin, column_margin = row - diagonal, column - diagonal
    zero = torch.zeros_like(diagonal)
    losses = torch.logaddexp(row_margin, zero) + torch.logaddexp(column_margin, zero)
    total = losses.sum()
    if smoothing:
        mean_text = _mean_text(texts, count, shard, diagonal.dtype)
        mean = image.sum(0, dtype=diagonal.dtype) @ mean_text * scale.to(diagonal.dtype).view(())
        total = total + smoothing * (2 * diagonal.sum() - mean)
    loss = shard.sum(total) / (2 * count)

    column_lse = diagonal.new_full((own,), torch.inf)
    column_lse[: image.shape[0]] = torch.logaddexp(column, diagonal)
    positive = 2 * smoothing - row_margin.sigmoid() - column_margin.sigmoid()
    return loss, torch.logaddexp(row, diagonal), shard.gather(column_lse), positive


def _mean_text(texts: Tensor, count: int, shard: RowShard, dtype: torch.dtype) -> Tensor:
    """Σ_j T_j / M over all columns plus Σ_j T_j / N over labelled ones: what smoothing adds."""
    every = texts.sum(0, dtype=dtype)
    if texts.shape[0] == count:
        return every * (2 / count)
    parts = zip(texts.split(shard.texts), shard.images, strict=True)
    labelled = torch.stack([part[:rows].sum(0, dtype=dtype) for part, rows in parts]).sum(0)
    return every / texts.shape[0] + labelled / count


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, smoothing: float, shard: RowShard
    ) -> Tensor:
        texts = shard.gather(text)
        kept = _kept(image, texts)
        loss, row_lse, column_lse, positive = _forward(image, texts, scale, smoothing, shard, kept)
        ctx.save_for_backward(image, texts, scale, row_lse, column_lse, positive, *kept)
        ctx.smoothing, ctx.shard = smoothing, shard
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _checks.first_derivative_only("info_nce")
        with _checks.exact(grad):
            return (*_backward(ctx, grad), None, None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of image, text and scale."""
    image, texts, scale, row_lse, column_lse, positive, *kept = ctx.saved_tensors
    shard: RowShard = ctx.shard
    want_image, want_text, want_scale = ctx.needs_input_grad[:3]
    # Either product gives the scale's gradient; the image's is the smaller one.
    mask = [want_image or (want_scale and not want_text), want_text]
    d_image, d_text = _bwd(image, texts, scale, row_lse, column_lse, shard.offset, mask, *kept)

    count, start = sum(shard.images), shard.offset
    own = slice(start, start + image.shape[0])
    dtype = row_lse.dtype
    positive = positive[:, None]
    images = image.to(dtype)  # once, not by every product below
    if mask[0]:
        d_image.addcmul_(positive, texts[own])
        if ctx.smoothing:
            d_image -= ctx.smoothing * _mean_text(texts, count, shard, dtype)
    if mask[1]:
        d_text[own].addcmul_(positive, images)
        if ctx.smoothing:
            weight = shard.labelled(texts.device).to(dtype) / count + 1 / texts.shape[0]
            mean_image = images.sum(0) * ctx.smoothing
            d_text.addcmul_(weight[:, None], mean_image, value=-1)

    # DDP divides by the number of ranks; scaling by it here leaves the global gradient.
    factor = grad.to(dtype) * (shard.world / (2 * count))
    d_scale = None
    if want_scale:
        products = (d_image, images) if mask[0] else (d_text, texts)
        d_scale = (products[0] * products[1]).sum(dtype=dtype) * factor
        d_scale = d_scale.to(scale.dtype).view(scale.shape)
    factor = factor * scale.to(dtype).view(())
    grad_image = d_image.mul_(factor).to(image.dtype) if want_image else None
    grad_text = None
    if want_text:
        grad_text = shard.reduce_scatter(d_text).mul_(factor).to(texts.dtype)
    return grad_image, grad_text, d_scale
