"""The launchers of attention against its reference in fp64, on the interpreter or on a GPU.

Named so that a plain `pytest` leaves it alone; test_triton.py runs it with TRITON_INTERPRET=1, and
`pytest tests/ops/triton_attention.py` runs it where there is a GPU.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkern import _triton
from mmkern.layout import RowIntervals
from mmkern.ops.attention import reference
from mmkern.ops.attention import triton as kernels
from mmkern.ops.attention.triton import Config, Configs
from tests.conftest import INTERPRETED
from tests.testing import assert_within_budget

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
SEED = torch.tensor([-(2**60) + 17], device=DEVICE)

# Tiles of 16, so that few rows and keys make many of them; "whole" serves up to 32 rows.
SMALL = Configs(
    forward=(Config(16, 16, 4),),
    whole=(Config(16, 16, 4), Config(32, 16, 4)),
    rows=(Config(16, 16, 4),),
    keys=Config(16, 16, 4),
)


def tensors(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    rows: int | None = None,
) -> list[Tensor]:
    """q, k, v and the output's gradient, as a projection leaves them."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((batch, queries), (rows or batch, keys), (rows or batch, keys), (batch, queries))
    return [
        torch.randn(b, length, heads, width, generator=generator, dtype=torch.float64)
        .to(DEVICE, dtype)
        .transpose(1, 2)
        for b, length in sizes
    ]


def run(module, q, k, v, grad, intervals=None, kv_row=None, dropout_p=0.0, scale=0.25):  # type: ignore[no-untyped-def]
    """[out, lse, dq, dk, dv] of the kernels or of the reference."""
    rest = (intervals, kv_row, SEED if dropout_p else None, dropout_p, scale)
    out, lse = module.attention_fwd(q, k, v, *rest)
    return [out, lse, *module.attention_bwd(grad, q, k, v, out, lse, *rest)]


