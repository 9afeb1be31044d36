"""setup.py's one variable, and a package that was not built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmkern import _library

ROOT = Path(__file__).parent.parent


def setup(**environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py --name`, which decides about the extension and builds nothing."""
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "--name"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_unknown_choice():
    """A typing error must not quietly give another build."""
    done = setup(MMKERN_BUILD="cuda")
    assert done.returncode != 0
    assert "MMKERN_BUILD must be one of auto, cpp, none, got 'cuda'" in done.stderr


def test_auto_without_a_compiler_says_why():
    """`pip install .` works without a compiler, and names what the package then lacks."""
    done = setup(MMKERN_BUILD="auto", CXX="/nonexistent/c++")
    assert done.returncode == 0
    assert "without the C++ extension: no C++ compiler (/nonexistent/c++)" in done.stdout


def test_cpp_without_a_compiler_fails():
    """Who asks for C++ must not get a package without it."""
    done = setup(MMKERN_BUILD="cpp", CXX="/nonexistent/c++")
    assert done.returncode != 0
    assert "MMKERN_BUILD=cpp, but no C++ compiler" in done.stderr


def test_info_of_an_unbuilt_package(monkeypatch: pytest.MonkeyPatch):
    """Where nothing was built, `mmkern info` says so for each operator."""
    monkeypatch.setattr(_library, "extension", None)
    monkeypatch.setattr(_library, "extension_missing", "not built; how to build it")
    rows = dict(_library.info())
    assert rows["C++ extension"] == "not built; how to build it"
    assert rows["info_nce_fwd [cpu]"] == "reference (C++ extension not built; how to build it)"


def test_reference_on_a_gpu_warns_once(monkeypatch: pytest.MonkeyPatch):
    """A GPU that silently runs the reference would be taken for slow kernels."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    _library._without_triton.cache_clear()
    _library._warn_reference_on_gpu.cache_clear()
    try:
        why = "the Triton kernels need compute capability 8.0, this GPU has 7.5"
        assert _library.backend("info_nce_fwd", "cuda") == ("reference", why)
        with pytest.warns(RuntimeWarning, match="compute capability 8.0") as caught:
            _library._warn_reference_on_gpu(why)
            _library._warn_reference_on_gpu(why)
        assert len(caught) == 1
    finally:
        _library._without_triton.cache_clear()
        _library._warn_reference_on_gpu.cache_clear()
