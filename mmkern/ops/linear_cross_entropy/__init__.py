"""Cross-entropy of a linear head, at the cost of the labelled rows and without the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkern import _checks, _library
from mmkern.ops.linear_cross_entropy import reference

REDUCTIONS = ("mean", "sum", "none")
# What a CPU keeps of the forward's exponentials, so that the backward need not form them again.
KEPT_BYTES = 64 << 20


def _fake_fwd(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    mean: bool,
    kept_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row = hidden.new_empty(hidden.shape[0], dtype=_checks.accumulator(hidden.dtype))
    kept = hidden.new_empty(kept_bytes, dtype=torch.uint8)
    return row, torch.empty_like(row), row.new_empty(hidden.shape[0] if mean else 0), kept


def _fake_bwd(
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
    return (
        hidden.new_empty(hidden.shape if output_mask[0] else (0,)),
        weight.new_empty(weight.shape if output_mask[1] else (0,)),
        (hidden if bias is None else bias).new_empty(weight.shape[0] if output_mask[2] else 0),
    )


def _flops_fwd(hidden: Any, weight: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(2 * hidden[0] * hidden[1] * weight[0])


def _flops_bwd(
    grad: Any,
    hidden: Any,
    weight: Any,
    labels: Any,
    bias: Any,
    negatives: Any,
    positives: Any,
    kept: Any,
    ignore_index: Any,
    smoothing: Any,
    output_mask: list[bool],
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    products = sum(output_mask[:2]) + (kept[0] == 0)
    return int(2 * products * hidden[0] * hidden[1] * weight[0])


_fwd = _library.define(
    "linear_cross_entropy_fwd(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias,"
    " int ignore_index, bool mean, SymInt kept_bytes)"
    " -> (Tensor negatives, Tensor positives, Tensor means, Tensor kept)",
    reference=reference.linear_cross_entropy_fwd,
    fake=_fake_fwd,
    triton="mmkern.ops.linear_cross_entropy.triton:linear_cross_entropy_fwd",
    flops=_flops_fwd,
)
_bwd = _library.define(
    "linear_cross_entropy_bwd(Tensor grad, Tensor hidden, Tensor weight, Tensor labels,"
    " Tensor? bias, Tensor negatives, Tensor positives, Tensor kept, int ignore_index,"
    " float smoothing, bool[3] output_mask) -> (Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
    reference=reference.linear_cross_entropy_bwd,
    fake=_fake_bwd,
    triton="mmkern.ops.linear_cross_entropy.triton:linear_cross_entropy_bwd",
    flops=_flops_bwd,
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""``F.cross_entropy(F.linear(hidden, weight, bias), labels)`` without the logits.

    .. math::
        S = H W^\top + b, \qquad \ell_i =
        \log \sum_j e^{S_{ij}} - (1 - \epsilon) S_{i y_i} - \frac{\epsilon}{V} \sum_j S_{ij}

    over the labelled rows alone: a row whose label is `ignore_index` is skipped before the matrix
    product, in the forward and in the backward, and its gradient is zero. Nothing is shifted here:
    row i of `hidden` predicts `labels[i]`. Label smoothing is Szegedy et al. 2016 (arXiv
    1512.00567, section 7), as in ``torch.nn.functional.cross_entropy``.

    Args:
        hidden: [..., H] in fp32, bf16, fp16 or fp64, any strides.
        weight: [V, H], same dtype. A tied embedding is passed as it is: autograd adds the two
            gradients up. One that wants no gradient costs none.
        labels: [...], int64.
        bias: [V], same dtype, or None.
        ignore_index: the label of rows without one; may lie inside [0, V).
        label_smoothing: ε in [0, 1].
        reduction: "mean" over the labelled rows, "sum", or "none" for the losses in the shape of
            `labels`, 0 where ignored. Without any labelled row, "mean" and "sum" give 0 and all
            gradients are 0 (torch's mean is NaN).

    Returns:
        fp32 (fp64 for fp64 inputs). Under autocast, inputs are cast as for a matmul.

    Logits are summed in fp32 and never rounded to 16 bits. The label's probability is left out of
    the log-sum-exp and added as log(1 + e^x), so the loss, and 1 - p in the gradient, keep their
    digits when p is near 1. Saved for backward: the inputs, 2 numbers a row, and on a CPU at most
    64 MiB of exponentials. Two runs are bit-equal. A second derivative raises NotImplementedError.
    `FlopCounterMode` counts all rows, since it sees shapes only.

    Raises:
        ValueError: shapes, devices, label_smoothing, reduction; on a CPU a label outside [0, V)
            that is not `ignore_index`. On a GPU, where looking would wait for the device, such a
            row's loss and all gradients it takes part in are NaN.
        TypeError: dtypes.
    """
    op = "linear_cross_entropy"
    _check(op, hidden, weight, labels, bias)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if bias is None:
        hidden, weight = _checks.autocast(hidden, weight)
    else:
        hidden, weight, bias = _checks.autocast(hidden, weight, bias)
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    with _checks.exact(hidden):
        inputs = (rows, weight) if bias is None else (rows, weight, bias)
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            losses: Tensor = _LinearCrossEntropy.apply(
                rows, weight, bias, flat, ignore_index, label_smoothing, reduction
            )
        else:
            losses = _forward(
                rows, weight, bias, flat, ignore_index, label_smoothing, reduction, 0
            )[0]
    return losses.view(labels.shape) if reduction == "none" else losses


