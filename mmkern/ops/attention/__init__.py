"""Attention under masks that are intervals of keys, with dropout and shared keys and values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmkern import _checks, _library
from mmkern.layout import RowIntervals
from mmkern.ops.attention import reference


def _fake_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Tensor | None,
    kv_row: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, width = q.shape
    out = q.new_empty(batch, queries, heads, width).transpose(1, 2)
    return out, q.new_empty(batch, heads, queries, dtype=_checks.accumulator(q.dtype))


def _fake_bwd(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    intervals: Tensor | None,
    kv_row: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _flops_fwd(q: Any, k: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """As if every key were seen: what a mask saves depends on its values."""
    return int(4 * q[0] * q[1] * q[2] * k[2] * q[3])


def _flops_bwd(grad: Any, q: Any, k: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(10 * q[0] * q[1] * q[2] * k[2] * q[3])


_fwd = _library.define(
    "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? intervals, Tensor? kv_row, Tensor? seed,"
    " float dropout_p, float scale) -> (Tensor out, Tensor lse)",
    reference=reference.attention_fwd,
    fake=_fake_fwd,
    triton="mmkern.ops.attention.triton:attention_fwd",
    flops=_flops_fwd,
)
_bwd = _library.define(
    "attention_bwd(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor? intervals, Tensor? kv_row, Tensor? seed, float dropout_p, float scale)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    reference=reference.attention_bwd,
    fake=_fake_bwd,
    triton="mmkern.ops.attention.triton:attention_bwd",
    flops=_flops_bwd,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: RowIntervals | None = None,
    *,
    kv_row: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    r"""Scaled dot-product attention whose mask is two intervals of keys a row.

    .. math::
        O_i = \sum_j D_{ij} P_{ij} V_j, \qquad
        P_{ij} = \frac{[j \in M_i]\, e^{s\, q_i \cdot k_j}}
                      {\sum_{l \in M_i} e^{s\, q_i \cdot k_l}}

    M_i are the keys that row i may attend to, D dropout's factors: 0 with probability p, else
    1 / (1 - p). (Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1; computed by recomputing P in
    the backward, Dao et al. 2022, arXiv 2205.14135.)

    Args:
        q: [B, H, Lq, E] in fp32, bf16, fp16 or fp64, any strides: views of a fused projection
            [B, L, 3, H, E] are read in place.
        k: [B, H, Lk, E], same dtype; [Bk, H, Lk, E] with `kv_row`.
        v: as k.
        mask: RowIntervals of Lq rows and Lk keys, for one sample or B. None: every key.
        kv_row: int32 or int64 [B], which row of k and v each sample reads: several texts on one
            image without a copy. Gradients of k and v sum over the readers, in a fixed order. A
            row outside [0, Bk) raises on a CPU and is undefined on a GPU.
        dropout_p: p, rounded to a multiple of 2⁻¹⁶. Draws come from torch's generator of the
            device by one seed a call. Whether weight (b, h, i, j) is kept is a function of that
            seed and these four numbers alone: not of the sizes, of tiles, threads or backend.
        scale: s; 1/√E by default. Applied to the fp32 scores.

    Returns:
        [B, H, Lq, E] in q's dtype, laid out as [B, Lq, H, E]: ``out.transpose(1, 2).reshape(B, Lq,
        H * E)`` copies nothing. A row that may attend to nothing is 0 and passes no gradient. Under
        autocast, q, k and v are cast as for a matmul.

    Saved for backward: q, k, v, the output and one number a row; no mask and no weights. What lies
    at keys that no row of a sample may attend to never matters, NaN included. Two runs from one
    seed are bit-equal. A second derivative raises NotImplementedError.

    Raises:
        ValueError: shapes, devices, a mask or kv_row that does not fit, dropout_p outside [0, 1].
        TypeError: dtypes that differ or are not floating point, a mask that is no RowIntervals.
    """
    _check(q, k, v, mask, kv_row, dropout_p, scale)
    q, k, v = _checks.autocast(q, k, v)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    intervals = None if mask is None else mask.intervals
    seed = _draw_seed(q.device) if reference.threshold(dropout_p) > 0 else None
    arguments = (q, k, v, intervals, kv_row, seed, float(dropout_p), scale)
    with _checks.exact(q):
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            out: Tensor = _Attention.apply(*arguments)
            return out
        return _fwd(*arguments)[0]


def _draw_seed(device: torch.device) -> Tensor:
    """int64 [1] from the device's default generator; the host does not wait for it."""
    limit = torch.iinfo(torch.int64)
    return torch.randint(limit.min, limit.max, (1,), dtype=torch.int64, device=device)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        intervals: Tensor | None,
        kv_row: Tensor | None,
        seed: Tensor | None,
        dropout_p: float,
        scale: float,
    ) -> Tensor:
        out, lse = _fwd(q, k, v, intervals, kv_row, seed, dropout_p, scale)
        ctx.save_for_backward(q, k, v, out, lse, intervals, kv_row, seed)
        ctx.dropout_p, ctx.scale = dropout_p, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _checks.first_derivative_only("attention")
        with _checks.exact(grad):
            gradients = _bwd(grad, *ctx.saved_tensors, ctx.dropout_p, ctx.scale)
        return (*gradients, None, None, None, None, None)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: RowIntervals | None,
    kv_row: Tensor | None,
    dropout_p: float,
    scale: float | None,
) -> None:
    """Raise unless the arguments fit together."""
    op = "attention"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{op}: {name} must be [B, H, L, E], got shape {tuple(x.shape)}")
        if x.dtype not in _checks.FEATURE_DTYPES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in _checks.FEATURE_DTYPES)
            raise TypeError(f"{op}: {name} must be one of {allowed}, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{op}: q is {q.dtype} but {name} is {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{op}: q is on {q.device} but {name} is on {x.device}")
    if k.shape != v.shape:
        raise ValueError(
            f"{op}: k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape[1] != q.shape[1] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"{op}: k must have q's heads and width, {q.shape[1]} and {q.shape[3]}, "
            f"got shape {tuple(k.shape)}"
        )
    if q.shape[3] == 0:
        raise ValueError(f"{op}: heads need a width of at least 1, got 0")
    if kv_row is None:
        if k.shape[0] != q.shape[0]:
            raise ValueError(
                f"{op}: k must have q's batch of {q.shape[0]} or come with kv_row, got {k.shape[0]}"
            )
    else:
        _check_kv_row(op, kv_row, q, k)
    if mask is not None:
        _check_mask(op, mask, q, k)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1], got {dropout_p}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be finite, got {scale}")


