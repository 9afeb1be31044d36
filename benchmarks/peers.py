"""Loss functions of other packages, as one uses them there. Each import happens in its maker."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.case import Loss, UnavailableError


def accumulated(logits: Tensor) -> Tensor:
    """16-bit logits in fp32, before a scale or a softmax touches them."""
    return logits.float() if logits.itemsize < 4 else logits


def compiled(loss: Loss) -> Loss:
    """`loss` through torch.compile, specialised on the shape at hand."""
    torch.compiler.reset()  # else the shapes of a session add up to the recompile limit
    compiled: Loss = torch.compile(loss, fullgraph=True, dynamic=False)
    return compiled


@functools.cache
def _open_clip_losses() -> ModuleType:
    """open_clip's loss.py by path: its package needs torchvision, this file only torch."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise UnavailableError("open_clip_torch is not installed")
    path = f"{package.submodule_search_locations[0]}/loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    if spec is None or spec.loader is None:
        raise UnavailableError(f"open_clip_torch has no {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def open_clip(name: str) -> Loss:
    """A loss class of open_clip under the autocast its trainer uses (`--precision amp_bf16`)."""
    loss: Loss = getattr(_open_clip_losses(), name)()

    def call(image: Tensor, text: Tensor, *scalars: Tensor) -> Tensor:
        half = image.dtype in (torch.bfloat16, torch.float16)
        dtype = image.dtype if half else torch.bfloat16
        with torch.autocast(image.device.type, dtype, enabled=half):
            return loss(image, text, *scalars)

    return call


def inf_cl() -> Loss:
    """Inf-CL's single-device call, once a direction: its kernels give row statistics only."""
    try:
        flash = importlib.import_module("inf_cl").cal_flash_loss
    except ImportError as error:
        raise UnavailableError(f"inf-cl: {error}") from None

    def call(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        head = min(256, image.shape[1] & -image.shape[1])  # a power of two that divides D
        rows = flash(image, text, scale=scale, head_dim=head)
        columns = flash(text, image, scale=scale, head_dim=head)
        return (rows.mean() + columns.mean()) / 2

    return call


def cut_cross_entropy(impl: str) -> Loss:
    """Two linear cross-entropies; "cce" skips small gradients, "cce_exact" does not."""
    try:
        linear = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    except ImportError as error:
        raise UnavailableError(f"cut-cross-entropy: {error}") from None

    def call(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        labels = torch.arange(image.shape[0], device=image.device)
        scaled_image, scaled_text = ((scale * x).to(x.dtype) for x in (image, text))
        rows = linear(scaled_image, text, labels, impl=impl)
        return (rows + linear(scaled_text, image, labels, impl=impl)) / 2

    return call


def labelled_cross_entropy(impl: str) -> Loss:
    """cut-cross-entropy's linear cross-entropy, as for a language model's head."""
    try:
        linear = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    except ImportError as error:
        raise UnavailableError(f"cut-cross-entropy: {error}") from None
    call: Loss = functools.partial(linear, impl=impl)
    return call


def liger() -> Loss:
    """Liger's fused linear cross-entropy: gradients in the forward, in chunks of rows."""
    try:
        loss = importlib.import_module(
            "liger_kernel.transformers.fused_linear_cross_entropy"
        ).LigerFusedLinearCrossEntropyLoss()
    except ImportError as error:
        raise UnavailableError(f"liger-kernel: {error}") from None

    def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = loss(weight, hidden, labels)
        return found

    return call
