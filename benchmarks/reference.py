"""mmkern's own function on its plain PyTorch reference: what the kernels gain over it."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.case import Loss


def on_reference(op: str, kernels: tuple[str, ...], function: Loss | None = None) -> Loss:
    """`mmkern.ops.<op>` with `kernels` replaced by their references, its backward included.

    Args:
        op: the operator's name.
        kernels: suffixes of its registered schemas, as in "fwd", "bwd".
        function: what to call instead, if the operator returns more than a loss.
    """
    # By name: in mmkern.ops the function hides its module.
    module = importlib.import_module(f"mmkern.ops.{op}")
    reference = importlib.import_module(f"mmkern.ops.{op}.reference")
    replaced = {f"_{kernel}": getattr(reference, f"{op}_{kernel}") for kernel in kernels}
    call_op: Loss = function or getattr(module, op)

    def patched() -> contextlib.AbstractContextManager[Any]:
        return mock.patch.multiple(module, **replaced)

    def call(*inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            loss: Tensor = _Within.apply(patched, call_op, *inputs)
            return loss
        with patched():
            return call_op(*inputs)

    return call


class _Within(torch.autograd.Function):
    """A function whose forward and backward both run inside a context."""

    @staticmethod
    def forward(ctx: Any, context: Callable[[], Any], function: Loss, *inputs: Any) -> Tensor:
        ctx.context = context
        ctx.inner = [
            x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
            for x in inputs
        ]
        with context(), torch.enable_grad():
            ctx.loss = function(*ctx.inner)
        loss: Tensor = ctx.loss.detach()
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [isinstance(x, Tensor) and x.requires_grad for x in ctx.inner]
        leaves = [x for x, want in zip(ctx.inner, wanted, strict=True) if want]
        with ctx.context():
            found = iter(torch.autograd.grad(ctx.loss, leaves, grad))
        return None, None, *(next(found) if want else None for want in wanted)
