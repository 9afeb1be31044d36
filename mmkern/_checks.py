"""Argument checks shared by the operators' public functions, and the autocast rule."""

from __future__ import annotations

import torch
from torch import Tensor

FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def feature_pair(op: str, image: Tensor, text: Tensor) -> None:
    """Raise unless image [N, D] and text [M, D] with M >= N share device, dtype and width.

    Emptiness is not checked here: under a process group it must raise on every rank together.
    """
    for name, value in (("image", image), ("text", text)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")
        if value.dim() != 2:
            raise ValueError(f"{op}: {name} must be [N, D], got shape {tuple(value.shape)}")
        if value.dtype not in FEATURE_DTYPES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in FEATURE_DTYPES)
            raise TypeError(f"{op}: {name} must be one of {allowed}, got {value.dtype}")
    if image.dtype != text.dtype:
        raise TypeError(f"{op}: image is {image.dtype} but text is {text.dtype}")
    if image.device != text.device:
        raise ValueError(f"{op}: image is on {image.device} but text is on {text.device}")
    if image.shape[1] != text.shape[1]:
        raise ValueError(
            f"{op}: image and text must have one width, got {image.shape[1]} and {text.shape[1]}"
        )
    if image.shape[1] == 0:
        raise ValueError(f"{op}: image and text need a width of at least 1, got 0")
    if text.shape[0] < image.shape[0]:
        raise ValueError(
            f"{op}: text must have a row for each of the {image.shape[0]} image rows, "
            f"got {text.shape[0]}"
        )


def scalar(op: str, name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """`value` as a tensor of shape [] or [1] on `like`'s device; floats become 0-d fp32 or fp64."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{op}: {name} must be a number or Tensor, got {type(value).__name__}")
        return torch.full((), float(value), dtype=accumulator(like.dtype), device=like.device)
    if value.dim() > 1 or value.numel() != 1:
        raise ValueError(f"{op}: {name} must have shape [] or [1], got {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating point Tensor, got {value.dtype}")
    return value.to(like.device)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an operator sums: fp64 for fp64 inputs, fp32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the autocast dtype where autocast is on, as torch does for the inputs of matmul."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def exact(like: Tensor) -> torch.autocast:
    """Context without autocast: sums that an operator takes in fp32 stay in fp32."""
    return torch.autocast(like.device.type, enabled=False)


def first_derivative_only(op: str) -> None:
    """Raise in a backward that is itself being recorded (create_graph=True)."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"{op}: the second derivative is not implemented, and backward was called with "
            "create_graph=True"
        )
