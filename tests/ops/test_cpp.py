"""What is special to the C++ kernels: the packed bf16 tiles, memory, threads, memory safety."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmkern.ops.info_nce import reference as info_nce
from mmkern.ops.sigmoid_contrastive import reference as sigmoid
from tests.testing import assert_within_budget, unit_features

extension = pytest.importorskip("mmkern._C", reason="the C++ extension is not built")
ops = torch.ops.mmkern

# rows, columns, width, offset; a block is 64 rows, a strip 256 columns, a band 512 rows.
SHAPES = [
    (1, 1, 1, 0),  # nothing but padding
    (2, 3, 7, 1),  # odd everywhere
    (64, 256, 32, 192),  # exactly one block and one strip
    (65, 257, 33, 100),  # one past them
    (513, 520, 40, 7),  # two bands, the second with one row
    (70, 2309, 34, 2200),  # two chunks of columns with up to two threads
]


@pytest.fixture(params=["auto", "portable"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways that bf16 can take; "portable" runs the AMX path's packing on any machine."""
    extension.force_tile_path(request.param)
    yield request.param
    extension.force_tile_path("auto")


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, columns, width, _ = shape
    return (
        unit_features(rows, width).to(dtype),
        unit_features(columns, width, seed=1).to(dtype),
    )


