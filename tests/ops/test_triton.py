"""Triton without a GPU: every configuration compiled for three architectures, and interpreted."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from mmkern import ops
from tests.conftest import INTERPRETED

_triton = pytest.importorskip("mmkern._triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="starts the interpreter itself")

ROOT = Path(__file__).parents[2]
OPERATORS = ops.__all__
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a program can have
REGISTERS = 65536  # of a multiprocessor, all of which one program may hold
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
COPIES = {True: "cp.async.bulk.tensor", False: "cp.async.c"}

# The long run compiles fp16 as well, which is bf16's code with another type, and fp32, which takes
# the same path on every architecture, for all three.
FAST = {(torch.bfloat16, 80), (torch.bfloat16, 90), (torch.bfloat16, 100), (torch.float32, 90)}
CASES = [
    pytest.param(
        *(op, arch, dtype, variant.name),
        id=f"sm_{arch}-{dtype}-{variant.name}",
        marks=() if (dtype, arch) in FAST and not variant.rare else pytest.mark.slow,
    )
    for dtype in (torch.bfloat16, torch.float32, torch.float16)
    for arch in SHARED
    for op in OPERATORS
    for variant in importlib.import_module(f"mmkern.ops.{op}.triton").variants(arch, dtype)
]


def find(op: str, arch: int, dtype: torch.dtype, name: str):  # type: ignore[no-untyped-def]
    variants = importlib.import_module(f"mmkern.ops.{op}.triton").variants(arch, dtype)
    return next(v for v in variants if v.name == name)


def compile_case(op: str, arch: int, dtype: torch.dtype, name: str):  # type: ignore[no-untyped-def]
    return _triton.compile_for(find(op, arch, dtype, name), arch)


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[dict[tuple[object, ...], Future]]:  # type: ignore[type-arg]
    """Compilations of the cases that were selected, two at a time."""
    cases = [
        tuple(item.callspec.params[key] for key in ("op", "arch", "dtype", "name"))
        for item in request.session.items
        if getattr(item, "originalname", "") == "test_compiles"
    ]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield {case: pool.submit(compile_case, *case) for case in cases}


@pytest.mark.parametrize(("op", "arch", "dtype", "name"), CASES)
def test_compiles(compiled, op: str, arch: int, dtype: torch.dtype, name: str):  # type: ignore[no-untyped-def]
    """A spill costs a GPU user most of the speed, and too much shared memory the whole launch."""
    found, config = compiled[op, arch, dtype, name].result(), find(op, arch, dtype, name).config
    assert found.stack == 0
    assert found.shared <= SHARED[arch]
    if find(op, arch, dtype, name).products and dtype != torch.float32:
        assert any(instruction in found.ptx for instruction in TENSOR_CORES.values())
    if config is None:
        return
    assert found.registers * 32 * config.warps <= REGISTERS
    if dtype != torch.float32:
        assert TENSOR_CORES[arch] in found.ptx
    assert COPIES[config.descriptors] in found.ptx


@pytest.mark.parametrize("op", OPERATORS)
def test_launches_are_what_is_compiled(op: str):
    """Triton compiles anew for sizes of 1 and multiples of 16; those kernels would be untested."""
    fixed = ("D", "stride")  # multiples of 16 by `padded`, in every launch
    module = importlib.import_module(f"mmkern.ops.{op}.triton")
    for variant in module.variants(90, torch.bfloat16):
        kernel = variant.kernel
        sizes = {n for n, kind in _triton.signature(variant).items() if kind == "i32"}
        sizes -= {n for n in sizes if n.endswith(fixed)}
        assert sizes <= set(kernel.do_not_specialize)
        assert not {n for n in kernel.do_not_specialize if n.endswith(fixed)}


# Less what takes long interpreted, or (order of sums) is settled there by running one program at a
# time.
FEWER = "not 200-0-640 and not 127-0-384 and not deterministic"
SELECTED = {"info_nce": ["-k", FEWER], "sigmoid_contrastive": ["-k", FEWER]}
SELECTED["query_info_nce"] = ["-k", "not deterministic and not poisoned and not all_that"]
SELECTED["plora_linear"] = ["-k", "not deterministic and not 520 and not rate and not bad"]
SELECTED["linear_cross_entropy"] = ["-k", "not deterministic"]
SELECTED["attention"] = [
    "-k",
    "not bit_equal and not many_readers and not 0.999 and not holes and not widths"
    " and not (nobody and (unimodal or hole or prefix or stage1))"
    " and not (masks and float16) and not (key_counts and (15 or 17 or 63 or 65 or 127))",
]
SUITES = {op: [f"tests/ops/test_{op}.py", *SELECTED.get(op, [])] for op in OPERATORS}
SUITES["kernels"] = ["tests/ops/triton_kernels.py"]
SUITES["attention kernels"] = ["tests/ops/triton_attention.py"]


def interpret(suite: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.interpreter", *SUITES[suite]]
    command += ["-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """The suites, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {suite: pool.submit(interpret, suite) for suite in SUITES}


@pytest.mark.parametrize("suite", SUITES)
def test_interpreted(
    interpreted: dict[str, Future[subprocess.CompletedProcess[str]]], suite: str
) -> None:
    """The kernels' arithmetic, with no GPU: the operators' own tests and the launchers' corners."""
    done = interpreted[suite].result()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (1, 1 << 20), (1 << 20, 1 << 20), (32768, 32768), (70000, 33)]
)
def test_weight_blocks(rows: int, columns: int, size: int):
    """Blocks of the gradient's weights must tile the matrix, and never exceed the memory bound."""
    blocks = list(_triton.weight_blocks(rows, columns, size))
    first = blocks[0]
    area = 0
    for r, c in blocks:
        height, width = r.stop - r.start, c.stop - c.start
        assert height <= first[0].stop and width <= first[1].stop  # the first one's buffer serves
        area += height * width
    padded = -(-first[1].stop // 16) * 16
    assert first[0].stop * padded * size <= _triton.WEIGHT_BYTES
    assert area == rows * columns
    assert len({(r.start, c.start) for r, c in blocks}) == len(blocks)


@pytest.mark.parametrize("columns", [1, 128, 129, 32768, 1 << 20])
@pytest.mark.parametrize("rows", [1, 255, 257, 4096, 1 << 20])
def test_chunks_cover_the_rows(rows: int, columns: int):
    """A row outside every chunk would be missing from the loss."""
    for config in _triton.configs(90, torch.bfloat16):
        chunks, chunk_rows = _triton.chunked(rows, columns, config)
        assert chunk_rows % config.block_m == 0
        assert (chunks - 1) * chunk_rows < rows <= chunks * chunk_rows
