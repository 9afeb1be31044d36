"""A linear layer whose low-rank adapter acts on visual rows only (partial LoRA)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkern import _checks, _library
from mmkern.layout import VisualSpans
from mmkern.ops.plora_linear import reference

_OP = "plora_linear"
_DRAWS = 65536  # values of a dropout draw


def _fake_fwd(
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
    ys = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    return ys, x.new_empty(rows.shape[0], a.shape[0])


def _fake_bwd(
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
    want_x, want_weight, want_bias, want_a, want_b = output_mask
    features = a.shape[1]

    def made(wanted: bool, *shape: int) -> Tensor:
        return a.new_empty(shape if wanted else (0,))

    return (
        made(want_x, *dy[0].shape[:-1], features),
        [made(want_weight, grad.shape[-1], features) for grad in dy],
        [made(want_bias, grad.shape[-1]) for grad in dy],
        made(want_a, *a.shape),
        [made(want_b, *b_i.shape) for b_i in b],
    )


def _rows(shape: Any) -> int:
    count = 1
    for size in shape[:-1]:
        count *= size
    return count


def _flops_fwd(
    x: Any, weights: Any, biases: Any, a: Any, b: Any, rows: Any, *args: Any, **kwargs: Any
) -> int:
    outputs = sum(weight[0] for weight in weights)
    expand = sum(b_i[0] * b_i[1] for b_i in b)
    return int(2 * (_rows(x) * x[-1] * outputs + rows[0] * (a[0] * a[1] + expand)))


def _flops_bwd(
    a: Any,
    dy: Any,
    x: Any,
    weights: Any,
    b: Any,
    h: Any,
    rows: Any,
    scaling: Any,
    threshold: Any,
    seed: Any,
    output_mask: list[bool],
    *args: Any,
    **kwargs: Any,
) -> int:
    want_x, want_weight, _, want_a, want_b = output_mask
    base = (want_x + want_weight) * _rows(dy[0]) * a[1] * sum(grad[-1] for grad in dy)
    expand = sum(b_i[0] * b_i[1] for b_i in b)
    adapters = ((want_x or want_a) + want_b) * expand + (want_x + want_a) * a[0] * a[1]
    return int(2 * (base + rows[0] * adapters))


_fwd = _library.define(
    "plora_linear_fwd(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor a, Tensor[] b,"
    " Tensor rows, float[] scaling, int threshold, Tensor? seed) -> (Tensor[] y, Tensor h)",
    reference=reference.plora_linear_fwd,
    fake=_fake_fwd,
    triton="mmkern.ops.plora_linear.triton:plora_linear_fwd",
    flops=_flops_fwd,
)
_bwd = _library.define(
    "plora_linear_bwd(Tensor a, Tensor[] dy, Tensor? x, Tensor[] weights, Tensor[] b, Tensor? h,"
    " Tensor rows, float[] scaling, int threshold, Tensor? seed, bool[5] output_mask)"
    " -> (Tensor dx, Tensor[] d_weight, Tensor[] d_bias, Tensor da, Tensor[] db)",
    reference=reference.plora_linear_bwd,
    fake=_fake_bwd,
    triton="mmkern.ops.plora_linear.triton:plora_linear_bwd",
    flops=_flops_bwd,
)


@overload
def plora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    spans: VisualSpans | Tensor | None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
) -> Tensor: ...
@overload
def plora_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    spans: VisualSpans | Tensor | None,
    *,
    scaling: float | Sequence[float] = 1.0,
    dropout_p: float = 0.0,
) -> tuple[Tensor, ...]: ...
def plora_linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None,
    lora_a: Tensor | Sequence[Tensor],
    lora_b: Tensor | Sequence[Tensor],
    spans: VisualSpans | Tensor | None,
    *,
    scaling: float | Sequence[float] = 1.0,
    dropout_p: float = 0.0,
) -> Tensor | tuple[Tensor, ...]:
    r"""Linear layer with a low-rank adapter on visual rows: partial LoRA.

    .. math::
        y_m = W x_m + \mathrm{bias}
              + [m\ \text{visual}]\; s\, B A\, \mathrm{dropout}(x_m)

    InternLM-XComposer2 (Dong et al. 2024, arXiv 2401.16420, section 3.2). The base product is the
    platform's; the adapter adds to its visual rows in place. Text rows are those of the plain layer
    to the bit, and without a visual row so is everything: the adapters' gradients are then zero.

    Args:
        x: [..., K] in fp32, bf16, fp16 or fp64, any strides.
        weight: [N, K], same dtype.
        bias: [N] or None.
        lora_a: [r, K], any rank, any floating dtype: it is cast to x's, its gradient comes back in
            its own.
        lora_b: [N, r].
        spans: the visual rows of a batch of x's leading shape (or of M rows, if x is [M, K]), or a
            bool mask of that shape, or None: all text. A mask is turned into spans at every call,
            so build them once a batch.
        scaling: s; alpha / r in LoRA's words.
        dropout_p: share of the adapter's input that is dropped, at every call with a value above 0.
            The mask is a function of one seed from the device's default generator, of row and
            feature: the backward makes it again, and so does a checkpoint's recomputation.

    Layers that share x (q, k and v; gate and up) can share one read of it and one product with all
    the A: give sequences of equal length for weight, lora_a and lora_b (and bias, scaling), each
    with its own N and r. They share a dropout mask.

    Returns:
        [..., N]; for sequences a tuple of them. Under autocast, inputs are cast as for a matmul.

    Saved for backward: x, the parameters, dropout(x) Aᵀ of visual rows and the seed; of those only
    what a wanted gradient needs. Two runs are bit-equal. A second derivative raises
    NotImplementedError.

    Raises:
        ValueError: shapes and devices that do not fit, dropout_p outside [0, 1].
        TypeError: dtypes that differ or are not floating point, a mask that is not bool.
    """
    single = isinstance(weight, Tensor)
    weights, loras_a, loras_b = (
        _listed(name, value, single)
        for name, value in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b))
    )
    count = len(weights)
    biases: list[Any] = [bias] if single else [None] * count if bias is None else list(bias)
    scales = [scaling] * count if isinstance(scaling, int | float) else list(scaling)
    _check(x, weights, biases, loras_a, loras_b, scales, dropout_p, single)
    rows = _visual_rows(x, spans)

    threshold = round(dropout_p * _DRAWS)
    kept = 1 - threshold / _DRAWS
    scales = [float(s) / kept if kept else 0.0 for s in scales]
    x, *weights = _checks.autocast(x, *weights)
    biases = [None if t is None else _checks.autocast(t)[0] for t in biases]
    for i, other in enumerate(weights):
        if other.dtype != x.dtype:
            raise TypeError(
                f"{_OP}: x is {x.dtype} but {_named('weight', i, single)} is {other.dtype}"
            )
    # The dispatcher's autograd casts the adapters and cuts their gradient up again.
    loras_a, loras_b = ([t.to(x.dtype) for t in group] for group in (loras_a, loras_b))
    a = loras_a[0] if count == 1 else torch.cat(loras_a)
    seed = _draw_seed(x.device) if threshold and rows.shape[0] else None
    tensors = [x, a, *weights, *loras_b, *(t for t in biases if t is not None)]
    with _checks.exact(x):
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            out = _PLoRALinear.apply(
                x, a, rows, seed, threshold, scales, *weights, *biases, *loras_b
            )
        elif rows.shape[0] == 0:
            out = [F.linear(x, w, t) for w, t in zip(weights, biases, strict=True)]
        else:
            out, _ = _fwd(x, weights, biases, a, loras_b, rows, scales, threshold, seed)
    return out[0] if single else tuple(out)


def _listed(name: str, value: Any, single: bool) -> list[Any]:
    if single:
        return [value]
    if isinstance(value, Tensor) or not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(
            f"{_OP}: {name} must be a sequence of Tensors, like weight, got {type(value).__name__}"
        )
    return list(value)


def _named(name: str, index: int, single: bool) -> str:
    return name if single else f"{name}[{index}]"


def _check(
    x: Tensor,
    weights: list[Any],
    biases: list[Any],
    loras_a: list[Any],
    loras_b: list[Any],
    scales: list[Any],
    dropout_p: float,
    single: bool,
) -> None:
    """Raise unless types, shapes and devices fit; dtypes of x and weight are compared later."""
    groups = {"weight": weights, "lora_a": loras_a, "lora_b": loras_b, "bias": biases}
    for name, group in (groups | {"scaling": scales}).items():
        if len(group) != len(weights) or not group:
            raise ValueError(
                f"{_OP}: {name} must have an entry for each of {len(weights)} weights (at least 1),"
                f" got {len(group)}"
            )
    _tensor("x", x, None)
    if x.dim() == 0:
        raise ValueError(f"{_OP}: x must be [..., K], got shape ()")
    if x.shape[-1] == 0:
        raise ValueError(f"{_OP}: x needs at least 1 feature, got 0")
    for name, group in groups.items():
        for i, value in enumerate(group):
            if name != "bias" or value is not None:
                _tensor(_named(name, i, single), value, x)
    for i, (weight, bias, a, b) in enumerate(zip(weights, biases, loras_a, loras_b, strict=True)):
        outputs, rank = weight.shape[0] if weight.dim() else 0, a.shape[0] if a.dim() else 0
        for name, value, letters, shape in (
            ("weight", weight, "[N, K]", (outputs, x.shape[-1])),
            ("lora_a", a, "[r, K]", (rank, x.shape[-1])),
            ("lora_b", b, "[N, r]", (outputs, rank)),
            ("bias", bias, "[N]", (outputs,)),
        ):
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(
                    f"{_OP}: {_named(name, i, single)} must be {letters} = {shape}, got "
                    f"{tuple(value.shape)}"
                )
        if rank == 0:
            raise ValueError(f"{_OP}: {_named('lora_a', i, single)} needs a rank of at least 1")
    for i, scale in enumerate(scales):
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise TypeError(
                f"{_OP}: {_named('scaling', i, single)} must be a number, got "
                f"{type(scale).__name__}"
            )
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{_OP}: dropout_p must be in [0, 1], got {dropout_p}")


def _tensor(name: str, value: Any, x: Tensor | None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{_OP}: {name} must be a Tensor, got {type(value).__name__}")
    if value.dtype not in _checks.FEATURE_DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in _checks.FEATURE_DTYPES)
        raise TypeError(f"{_OP}: {name} must be one of {allowed}, got {value.dtype}")
    if x is not None and value.device != x.device:
        raise ValueError(f"{_OP}: x is on {x.device} but {name} is on {value.device}")


def _visual_rows(x: Tensor, spans: VisualSpans | Tensor | None) -> Tensor:
    """`spans.rows` for x's rows."""
    if spans is None:
        return torch.empty(0, dtype=torch.int32, device=x.device)
    shape = tuple(x.shape[:-1])
    if isinstance(spans, Tensor):
        if spans.dtype != torch.bool:
            raise TypeError(
                f"{_OP}: spans must be VisualSpans or a bool mask (True = visual), got a Tensor of "
                f"{spans.dtype}"
            )
        given, device = tuple(spans.shape), spans.device
    elif isinstance(spans, VisualSpans):
        given, device = spans.shape, spans.rows.device
    else:
        raise TypeError(
            f"{_OP}: spans must be VisualSpans, a bool mask or None, got {type(spans).__name__}"
        )
    flat = 1
    for size in given:
        flat *= size
    if given != shape and not (len(shape) == 1 and shape[0] == flat):
        raise ValueError(f"{_OP}: spans must be of x's leading shape {shape}, got {given}")
    if device != x.device:
        raise ValueError(
            f"{_OP}: x is on {x.device} but spans are on {device}; move them once a batch"
        )
    if isinstance(spans, Tensor):
        return VisualSpans.from_mask(spans).rows
    return spans.rows


