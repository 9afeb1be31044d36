"""The C++ extension, and nothing else: metadata lives in pyproject.toml.

MMKERN_BUILD decides: ``auto`` (default) builds where torch and a compiler are there, says why where
they are not, and fails on a compile error; ``cpp`` insists; ``none`` gives pure Python.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

CHOICES = ("auto", "cpp", "none")
FLAGS = ["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-Wno-psabi"]


def missing() -> str | None:
    """Why the extension cannot be built here, or None."""
    if sys.platform != "linux":
        return f"the C++ kernels build on Linux, this is {sys.platform}"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return f"torch is not in the build environment ({error}); use --no-build-isolation"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler ({compiler}) on the path"
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").is_file():
        return f"no Python headers in {headers} (Debian and Ubuntu: python3-dev)"
    return None


def extension() -> dict[str, object]:
    """Arguments of setup() that build mmkern._C; empty for a pure Python package."""
    choice = os.environ.get("MMKERN_BUILD", "auto")
    if choice not in CHOICES:
        raise SystemExit(f"MMKERN_BUILD must be one of {', '.join(CHOICES)}, got {choice!r}")
    why = "MMKERN_BUILD=none" if choice == "none" else missing()
    if why is not None:
        if choice == "cpp":
            raise SystemExit(f"MMKERN_BUILD=cpp, but {why}")
        print(f"mmkern: building without the C++ extension: {why}")
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    root = Path(__file__).parent
    sources = sorted(str(p.relative_to(root)) for p in root.glob("csrc/**/*.cpp"))
    headers = sorted(str(p.relative_to(root)) for p in root.glob("csrc/**/*.h"))
    module = CppExtension(
        "mmkern._C", sources, depends=headers, extra_compile_args=FLAGS, extra_link_args=["-s"]
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension())
