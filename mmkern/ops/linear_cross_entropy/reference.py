"""Linear cross-entropy in plain PyTorch, one band of labelled rows at a time: the truth."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 512  # labelled rows in a band; a band of logits is [ROWS, V]


def linear_cross_entropy_fwd(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    mean: bool,
    kept_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exp of the logits but the label's, the label's logit, and the mean of all.

    S = hidden · weightᵀ + bias, on the rows whose label is not `ignore_index`.

    Args:
        hidden: [M, H].
        weight: [V, H].
        labels: [M], int64.
        bias: [V] or None.
        mean: whether the mean logits are wanted (label smoothing is what needs them).
        kept_bytes: room for what this backend's backward may find useful; nothing, here.

    Returns:
        negatives [M], positives [M], means [M] or [0], in fp32 (fp64 for fp64 inputs), and a
        uint8 buffer [kept_bytes]. An ignored row has -inf, 0 and 0, so that its loss is 0.

    Raises:
        ValueError: a label outside [0, V), on a CPU. On a GPU the gather below asserts.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    count, vocabulary = hidden.shape[0], weight.shape[0]
    negatives = hidden.new_full((count,), -torch.inf, dtype=dtype)
    positives = hidden.new_zeros(count, dtype=dtype)
    means = hidden.new_zeros(count if mean else 0, dtype=dtype)
    for index, label in _bands(labels, ignore_index, vocabulary):
        logits = _logits(hidden[index], weight, bias, dtype)
        column = label[:, None]
        positive = logits.gather(1, column).squeeze(1)
        positives[index] = torch.where(positive == torch.inf, torch.nan, positive)
        if mean:
            means[index] = logits.mean(1)
        negatives[index] = _log_sum_exp(logits.scatter_(1, column, -torch.inf))
    kept = torch.empty(kept_bytes, dtype=torch.uint8, device=hidden.device)
    return negatives, positives, means, kept


def linear_cross_entropy_bwd(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    negatives: Tensor,
    positives: Tensor,
    kept: Tensor,
    ignore_index: int,
    smoothing: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of Σ_i grad_i loss_i, with loss_i = lse_i - (1 - ε) S_iy - ε mean_j S_ij.

    Args:
        grad: [M], in the dtype of `negatives`; what it holds at ignored rows is not read.
        negatives, positives, kept: what the forward returned for these inputs.
        smoothing: ε.
        output_mask: which of the three results are wanted; the others are returned empty.

    Returns:
        d_hidden [M, H], d_weight [V, H], d_bias [V], in the inputs' dtypes.
    """
    dtype = negatives.dtype
    vocabulary = weight.shape[0]
    d_hidden = hidden.new_zeros(hidden.shape if output_mask[0] else (0,), dtype=dtype)
    d_weight = hidden.new_zeros(weight.shape if output_mask[1] else (0,), dtype=dtype)
    d_bias = hidden.new_zeros(vocabulary if output_mask[2] else 0, dtype=dtype)
    for index, label in _bands(labels, ignore_index, vocabulary):
        rows = hidden[index]
        logits = _logits(rows, weight, bias, dtype)
        lse = torch.logaddexp(negatives[index], positives[index])
        weights = (logits - lse[:, None]).exp()
        # The label's own: sigmoid keeps the digits that p - 1 loses where p is near 1.
        missing = torch.sigmoid(negatives[index] - positives[index])
        weights.scatter_(1, label[:, None], (smoothing - missing)[:, None])
        if smoothing:
            weights -= smoothing / vocabulary
        weights *= grad[index][:, None]
        if output_mask[0]:
            d_hidden[index] = weights @ weight.to(dtype)
        if output_mask[1]:
            d_weight += weights.T @ rows.to(dtype)
        if output_mask[2]:
            d_bias += weights.sum(0)
    bias_dtype = hidden.dtype if bias is None else bias.dtype
    return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), d_bias.to(bias_dtype)


def _bands(labels: Tensor, ignore_index: int, vocabulary: int) -> list[tuple[Tensor, Tensor]]:
    """Labelled rows in bands: their indices and labels."""
    index = (labels != ignore_index).nonzero().squeeze(1)
    chosen = labels[index]
    if labels.device.type == "cpu":
        wrong = ((chosen < 0) | (chosen >= vocabulary)).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"linear_cross_entropy: labels must be in [0, {vocabulary}) or ignore_index "
                f"({ignore_index}), got {int(chosen[row])} at row {int(index[row])}"
            )
    return list(zip(index.split(ROWS), chosen.split(ROWS), strict=True)) if len(index) else []


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    logits = rows.to(dtype) @ weight.to(dtype).T
    return logits if bias is None else logits.add_(bias.to(dtype))


def _log_sum_exp(logits: Tensor) -> Tensor:
    """As torch.logsumexp, but +inf among the logits gives NaN, as a softmax over them does."""
    top = logits.amax(1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    return top.squeeze(1) + (logits - top).exp().sum(1).log()