def _check_kv_row(op: str, kv_row: Tensor, q: Tensor, k: Tensor) -> None:
    if not isinstance(kv_row, Tensor) or kv_row.dtype not in (torch.int32, torch.int64):
        got = kv_row.dtype if isinstance(kv_row, Tensor) else type(kv_row).__name__
        raise TypeError(f"{op}: kv_row must be an int32 or int64 Tensor, got {got}")
    if tuple(kv_row.shape) != (q.shape[0],):
        raise ValueError(f"{op}: kv_row must be [{q.shape[0]}], got {tuple(kv_row.shape)}")
    if kv_row.device != q.device:
        raise ValueError(f"{op}: q is on {q.device} but kv_row is on {kv_row.device}")
    if k.shape[0] == 0 and q.shape[0] > 0:
        raise ValueError(f"{op}: k has no row for kv_row to name")


def _check_mask(op: str, mask: RowIntervals, q: Tensor, k: Tensor) -> None:
    if not isinstance(mask, RowIntervals):
        raise TypeError(
            f"{op}: mask must be RowIntervals (from_dense makes one), got {type(mask).__name__}"
        )
    if mask.queries != q.shape[2] or mask.keys != k.shape[2]:
        raise ValueError(
            f"{op}: mask must have {q.shape[2]} rows and {k.shape[2]} keys, "
            f"got {mask.queries} and {mask.keys}"
        )
    if mask.batch not in (1, q.shape[0]):
        raise ValueError(f"{op}: mask must be for 1 sample or {q.shape[0]}, got {mask.batch}")
    if mask.intervals.device != q.device:
        raise ValueError(f"{op}: q is on {q.device} but mask is on {mask.intervals.device}")