def _draw_seed(device: torch.device) -> Tensor:
    """int64 [1] from the device's default generator; the host does not wait for it."""
    limit = torch.iinfo(torch.int64)
    return torch.randint(limit.min, limit.max, (1,), dtype=torch.int64, device=device)


class _PLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        rows: Tensor,
        seed: Tensor | None,
        threshold: int,
        scales: list[float],
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        count = len(scales)
        weights, biases, b = (parameters[i * count : (i + 1) * count] for i in range(3))
        ys, h = _fwd(x, list(weights), list(biases), a, list(b), rows, scales, threshold, seed)
        needs = ctx.needs_input_grad
        groups = [needs[6 + i * count : 6 + (i + 1) * count] for i in range(3)]
        want_weight, want_bias, want_b = (any(group) for group in groups)
        ctx.wanted = [needs[0], want_weight, want_bias, needs[1], want_b]
        visual = rows.shape[0] > 0
        ctx.save_for_backward(
            a,
            x if want_weight or (needs[1] and visual) else None,
            h if want_b and visual else None,
            rows,
            seed,
            *b,
            *(weights if needs[0] else ()),
        )
        ctx.threshold, ctx.scales = threshold, scales
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        _checks.first_derivative_only(_OP)
        a, x, h, rows, seed, *rest = ctx.saved_tensors
        count, needs = len(ctx.scales), ctx.needs_input_grad
        b, weights = rest[:count], rest[count:]
        mask = list(ctx.wanted)
        if rows.shape[0] == 0:  # the adapters' gradients are zero, and nothing was kept for them
            mask[3] = mask[4] = False
        with _checks.exact(a):
            dx, d_weight, d_bias, da, db = _bwd(
                a, list(dy), x, weights, b, h, rows, ctx.scales, ctx.threshold, seed, mask
            )
        if rows.shape[0] == 0:
            da, db = torch.zeros_like(a), [torch.zeros_like(b_i) for b_i in b]
        found = [dx, da, None, None, None, None, *d_weight, *d_bias, *db]
        return tuple(t if wanted else None for t, wanted in zip(found, needs, strict=True))
