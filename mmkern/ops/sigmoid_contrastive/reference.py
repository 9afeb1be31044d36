"""Sigmoid contrastive loss in plain PyTorch, one band of rows at a time: the truth."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 1024  # image rows in a band; a band of logits is [ROWS, M]


def sigmoid_contrastive_fwd(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int
) -> tuple[Tensor, Tensor]:
    """Loss of each row's negatives, and the positives' logits.

    X = scale · image · textᵀ + bias; the positive of row i is column i + offset.

    Returns:
        row_loss [B] = Σ_{j ≠ i + offset} log(1 + exp X_ij) and diagonal [B] = X at the positives;
        fp32, or fp64 for fp64 inputs.
    """
    row_loss, diagonal, *_ = sigmoid_contrastive_fwd_bwd(
        image, text, scale, bias, offset, [False, False]
    )
    return row_loss, diagonal


def sigmoid_contrastive_fwd_bwd(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As sigmoid_contrastive_fwd, with the gradient in the same pass (nothing needs all of X).

    G_ij = σ(X_ij), and 0 where j = i + offset.

    Args:
        output_mask: which of d_image, d_text are wanted; the other is returned empty.

    Returns:
        row_loss [B], diagonal [B], row_grad [B] = Σ_j G_ij, d_image [B, D] = G · text,
        d_text [M, D] = Gᵀ · image; fp32 (fp64 for fp64 inputs), unscaled.
    """
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    columns = text.to(dtype)
    want_image, want_text = output_mask
    row_loss = image.new_empty(image.shape[0], dtype=dtype)
    diagonal, row_grad = torch.empty_like(row_loss), torch.empty_like(row_loss)
    d_image = image.new_empty(image.shape if want_image else (0,), dtype=dtype)
    d_text = image.new_zeros(text.shape if want_text else (0,), dtype=dtype)
    for start in range(0, image.shape[0], ROWS):
        stop = min(start + ROWS, image.shape[0])
        rows = image[start:stop].to(dtype)
        logits = (rows @ columns.T) * scale.to(dtype) + bias.to(dtype)  # [R, M]
        positive = logits.diagonal(start + offset)  # a view: writing it masks the positives
        diagonal[start:stop] = positive[: stop - start]
        positive[: stop - start] = -torch.inf
        row_loss[start:stop] = F.softplus(logits, threshold=50).sum(1)
        weight = logits.sigmoid()
        row_grad[start:stop] = weight.sum(1)
        if want_image:
            d_image[start:stop] = weight @ columns
        if want_text:
            d_text += weight.T @ rows
    return row_loss, diagonal, row_grad, d_image, d_text
