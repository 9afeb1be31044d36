"""Registration of operators, loading of the C++ extension, and what ``mmkern info`` reports.

Every operator is defined here in Python, with its reference at CompositeExplicitAutograd, so the
package works unbuilt. Loading ``mmkern._C`` adds C++ kernels at the CPU key; the Triton launcher
stands at the CUDA key and is imported by its first call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import platform
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_LIBRARY = torch.library.Library("mmkern", "DEF")
_FLOPS: dict[str, Callable[..., int]] = {}  # operator -> formula; also the list of operators
_FLOP_COUNTER = "torch.utils.flop_counter"


class _RegisterFlops(importlib.abc.MetaPathFinder):
    """Registers the FLOP formulas when torch's counter is imported.

    The counter imports triton, and importing mmkern must not.
    """

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _FLOP_COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for operator, formula in _FLOPS.items():
                _register_flops(module, operator, formula)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register_flops(counter: ModuleType, name: str, formula: Callable[..., int]) -> None:
    counter.register_flop_formula(getattr(torch.ops.mmkern, name))(formula)


if _FLOP_COUNTER not in sys.modules:
    sys.meta_path.insert(0, _RegisterFlops())


def _load_extension() -> tuple[ModuleType | None, str]:
    """Import ``mmkern._C``; (None, why) where it is absent or was built for another torch."""
    if importlib.util.find_spec("mmkern._C") is None:
        return None, "not built; `pip install --no-build-isolation .` builds it"
    try:
        return importlib.import_module("mmkern._C"), ""
    except ImportError as error:
        why = f"built, but does not load with torch {torch.__version__}: {error}"
        warnings.warn(f"mmkern: the C++ extension is {why}", RuntimeWarning, stacklevel=2)
        return None, why


extension, extension_missing = _load_extension()


@functools.cache
def _without_triton(device: int | None) -> str | None:
    """Why the Triton kernels do not run on a GPU, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.hip is not None:
        return "the Triton kernels are for NVIDIA's GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the Triton kernels need compute capability 8.0, this GPU has {major}.{minor}"
    return None


@functools.cache
def _warn_reference_on_gpu(why: str) -> None:
    warnings.warn(
        f"mmkern: {why}, so CUDA tensors run on the plain PyTorch reference",
        RuntimeWarning,
        stacklevel=4,
    )


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    triton: str,
    flops: Callable[..., int],
) -> Any:
    """Define ``mmkern::<schema>`` and return the overload to call.

    Args:
        schema: operator schema without the namespace.
        reference: plain PyTorch implementation, for any device without a kernel of its own.
        fake: shapes and dtypes of the outputs, for torch.compile.
        triton: ``module:function`` of the CUDA launcher; imported by the first CUDA call. fp64
            goes to the reference, on every GPU.
        flops: formula for FlopCounterMode; gets the arguments with tensors replaced by shapes.
    """
    name = schema.partition("(")[0]
    try:
        _LIBRARY.define(schema)
    except RuntimeError as error:
        # The kernels that an older build registered do not fit the schema.
        raise ImportError(
            "mmkern._C was built from other sources than these; build it again with "
            "`pip install --no-build-isolation .`"
        ) from error
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    module, _, function = triton.partition(":")

    def launch(*args: Any) -> Any:
        why = _without_triton(args[0].device.index)
        if why is not None:
            _warn_reference_on_gpu(why)
            return reference(*args)
        if args[0].dtype == torch.float64:  # no tensor cores to win: what fp64 is for is the truth
            return reference(*args)
        return getattr(importlib.import_module(module), function)(*args)

    _LIBRARY.impl(name, launch, "CUDA")
    torch.library.register_fake(f"mmkern::{name}", fake, lib=_LIBRARY)
    _FLOPS[name] = flops
    if _FLOP_COUNTER in sys.modules:
        _register_flops(sys.modules[_FLOP_COUNTER], name, flops)
    return getattr(torch.ops.mmkern, name).default


def backend(name: str, device: str) -> tuple[str, str]:
    """The implementation that ``mmkern::<name>`` runs on a device type, and why."""
    if device == "cuda":
        if not torch.cuda.is_available():
            return "none", "no CUDA device"
        why = _without_triton(None)
        return ("reference", why) if why else ("triton", "CUDA device; fp64 on the reference")
    if device != "cpu":
        return "reference", f"no kernels for {device}"
    if extension is None:
        return "reference", f"C++ extension {extension_missing}"
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"mmkern::{name}", "CPU"):
        return "cpp", str(extension.cpu_kernels())
    return "reference", "no C++ kernel for this operator"


def info() -> list[tuple[str, str]]:
    """Rows (what, value) for ``mmkern info``: versions, device, and each operator's backend."""
    from mmkern import __version__

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    rows = [
        ("mmkern", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        *((name, _version(name)) for name in ("triton", "transformers", "flash-attn")),
        ("cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"),
        ("gpu", gpu),
        ("C++ extension", "loaded" if extension is not None else extension_missing),
    ]
    for name in _FLOPS:
        for device in ("cpu", "cuda"):
            kind, why = backend(name, device)
            rows.append((f"{name} [{device}]", f"{kind} ({why})"))
    return rows


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
