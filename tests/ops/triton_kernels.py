"""The Triton launchers against the references in fp64, on the interpreter or on a GPU.

Named so that a plain `pytest` leaves it alone; test_triton.py runs it with TRITON_INTERPRET=1, and
`pytest tests/ops/triton_kernels.py` runs it where there is a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkern import _triton
from mmkern._triton import Config
from mmkern.ops.info_nce import reference as info_nce_reference
from mmkern.ops.info_nce import triton as info_nce
from mmkern.ops.sigmoid_contrastive import reference as sigmoid_reference
from mmkern.ops.sigmoid_contrastive import triton as sigmoid
from tests.conftest import INTERPRETED
from tests.testing import assert_within_budget, unit_features

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


def tensors(rows: int, columns: int, width: int, dtype: torch.dtype, s: float = 20.0) -> list[Any]:
    image = unit_features(rows, width, dtype, DEVICE)
    text = unit_features(columns, width, dtype, DEVICE, seed=1)
    return [image, text, torch.tensor(s, device=DEVICE)]


def log_sum_exps(image: Tensor, text: Tensor, scale: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """What a backward gets: positives included, +inf for columns without a label; fp32."""
    image, text, scale = image.double(), text.double(), scale.double()
    row, column, diagonal = info_nce_reference.info_nce_fwd(image, text, scale, offset)
    labelled = torch.full_like(column, torch.inf)
    own = slice(offset, offset + image.shape[0])
    labelled[own] = torch.logaddexp(column[own], diagonal)
    return torch.logaddexp(row, diagonal).float(), labelled.float()


def compare(launcher: Any, reference: Any, arguments: list[Any], *rest: Any) -> list[Tensor]:
    """Run both; gradients of 16-bit features are judged in their dtype, in which they leave."""
    image = arguments[0]
    ours = launcher(*arguments, *rest)
    plain = reference(*arguments, *rest)
    exact = reference(*(x.double() for x in arguments), *rest)
    for got, same, true in zip(ours, plain, exact, strict=True):
        assert got.shape == true.shape
        if got.dim() == 2:
            got, same = got.to(image.dtype), same.to(image.dtype)
        if got.numel():
            finite = true.isfinite()
            assert torch.equal(got.isnan(), true.isnan())
            assert torch.equal(got[got.isinf()].double(), true[true.isinf()])
            if finite.any():
                assert_within_budget(got[finite], same[finite], true[finite])
    return list(ours)


def compare_all(arguments: list[Any], offset: int = 0, mask: tuple[bool, bool] = (True, True)):  # type: ignore[no-untyped-def]
    """Every launcher on one problem."""
    compare(info_nce.info_nce_fwd, info_nce_reference.info_nce_fwd, arguments, offset)
    lse = log_sum_exps(*arguments, offset)
    compare(
        info_nce.info_nce_bwd, info_nce_reference.info_nce_bwd, [*arguments, *lse], offset, mask
    )
    arguments = [*arguments, torch.tensor(-5.0, device=DEVICE)]
    compare(
        sigmoid.sigmoid_contrastive_fwd,
        sigmoid_reference.sigmoid_contrastive_fwd,
        arguments,
        offset,
    )
    compare(
        sigmoid.sigmoid_contrastive_fwd_bwd,
        sigmoid_reference.sigmoid_contrastive_fwd_bwd,
        arguments,
        offset,
        mask,
    )


@pytest.fixture
def use_config(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Make every launch take one tile, and exact redoing another."""

    def use(large: Config, small: Config) -> None:
        monkeypatch.setattr(_triton, "configs", lambda arch, dtype: (large, small))
        monkeypatch.setattr(_triton, "_LARGE_TILES", 1)

    return use


TILES = {
    "large": Config(256, 128, 32, warps=8, stages=2, descriptors=True, flatten=True),
    "small": Config(64, 128, 32, warps=4, stages=2, descriptors=True, flatten=True),
}


