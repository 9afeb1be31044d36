"""The sigmoid contrastive loss of SigLIP, at any batch size in linear memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmkern import _checks, _library
from mmkern._distributed import RowShard
from mmkern.ops.sigmoid_contrastive import reference


def _fake_fwd(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int
) -> tuple[Tensor, Tensor]:
    row = image.new_empty(image.shape[0], dtype=_checks.accumulator(image.dtype))
    return row, torch.empty_like(row)


def _fake_fwd_bwd(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    row, diagonal = _fake_fwd(image, text, scale, bias, offset)
    d_image = row.new_empty(image.shape if output_mask[0] else (0,))
    d_text = row.new_empty(text.shape if output_mask[1] else (0,))
    return row, diagonal, torch.empty_like(row), d_image, d_text


def _flops_fwd(image: Any, text: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(2 * image[0] * text[0] * image[1])


def _flops_fwd_bwd(
    image: Any,
    text: Any,
    scale: Any,
    bias: Any,
    offset: Any,
    output_mask: list[bool],
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    return int(2 * (1 + sum(output_mask)) * image[0] * text[0] * image[1])


_fwd = _library.define(
    "sigmoid_contrastive_fwd(Tensor image, Tensor text, Tensor scale, Tensor bias, SymInt offset)"
    " -> (Tensor row_loss, Tensor diagonal)",
    reference=reference.sigmoid_contrastive_fwd,
    fake=_fake_fwd,
    triton="mmkern.ops.sigmoid_contrastive.triton:sigmoid_contrastive_fwd",
    flops=_flops_fwd,
)
_fwd_bwd = _library.define(
    "sigmoid_contrastive_fwd_bwd(Tensor image, Tensor text, Tensor scale, Tensor bias,"
    " SymInt offset, bool[2] output_mask)"
    " -> (Tensor row_loss, Tensor diagonal, Tensor row_grad, Tensor d_image, Tensor d_text)",
    reference=reference.sigmoid_contrastive_fwd_bwd,
    fake=_fake_fwd_bwd,
    triton="mmkern.ops.sigmoid_contrastive.triton:sigmoid_contrastive_fwd_bwd",
    flops=_flops_fwd_bwd,
)


def sigmoid_contrastive(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Mean over images of the pairwise sigmoid loss, without the N x N matrix.

    .. math::
        X = s\, I T^\top + b, \qquad
        L = -\frac1N \sum_{ij} \log \sigma(z_{ij} X_{ij}), \quad z_{ii} = 1,\ z_{i \ne j} = -1

    SigLIP (Zhai et al. 2023, arXiv 2303.15343, section 3.2). Where a gradient is wanted it is
    formed in the forward's pass over the tiles of X: 6 N² D FLOPs in all, O((N + M) D) memory.

    Args:
        image: [N, D] in fp32, bf16, fp16 or fp64, any strides. The caller normalises the rows.
        text: [M, D], M >= N, same dtype. Row i belongs to image i; rows from N on are further
            negatives of every image.
        logit_scale: s (not its logarithm), a number or a tensor of shape [] or [1].
        logit_bias: b, likewise.
        group: each rank passes its local rows, equal counts or not, and gets the loss of the whole
            batch. Gradients are scaled by the number of ranks, so that the average DDP takes is
            the gradient of this loss.

    Returns:
        0-d tensor, fp32 (fp64 for fp64 inputs). Under autocast, inputs are cast as for a matmul.

    Saved for backward: both gradients in fp32, which the upstream gradient then scales. Two runs
    are bit-equal. A second derivative raises NotImplementedError.

    Raises:
        ValueError: N = 0 (on every rank, if it holds for one), shapes, devices.
        TypeError: dtypes that differ or are not floating point.
    """
    op = "sigmoid_contrastive"
    _checks.feature_pair(op, image, text)
    scale = _checks.scalar(op, "logit_scale", logit_scale, image)
    bias = _checks.scalar(op, "logit_bias", logit_bias, image)
    image, text = _checks.autocast(image, text)
    shard = RowShard.of(op, image, text, group)
    with _checks.exact(image):
        if torch.is_grad_enabled() and any(t.requires_grad for t in (image, text, scale, bias)):
            loss: Tensor = _SigmoidContrastive.apply(image, text, scale, bias, shard)
            return loss
        row_loss, diagonal = _fwd(image, shard.gather(text), scale, bias, shard.offset)
        return _mean_loss(row_loss, diagonal, shard)


def _mean_loss(row_loss: Tensor, diagonal: Tensor, shard: RowShard) -> Tensor:
    positives = torch.logaddexp(-diagonal, torch.zeros_like(diagonal))
    return shard.sum((row_loss + positives).sum()) / sum(shard.images)


class _SigmoidContrastive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, shard: RowShard
    ) -> Tensor:
        texts = shard.gather(text)
        want_image, want_text, want_scale, _ = ctx.needs_input_grad[:4]
        # Either product gives the scale's gradient; the image's is the smaller one.
        mask = [want_image or (want_scale and not want_text), want_text]
        row_loss, diagonal, row_grad, d_image, d_text = _fwd_bwd(
            image, texts, scale, bias, shard.offset, mask
        )
        dtype = row_loss.dtype
        own = slice(shard.offset, shard.offset + image.shape[0])
        positive = -(-diagonal).sigmoid()
        images = image.to(dtype)  # once, not by every product below
        if mask[0]:
            d_image.addcmul_(positive[:, None], texts[own])
        if mask[1]:
            d_text[own].addcmul_(positive[:, None], images)
        d_bias = (row_grad + positive).sum()
        d_scale = torch.zeros_like(d_bias)
        if want_scale:
            products = (d_image, images) if mask[0] else (d_text, texts)
            d_scale = (products[0] * products[1]).sum(dtype=dtype)
        ctx.save_for_backward(d_image, shard.reduce_scatter(d_text), scale, d_scale, bias, d_bias)
        ctx.factor, ctx.dtype = shard.world / sum(shard.images), image.dtype
        return _mean_loss(row_loss, diagonal, shard)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _checks.first_derivative_only("sigmoid_contrastive")
        d_image, d_text, scale, d_scale, bias, d_bias = ctx.saved_tensors
        want_image, want_text, want_scale, want_bias = ctx.needs_input_grad[:4]
        # DDP divides by the number of ranks; scaling by it here leaves the global gradient.
        factor = grad.to(d_scale.dtype) * ctx.factor
        scaled = factor * scale.to(factor.dtype).view(())
        return (
            (d_image * scaled).to(ctx.dtype) if want_image else None,
            (d_text * scaled).to(ctx.dtype) if want_text else None,
            (d_scale * factor).to(scale.dtype).view(scale.shape) if want_scale else None,
            (d_bias * factor).to(bias.dtype).view(bias.shape) if want_bias else None,
            None,
        )
