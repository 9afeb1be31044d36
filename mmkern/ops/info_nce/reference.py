"""InfoNCE in plain PyTorch, one band of rows at a time: the truth the kernels are held to."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 1024  # image rows in a band; a band of logits is [ROWS, M]


def info_nce_fwd(
    image: Tensor, text: Tensor, scale: Tensor, offset: int, dots: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of the negatives of each row and column, and the positives' logits.

    S = scale · image · textᵀ; the positive of row i is column i + offset.

    Args:
        image: [B, D].
        text: [M, D], M >= offset + B.
        scale: one element.
        offset: column of the first row's positive.
        dots: image · textᵀ [B, M] in the accumulator's dtype, where the caller has it.

    Returns:
        row_lse [B], column_lse [M] (over the B rows), diagonal [B]; fp32, or fp64 for fp64 inputs.
        An empty set of negatives gives -inf. NaN, and +inf as in a dense softmax, give NaN.
    """
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    columns = text.to(dtype)
    row_lse = image.new_empty(image.shape[0], dtype=dtype)
    diagonal = torch.empty_like(row_lse)
    column_lse = image.new_full((text.shape[0],), -torch.inf, dtype=dtype)
    for start in range(0, image.shape[0], ROWS):
        stop = min(start + ROWS, image.shape[0])
        rows = image[start:stop].to(dtype)
        logits = (rows @ columns.T if dots is None else dots[start:stop]) * scale.to(dtype)
        positive = logits.diagonal(start + offset)  # a view: writing it masks the positives
        diagonal[start:stop] = positive[: stop - start]
        positive[: stop - start] = -torch.inf
        row_lse[start:stop] = _log_sum_exp(logits, 1)
        column_lse = torch.logaddexp(column_lse, _log_sum_exp(logits, 0))
    return row_lse, column_lse, diagonal


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

    W_ij = exp(S_ij - row_lse_i) + exp(S_ij - column_lse_j), and 0 where j = i + offset.

    Args:
        row_lse: [B], log-sum-exp over all columns, the positive included.
        column_lse: [M], log-sum-exp over all rows; +inf for a column without a label.
        output_mask: which of the two results are wanted; the other is returned empty.
        dots: as in info_nce_fwd.

    Returns:
        W · text [B, D] and Wᵀ · image [M, D], in fp32 (fp64 for fp64 inputs), unscaled.
    """
    dtype = row_lse.dtype
    columns = text.to(dtype)
    want_image, want_text = output_mask
    d_image = image.new_empty(image.shape if want_image else (0,), dtype=dtype)
    d_text = image.new_zeros(text.shape if want_text else (0,), dtype=dtype)
    for start in range(0, image.shape[0], ROWS):
        stop = min(start + ROWS, image.shape[0])
        rows = image[start:stop].to(dtype)
        logits = (rows @ columns.T if dots is None else dots[start:stop]) * scale.to(dtype)
        weight = (logits - row_lse[start:stop, None]).exp() + (logits - column_lse).exp()
        weight.diagonal(start + offset)[: stop - start] = 0
        if want_image:
            d_image[start:stop] = weight @ columns
        if want_text:
            d_text += weight.T @ rows
    return d_image, d_text


def _log_sum_exp(logits: Tensor, dim: int) -> Tensor:
    """As torch.logsumexp, but +inf among the logits gives NaN, as a softmax over them does."""
    top = logits.amax(dim, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    return top.squeeze(dim) + (logits - top).exp().sum(dim).log()