@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("tile", TILES)
def test_tiles_and_load_paths(use_config, tile: str, descriptors: bool):  # type: ignore[no-untyped-def]
    """Each architecture takes another tile and another way to load: all must give one answer."""
    large = replace(TILES[tile], descriptors=descriptors)
    use_config(large, replace(TILES["small"], descriptors=descriptors))
    compare_all(tensors(261, 280, 40, torch.float16), offset=9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bands_and_blocks(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype):
    """Batches beyond the scratch are cut up: statistics and both gradients must resume exactly."""
    monkeypatch.setattr(info_nce, "PARTIAL_BYTES", 1)  # a band is one tile high
    monkeypatch.setattr(_triton, "WEIGHT_BYTES", 128 * 128 * dtype.itemsize)
    arguments = tensors(150, 260, 24, dtype)
    blocks = list(_triton.weight_blocks(150, 260, dtype.itemsize))
    assert len({r.start for r, _ in blocks}) > 1 and len({c.start for _, c in blocks}) > 1
    compare_all(arguments, offset=100)


def test_last_band_with_more_chunks(use_config, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Nine tiles make five chunks of two and eight make eight: the scratch must hold either."""
    config = TILES["small"]
    use_config(config, config)
    monkeypatch.setattr(_triton, "_PROGRAMS", 1)
    rows, columns = 17 * config.block_m, 17 * config.block_m
    strips = -(-columns // config.block_n)
    monkeypatch.setattr(info_nce, "PARTIAL_BYTES", 9 * config.block_m * 4 * strips)
    nine, eight = (_triton.chunked(n * config.block_m, columns, config)[0] for n in (9, 8))
    assert nine < eight
    arguments = tensors(rows, columns, 16, torch.float16)
    compare(info_nce.info_nce_fwd, info_nce_reference.info_nce_fwd, arguments, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [(True, False), (False, True), (False, False)])
def test_output_mask(dtype: torch.dtype, mask: tuple[bool, bool]):
    """A frozen tower's gradient must come back empty, and the other unchanged."""
    compare_all(tensors(5, 9, 17, dtype), offset=4, mask=mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_by_one(dtype: torch.dtype):
    """One pair has no negative: -inf, not the logit of padding."""
    arguments = tensors(1, 1, 1, dtype)
    row, column, _ = info_nce.info_nce_fwd(*arguments, 0)
    assert row.item() == -torch.inf and column.item() == -torch.inf
    compare_all(arguments)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)  # fp32 has a maximum for each sum anyway
@pytest.mark.parametrize("s", [100.0, 1000.0, -100.0, 0.0])
@pytest.mark.parametrize("side", ["rows", "columns"])
def test_sums_outside_the_window(dtype: torch.dtype, s: float, side: str):
    """Rows or columns whose exponentials under- or overflow against the common reference are redone
    with their own maxima; the others of the batch are ordinary, so both ways meet in one matrix."""
    image, text, scale = tensors(140, 200, 32, dtype, s)
    if side == "rows":
        text[:] = text[3]
        image[70:] = -text[3]
    else:
        image[:] = image[3]
        text[100:] = -image[3]
    arguments = [image, text, scale]
    compare(info_nce.info_nce_fwd, info_nce_reference.info_nce_fwd, arguments, 30)
    arguments += log_sum_exps(*arguments, 30)
    compare(info_nce.info_nce_bwd, info_nce_reference.info_nce_bwd, arguments, 30, (True, True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite(dtype: torch.dtype, value: float):
    """NaN and infinities must show in the same statistics as in plain PyTorch, and only there."""
    image, text, scale = tensors(70, 200, 8, dtype)
    image[66, 3] = value
    compare(info_nce.info_nce_fwd, info_nce_reference.info_nce_fwd, [image, text, scale], 130)
    row = info_nce.info_nce_fwd(image, text, scale, 130)[0]
    assert row[:66].isfinite().all() and row[66].isnan()
    bias = torch.tensor(-5.0, device=DEVICE)
    compare(
        sigmoid.sigmoid_contrastive_fwd,
        sigmoid_reference.sigmoid_contrastive_fwd,
        [image, text, scale, bias],
        130,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigmoid_saturates(dtype: torch.dtype):
    """Logits beyond ±88, where exp(-|x|) is 0: the loss is linear there and the weight 1."""
    image, text, scale = tensors(40, 50, 16, dtype, 300.0)
    image[7] = text[20]
    bias = torch.tensor(3.0, device=DEVICE)
    compare(
        sigmoid.sigmoid_contrastive_fwd_bwd,
        sigmoid_reference.sigmoid_contrastive_fwd_bwd,
        [image, text, scale, bias],
        5,
        (True, True),
    )


def test_fp64_is_refused():
    """Summed in fp32, fp64 features would silently lose the digits they were chosen for."""
    arguments = tensors(2, 2, 8, torch.float64)
    with pytest.raises(NotImplementedError, match=r"info_nce_fwd: .* got torch.float64"):
        info_nce.info_nce_fwd(*arguments, 0)