def assert_product(got: Tensor, weight: Tensor, features: Tensor) -> None:
    """Within the rounding of the weights to bf16, 2^-9 each, and fp32 sums."""
    bound = weight @ features.double().abs() * 2**-8 + 1e-6
    assert ((got.double() - weight @ features.double()).abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_info_nce(path: str, shape: tuple[int, int, int, int]) -> None:
    """Packing or padding that misplaces one feature would train on wrong gradients, silently."""
    image, text = inputs(shape, torch.bfloat16)
    scale, offset = torch.tensor(20.0), shape[3]
    exact = info_nce.info_nce_fwd(image.double(), text.double(), scale.double(), offset)
    got = ops.info_nce_fwd(image, text, scale, offset)
    for result, true in zip(got, exact, strict=True):
        torch.testing.assert_close(result.double(), true, rtol=1e-5, atol=1e-5)

    row, column, diagonal = exact
    row_lse, column_lse = torch.logaddexp(row, diagonal), torch.full_like(column, torch.inf)
    own = slice(offset, offset + len(row))
    column_lse[own] = torch.logaddexp(column[own], diagonal)
    logits = 20 * image.double() @ text.double().T
    weight = (logits - row_lse[:, None]).exp() + (logits - column_lse).exp()
    weight.diagonal(offset)[: len(row)] = 0
    for mask in ([True, True], [True, False], [False, True]):
        d_image, d_text = ops.info_nce_bwd(
            image, text, scale, row_lse.float(), column_lse.float(), offset, mask
        )
        if mask[0]:
            assert_product(d_image, weight, text)
        if mask[1]:
            assert_product(d_text, weight.T, image)
        assert [d_image.numel() > 0, d_text.numel() > 0] == mask


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_sigmoid_contrastive(path: str, shape: tuple[int, int, int, int]) -> None:
    """As for InfoNCE: the same tiles, another epilogue."""
    image, text = inputs(shape, torch.bfloat16)
    scale, bias, offset = torch.tensor(10.0), torch.tensor(-5.0), shape[3]
    arguments = (image, text, scale, bias, offset, [True, True])
    got = ops.sigmoid_contrastive_fwd_bwd(*arguments)
    wide = [x.double() if isinstance(x, Tensor) else x for x in arguments]
    exact = sigmoid.sigmoid_contrastive_fwd_bwd(*wide)
    for result, true in zip(got[:3], exact[:3], strict=True):
        torch.testing.assert_close(result.double(), true, rtol=1e-5, atol=1e-5)
    weight = torch.sigmoid(10 * image.double() @ text.double().T - 5)
    weight.diagonal(offset)[: shape[0]] = 0
    assert_product(got[3], weight, text)
    assert_product(got[4], weight.T, image)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_values_stay_where_they_are(path: str, bad: float) -> None:
    """A NaN that spreads through padding, or gets lost in a maximum, hides which sample broke."""
    image, text = inputs((70, 300, 33, 0), torch.bfloat16)
    image[3, 5] = bad
    scale = torch.tensor(10.0)
    expected = info_nce.info_nce_fwd(image, text, scale, 0)
    got = ops.info_nce_fwd(image, text, scale, 0)
    for result, true in zip(got, expected, strict=True):
        torch.testing.assert_close(result, true, rtol=1e-5, atol=1e-5, equal_nan=True)
    lse = [x.nan_to_num(7.0) for x in expected[:2]]
    expected = info_nce.info_nce_bwd(image, text, scale, *lse, 0, [True, True])
    got = ops.info_nce_bwd(image, text, scale, *lse, 0, [True, True])
    for result, true in zip(got, expected, strict=True):
        assert torch.equal(result.isnan(), true.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_very_different_size(path: str, dtype: torch.dtype) -> None:
    """One exponential for rows and columns loses small rows beside large ones in a block."""
    image, text = inputs((200, 300, 24, 0), dtype)
    image *= torch.logspace(-2, 1, 200)[:, None].to(dtype)
    scale = torch.tensor(20.0)  # logits from 0.1 to 150
    wide = [x.double() for x in (image, text, scale)]
    exact, plain = info_nce.info_nce_fwd(*wide, 0), info_nce.info_nce_fwd(image, text, scale, 0)
    for got, same, true in zip(ops.info_nce_fwd(image, text, scale, 0), plain, exact, strict=True):
        assert_within_budget(got, same, true)
    row_lse = torch.logaddexp(exact[0], exact[2])
    column_lse = exact[1].clone()
    column_lse[:200] = torch.logaddexp(exact[1][:200], exact[2])
    d_image, d_text = ops.info_nce_bwd(
        image, text, scale, row_lse.float(), column_lse.float(), 0, [True, True]
    )
    logits = 20 * image.double() @ text.double().T
    weight = (logits - row_lse[:, None]).exp() + (logits - column_lse).exp()
    weight.diagonal()[:200] = 0
    assert_product(d_image, weight, text)
    assert_product(d_text, weight.T, image)


def test_no_negatives_and_hidden_negatives() -> None:
    """A row without negatives has log-sum-exp -inf, not NaN; so has one whose logits are -inf."""
    one = torch.ones(1, 1)
    row, column, diagonal = ops.info_nce_fwd(one, one, torch.tensor(3.0), 0)
    assert (row.item(), column.item(), diagonal.item()) == (-torch.inf, -torch.inf, 3.0)
    text = torch.tensor([[1.0], [torch.inf], [1.0]])
    row, column, _ = ops.info_nce_fwd(-torch.ones(2, 1), text, torch.tensor(1.0), 0)
    two = pytest.approx(math.log(2) - 1)
    assert row.tolist() == [-1, two]
    assert column.tolist() == [-1, -torch.inf, two]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_uninitialised_scratch_is_never_read(path: str, dtype: torch.dtype) -> None:
    """Scratch holds whatever was there: reading it gives NaN now and then, on users' machines."""
    image, text = inputs((67, 301, 33, 5), dtype)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    scale, lse = torch.tensor(10.0), torch.zeros(301, dtype=accumulator)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        results = [
            *ops.info_nce_fwd(image, text, scale, 5),
            *ops.info_nce_bwd(image, text, scale, lse[:67], lse, 5, [True, True]),
            *ops.sigmoid_contrastive_fwd_bwd(image, text, scale, scale, 5, [True, True]),
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(result.isfinite().all() for result in results)


def test_thread_count_does_not_change_packed_results() -> None:
    """Who owns a strip must not decide in which order its sums are merged."""
    image, text = inputs((600, 2600, 16, 0), torch.bfloat16)
    scale, lse = torch.tensor(10.0), torch.full((2600,), 9.0)
    found = []
    threads = torch.get_num_threads()
    extension.force_tile_path("portable")
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            forward = ops.info_nce_fwd(image, text, scale, 0)
            backward = ops.info_nce_bwd(image, text, scale, lse[:600], lse, 0, [True, True])
            found.append([*forward, *backward])
    finally:
        torch.set_num_threads(threads)
        extension.force_tile_path("auto")
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)


MEMORY = """
import resource, torch, mmkern
torch.set_num_threads(2)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
def step(n):
    image = torch.nn.functional.normalize(torch.randn(n, 8), dim=-1).bfloat16().requires_grad_()
    mmkern.ops.info_nce(image, image.detach(), 10.0).backward()
step(600)
before = peak()
step(12288)
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_square() -> None:
    """At N = 12,288 the dense formula takes 1.2 GB; users come to this library to avoid that."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", MEMORY]
    grown = int(subprocess.run(command, check=True, capture_output=True, cwd=root).stdout)
    assert grown < (64 << 20) + 64 * 2 * 12288 * 8


def test_wrong_shapes_raise_instead_of_reading_past_the_end() -> None:
    """The operators can be called without the public function's checks."""
    image, text, scale = torch.zeros(4, 8), torch.zeros(6, 8), torch.tensor(1.0)
    lse = torch.zeros(6)
    with pytest.raises(RuntimeError, match="info_nce_fwd: image"):
        ops.info_nce_fwd(image, torch.zeros(6, 9), scale, 0)
    with pytest.raises(RuntimeError, match="info_nce_fwd: rows 3 to 7"):
        ops.info_nce_fwd(image, text, scale, 3)
    with pytest.raises(RuntimeError, match="info_nce_fwd: image is Float but text is Double"):
        ops.info_nce_fwd(image, text.double(), scale, 0)
    with pytest.raises(RuntimeError, match="info_nce_fwd: dots"):
        ops.info_nce_fwd(image, text, scale, 0, torch.zeros(4, 5))
    with pytest.raises(RuntimeError, match=r"info_nce_bwd: log-sum-exp must be Float \[4\]"):
        ops.info_nce_bwd(image, text, scale, lse, lse, 0, [True, True])
    with pytest.raises(RuntimeError, match="sigmoid_contrastive_fwd: bias"):
        ops.sigmoid_contrastive_fwd(image, text, scale, lse, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_runtime() -> None:
    """A second runtime would ignore torch.set_num_threads and fight over the cores."""
    # In a process of its own: scikit-learn, which other tests import, brings a second one.
    code = "import mmkern; print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    paths = {line.split()[-1] for line in maps.stdout.splitlines() if line}
    assert any("mmkern/_C" in p for p in paths)
    runtimes = {Path(p).name.split(".")[0].split("-")[0] for p in paths if "omp" in Path(p).name}
    assert len([p for p in paths if "gomp" in Path(p).name]) <= 1
    assert len(runtimes & {"libgomp", "libiomp5", "libomp"}) <= 1


def test_build_information() -> None:
    """`mmkern info` prints these; a bug report without them cannot be reproduced."""
    built = extension.build_info()
    assert built["torch"].split(".")[0].isdigit() and built["compiler"]
    assert "GEMM" in extension.cpu_kernels()
    with pytest.raises(ValueError, match="force_tile_path: path must be 'auto' or 'portable'"):
        extension.force_tile_path("amx")