def _check(op: str, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    given = {"hidden": hidden, "weight": weight, "labels": labels}
    if bias is not None:
        given["bias"] = bias
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")
        if value.device != hidden.device:
            raise ValueError(f"{op}: hidden is on {hidden.device} but {name} is on {value.device}")
        if name == "labels":
            if value.dtype != torch.int64:
                raise TypeError(f"{op}: labels must be torch.int64, got {value.dtype}")
        elif value.dtype not in _checks.FEATURE_DTYPES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in _checks.FEATURE_DTYPES)
            raise TypeError(f"{op}: {name} must be one of {allowed}, got {value.dtype}")
        elif value.dtype != hidden.dtype:
            raise TypeError(f"{op}: hidden is {hidden.dtype} but {name} is {value.dtype}")
    if hidden.dim() < 1 or hidden.shape[-1] == 0:
        raise ValueError(
            f"{op}: hidden must be [..., H] with H of at least 1, got {_shape(hidden)}"
        )
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{op}: weight must be [V, {hidden.shape[-1]}] with V of at least 1, "
            f"got {_shape(weight)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{op}: labels must be {tuple(hidden.shape[:-1])}, one for each row of hidden, "
            f"got {_shape(labels)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must be [{weight.shape[0]}], got {_shape(bias)}")


def _shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    smoothing: float,
    reduction: str,
    kept_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and what the backward needs: negatives, positives, kept."""
    negatives, positives, means, kept = _fwd(
        hidden, weight, labels, bias, ignore_index, smoothing > 0, kept_bytes
    )
    losses = torch.logaddexp(negatives - positives, torch.zeros_like(positives))
    if smoothing:
        losses = losses + smoothing * (positives - means)
    if reduction != "none":
        losses = losses.sum()
    if reduction == "mean":
        losses = losses / _count(labels, ignore_index, losses.dtype)
    return losses, negatives, positives, kept


def _count(labels: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """Labelled rows, at least 1."""
    return (labels != ignore_index).sum().clamp(min=1).to(dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ignore_index: int,
        smoothing: float,
        reduction: str,
    ) -> Tensor:
        kept_bytes = 0
        if hidden.device.type == "cpu":
            kept_bytes = min(KEPT_BYTES, 8 * (hidden.shape[0] + 64) * (weight.shape[0] + 1))
        loss, *residuals = _forward(
            hidden, weight, bias, labels, ignore_index, smoothing, reduction, kept_bytes
        )
        ctx.save_for_backward(hidden, weight, bias, labels, *residuals)
        ctx.options = ignore_index, smoothing, reduction
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _checks.first_derivative_only("linear_cross_entropy")
        hidden, weight, bias, labels, negatives, positives, kept = ctx.saved_tensors
        ignore_index, smoothing, reduction = ctx.options
        with _checks.exact(grad):
            grad = grad.to(negatives.dtype)
            if reduction == "mean":
                grad = grad / _count(labels, ignore_index, grad.dtype)
            wanted = list(ctx.needs_input_grad[:3])
            gradients = _bwd(
                grad.expand(negatives.shape), hidden, weight, labels, bias, negatives, positives,
                kept, ignore_index, smoothing, wanted,
            )  # fmt: skip
        found = (g if want else None for g, want in zip(gradients, wanted, strict=True))
        return (*found, None, None, None, None)