def compare(*operands: Tensor, **options) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Run the kernels, and hold them to the budget."""
    ours = run(kernels, *operands, **options)
    plain = run(reference, *operands, **options)
    exact = run(reference, *(x.double() for x in operands), **options)
    for got, same, true in zip(ours, plain, exact, strict=True):
        finite = true.isfinite()
        assert torch.equal(got[~finite].double(), true[~finite])  # -inf: rows that see nothing
        assert_within_budget(got[finite], same[finite], true[finite])
    return ours


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "configs", lambda arch, width, dtype: SMALL)


def random_intervals(batch: int, queries: int, keys: int) -> Tensor:
    """Two intervals a row in every position: empty, touching, beyond the last key, below 0."""
    generator = torch.Generator().manual_seed(2)
    cuts = torch.randint(-5, keys + 9, (batch, queries, 4), generator=generator).sort(-1).values
    kind = torch.randint(0, 5, (batch, queries), generator=generator)
    cuts[kind == 0] = 0
    cuts[kind == 1, :2] = 0  # only a second interval
    cuts[kind == 2, 2:] = keys  # only a first
    return cuts.to(DEVICE, torch.int32)


@pytest.mark.parametrize("queries", [30, 40], ids=["one program", "two kernels"])
def test_random_intervals(small_tiles: None, queries: int):
    """Tiles that are skipped, full or cut, for rows of one tile that see different keys."""
    operands = tensors(2, 1, queries, 50)
    compare(*operands, intervals=random_intervals(2, queries, 50), dropout_p=0.2)


def test_blocks_of_rows_that_see_far_apart_keys(small_tiles: None):
    """Rows of a tile with the second interval before another row's first: one run of tiles."""
    intervals = torch.zeros(1, 20, 4, dtype=torch.int32)
    intervals[0, :10] = torch.tensor([60, 64, 64, 64])
    intervals[0, 10:] = torch.tensor([0, 0, 3, 9])
    compare(*tensors(2, 1, 20, 70), intervals=intervals.to(DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("queries", "width"), [(31, 64), (60, 64), (257, 16), (30, 88), (40, 120)], ids=str
)
def test_every_tile(dtype: torch.dtype, queries: int, width: int):
    """Each tile that a size picks, with a mask, dropout and a ragged end."""
    mask = RowIntervals.causal(queries, prefix=7).to(DEVICE)
    operands = tensors(1, 1, queries, queries + 7, width, dtype)
    compare(*operands, intervals=mask.intervals[:, 7:], dropout_p=0.1)


@pytest.mark.parametrize("queries", [20, 40], ids=["one program", "two kernels"])
def test_nan_reaches_only_who_sees_it(small_tiles: None, queries: int):
    """A NaN in one token must leave every earlier row of its tile as it was, to the bit."""
    q, k, v, grad = tensors(1, 1, queries, queries)
    intervals = RowIntervals.causal(queries).intervals.to(DEVICE)
    clean = run(kernels, q, k, v, grad, intervals)
    token = queries - 6
    k[:, :, token], v[:, :, token, 3:] = torch.nan, -torch.inf
    dirty = run(kernels, q, k, v, grad, intervals)
    for got, want in zip(dirty[:3], clean[:3], strict=True):  # out, lse, dq
        assert torch.equal(got[:, :, :token], want[:, :, :token])
        assert got[:, :, token:].isnan().flatten(3 if got.dim() == 4 else 2).any(-1).all()


def test_unaligned(small_tiles: None):
    """Rows that do not start on 16 bytes take loads of single numbers."""
    wide = []
    for x in tensors(2, 1, 20, 30, 17, torch.float16):
        storage = torch.full((2, 1, x.shape[2], 39), torch.nan, dtype=x.dtype, device=DEVICE)
        storage[..., 3:20] = x
        wide.append(storage[..., 3:20])
    compare(*wide, dropout_p=0.1)


def test_readers_with_masks_of_their_own(small_tiles: None):
    """Samples that share keys, each with other rows that see a tile of them."""
    kv_row = torch.tensor([1, 0, 1, 1], device=DEVICE)
    intervals = random_intervals(4, 20, 40)
    compare(*tensors(4, 1, 20, 40, rows=3), intervals=intervals, kv_row=kv_row, dropout_p=0.1)


@triton.jit
def next_reader_kernel(kv_row, out, row, start, B):
    tl.store(out, kernels.next_reader(kv_row, row, start, B))


def test_readers_are_found_in_long_batches():
    """kv_row is searched in pieces: a reader in the third one, the last sample, and nobody."""
    kv_row = torch.zeros(700, dtype=torch.int64, device=DEVICE)
    kv_row[[3, 255, 256, 699]] = 9
    out = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for start, want in ((0, 3), (4, 255), (256, 256), (257, 699), (700, 700)):
        next_reader_kernel[(1,)](kv_row, out, 9, start, 700)
        assert out.item() == want
    next_reader_kernel[(1,)](kv_row, out, 8, 0, 700)
    assert out.item() == 700


@triton.jit
def tile_ranges_kernel(hulls, out, count, R: tl.constexpr, BN: tl.constexpr):
    r = tl.arange(0, R)
    hull = (tl.load(hulls + 4 * r), tl.load(hulls + 4 * r + 1), tl.load(hulls + 4 * r + 2),
            tl.load(hulls + 4 * r + 3))  # fmt: skip
    first, number, second, second_number = _triton.tile_ranges(hull, BN)
    tl.store(out + 4 * r, first)
    tl.store(out + 4 * r + 1, number)
    tl.store(out + 4 * r + 2, second)
    tl.store(out + 4 * r + 3, second_number)


def test_tile_ranges():
    """Each tile that meets a hull is visited once, in order; few others are."""
    generator = torch.Generator().manual_seed(3)
    hulls = torch.randint(0, 100, (1024, 4), generator=generator, dtype=torch.int32).to(DEVICE)
    out = torch.empty_like(hulls)
    tile_ranges_kernel[(1,)](hulls, out, 1024, R=1024, BN=16)
    for (a0, a1, b0, b1), (first, number, second, more) in zip(
        hulls.tolist(), out.tolist(), strict=True
    ):
        tiles = [*range(first, first + number), *range(second, second + more)]
        wanted = {j // 16 for j in (*range(a0, a1), *range(b0, b1))}
        assert wanted <= set(tiles) and tiles == sorted(set(tiles))
        if a1 <= b0 or a0 >= a1 or b0 >= b1:
            assert len(tiles) == len(wanted)


@pytest.mark.parametrize(("width", "dtype"), [(16, torch.float64), (8, torch.float32)], ids=str)
def test_what_the_kernels_do_not_take(width: int, dtype: torch.dtype):
    """fp64 summed in fp32 would lose its digits; a narrow head would be half padding."""
    operands = tensors(1, 1, 4, 4, width, dtype)
    with pytest.raises(NotImplementedError, match=r"attention_fwd: .* got"):
        run(kernels, *operands)
