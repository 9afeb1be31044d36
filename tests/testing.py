"""Helpers that several test files use: the error budget, input makers, ranks on gloo."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def assert_within_budget(
    actual: Tensor, same_dtype: Tensor, exact: Tensor, magnitude: float | None = None
) -> None:
    """Error against fp64 at most twice that of the same-dtype reference, plus rounding.

    Args:
        actual: what is tested.
        same_dtype: plain PyTorch on the same inputs, with outputs of the same dtype.
        exact: plain PyTorch on the same (rounded) inputs in fp64.
        magnitude: what rounding is relative to; the largest of `exact` unless given. A sum that
            cancels (the gradient of a scale) is given the sum of its terms' absolute values.
    """
    assert actual.dtype == same_dtype.dtype, (actual.dtype, same_dtype.dtype)
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    eps = torch.finfo(actual.dtype).eps
    exact = exact.double()
    error = (actual.double() - exact).abs().max().item()
    magnitude = exact.abs().max().item() if magnitude is None else magnitude
    allowed = (same_dtype.double() - exact).abs().max().item() + eps * magnitude
    assert error <= 2 * allowed, f"error {error:.3e} exceeds twice {allowed:.3e}"


def unit_features(
    rows: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Tensor:
    """[rows, width] of unit norm, the same numbers for every dtype and device up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return F.normalize(x, dim=1).to(device=device, dtype=dtype)


def _rank(
    rank: int, world: int, directory: str, job: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world
    )
    torch.save(job(rank, world, *args), f"{directory}/{rank}.pt")
    dist.barrier()
    # Not through the interpreter's end: a thread of gloo that lets go of a Python object there
    # aborts the process now and then, after all is done. A job that raises never comes here.
    os._exit(0)


def run_ranks(world: int, job: Callable[..., Any], *args: Any) -> list[Any]:
    """`job(rank, world, *args)` on `world` gloo processes; their results in rank order."""
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(_rank, (world, directory, job, args), nprocs=world)
        return [torch.load(Path(directory, f"{rank}.pt")) for rank in range(world)]


def awkward(kind: str, x: Tensor) -> Tensor:
    """The values of a [N, D] tensor behind strides that kernels get wrong.

    Storage that does not belong to the values is NaN, so one stray read shows.
    """
    rows, width = x.shape
    if kind == "padded rows":
        storage = x.new_full((rows + 2, width + 3), torch.nan)
        view = storage[1:-1, 1 : width + 1]
    elif kind == "every second row":
        view = x.new_full((2 * rows, width), torch.nan)[::2]
    elif kind == "transposed":
        view = x.new_full((width, rows), torch.nan).T
    elif kind == "strided columns":
        view = x.new_full((rows, 2 * width), torch.nan)[:, ::2]
    else:
        raise ValueError(kind)
    view.copy_(x)
    return view.detach()


AWKWARD = ("padded rows", "every second row", "transposed", "strided columns")
