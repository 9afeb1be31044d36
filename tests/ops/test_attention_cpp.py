"""What is special to attention's C++ kernels: every instruction set, threads, memory safety."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mmkern import ops
from mmkern.layout import RowIntervals
from tests.ops.test_attention import DTYPES, check, tensors, with_gradients

extension = pytest.importorskip("mmkern._C", reason="the C++ extension is not built")


@pytest.fixture(params=["base", "avx2", "avx512"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """At most these; avx512_bf16 is what the other tests run on, where there is one."""
    extension.limit_attention(request.param)
    yield request.param
    extension.limit_attention("all")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys", "width"), [(1, 1, 1), (37, 53, 24), (70, 33, 64)])
def test_instruction_sets(
    instructions: str, dtype: torch.dtype, queries: int, keys: int, width: int
) -> None:
    """One build serves every x86-64 machine: what runs on an older one must be as right."""
    lengths, pads = torch.tensor([keys, keys // 3, 0]), torch.tensor([0, keys // 2, 1])
    mask = RowIntervals.full(queries, keys, lengths, pads)
    check(*tensors(3, 2, queries, keys, width, dtype), mask=mask, dropout_p=0.1)
    check(*tensors(3, 2, queries, keys, width, dtype))


def test_double(instructions: str) -> None:
    """fp64 is for derivatives that are checked by differences, on any machine."""
    mask = RowIntervals.causal(21, torch.tensor([21, 5]))
    q, k, v, _ = (x.requires_grad_() for x in tensors(2, 2, 21, 21, 5, torch.float64))
    assert torch.autograd.gradcheck(
        lambda *x: ops.attention(*x, mask), (q, k, v), fast_mode=True, atol=1e-7
    )


def test_dropout_is_the_same_everywhere(instructions: str) -> None:
    """A run that moves to another machine drops the same weights."""
    v = torch.eye(40).expand(2, 3, 40, 40)
    q, k, _, _ = tensors(2, 3, 19, 40, 40)
    results = []
    for limit in (instructions, "all"):
        extension.limit_attention(limit)
        torch.manual_seed(3)
        results.append(ops.attention(q, k, v, dropout_p=0.4) != 0)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    """Sums that depend on the number of threads make a run unrepeatable on another machine."""
    operands = tensors(5, 3, 40, 70, 32, dtype, rows=2)
    kv_row = torch.tensor([1, 0, 1, 1, 0])
    threads, runs = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        torch.manual_seed(0)
        runs.append(with_gradients(ops.attention, *operands, kv_row=kv_row, dropout_p=0.1))
    torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_documents_are_bit_identical(dtype: torch.dtype) -> None:
    """A document in a packed row computes what it computes alone, wherever it lies."""
    step = 1 if dtype == torch.float32 else 2  # bf16 sums keys in pairs
    lengths = (30, 18, 42, 8)
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    q, k, v, _ = tensors(1, 2, sum(lengths), sum(lengths), 64, dtype)
    out = ops.attention(q, k, v, RowIntervals.packed(documents))
    start = 0
    for length in lengths:
        assert start % step == 0
        part = slice(start, start + length)
        alone = ops.attention(*(x[:, :, part] for x in (q, k, v)), RowIntervals.causal(length))
        assert torch.equal(out[:, :, part], alone)
        start += length


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_and_writes_stay_inside(dtype: torch.dtype) -> None:
    """A read past a view shows as NaN, a write past one as a change of its surroundings."""
    for queries, keys, width in ((1, 1, 2), (33, 65, 64), (17, 31, 30), (5, 7, 1)):
        views = []
        for x in tensors(2, 1, queries, keys, width, dtype):
            storage = torch.full((2, x.shape[2] + 2, 1, width + 6), torch.nan, dtype=dtype)
            storage[:, 1:-1, :, 3:-3] = x.transpose(1, 2)
            views.append(storage[:, 1:-1, :, 3:-3].transpose(1, 2))
        assert all(x.isfinite().all() for x in check(*views))
