"""Fixtures: the devices and the backends that operator tests run over."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator

import pytest
import torch
from torch._ops import OpOverload

from mmkern import _library, ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _backends() -> list[str]:
    """What can run here. The interpreter is chosen at decoration, so it has a process of its own
    (tests/ops/test_triton.py starts it)."""
    if INTERPRETED:
        return ["triton"]
    built = ["cpp"] if _library.extension is not None else []
    return ["reference", *built, *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=_backends())
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test once for each backend; the public functions then dispatch to it."""
    name: str = request.param
    if name in ("reference", "triton"):
        for op in ops.__all__:
            package = importlib.import_module(f"mmkern.ops.{op}")
            kernels = importlib.import_module(f"mmkern.ops.{op}.{name}")
            # What a package calls: overloads that `_library.define` returned, by their own names.
            for attribute, value in list(vars(package).items()):
                if isinstance(value, OpOverload):
                    function = value.name().removeprefix("mmkern::")
                    monkeypatch.setattr(package, attribute, getattr(kernels, function))
        if name == "triton":  # products are never kept on a GPU
            monkeypatch.setattr(importlib.import_module("mmkern.ops.info_nce"), "KEPT_BYTES", 0)
    yield name


@pytest.fixture
def device(backend: str) -> str:
    """Where the tensors of a backend's test live."""
    return "cuda" if backend == "cuda" else "cpu"
