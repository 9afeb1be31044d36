"""group=: query_info_nce over gloo ranks equals one process on the joint batch, draws included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmkern import ops
from tests.testing import run_ranks, unit_features

WIDTH, QUERIES = 12, 3
SEED = 7
OPTIONS: dict[str, dict[str, Any]] = {
    "whole": {},
    "detached": {"detach_columns": True, "label_smoothing": 0.1},
    "ids": {"label_smoothing": 0.1, "negatives_seed": SEED},
    "detached ids": {"detach_columns": True, "negatives_seed": SEED},
}
SHARDS = {"equal": [4, 4], "unequal": [5, 1, 3]}


class Encoders(nn.Module):
    """Linear encoders and a scale, as a model under DDP has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(WIDTH, QUERIES * 8), nn.Linear(WIDTH, 8)
        self.scale = nn.Parameter(torch.tensor(7.0))
        self.double()

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Multiplied by one: the loss then sees outputs of forward, as DDP requires.
        return self.image(image).unflatten(1, (QUERIES, 8)), self.text(text), self.scale * 1


def batch(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, texts and ids; equal ids lie on different ranks."""
    image, text = (unit_features(rows, WIDTH, torch.float64, seed=seed) for seed in (0, 1))
    return image, text, torch.tensor([3, 1, 4, 1, 5, 9, 3, 6, 5])[:rows]


def step(model: nn.Module, part: slice, rows: int, group: Any) -> dict[str, Any]:
    """For each set of options: loss, gradients and draws."""
    image, text, ids = (x[part] for x in batch(rows))
    results = {}
    for name, options in OPTIONS.items():
        model.zero_grad()
        given = {"ids": ids} if "ids" in name else {}
        result = ops.query_info_nce(*model(image, text), **options, **given, group=group)
        (3 * result.loss).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        results[name] = result.loss.detach(), gradients, result[1:]
    return results


def on_rank(rank: int, world: int, shards: list[int]) -> dict[str, Any]:
    start = sum(shards[:rank])
    model = nn.parallel.DistributedDataParallel(Encoders())
    part = slice(start, start + shards[rank])
    results = step(model, part, sum(shards), dist.group.WORLD)
    empty = torch.zeros(2 * rank, QUERIES, 8), torch.zeros(2 * rank, 8)
    try:
        ops.query_info_nce(*empty, 1.0, group=dist.group.WORLD)
    except ValueError as error:
        results["empty"] = str(error)
    # Validation: no gradient wanted.
    outputs = [x.detach() for x in model(*(x[part] for x in batch(sum(shards))[:2]))]
    results["no gradient"] = ops.query_info_nce(*outputs, group=dist.group.WORLD).loss
    return results


@pytest.mark.parametrize("shards", SHARDS.values(), ids=SHARDS.keys())
def test_equals_one_process(shards: list[int]):
    """Encoders at 1/W or W times the gradient train another model; draws that depend on the number
    of ranks make a run impossible to repeat on another machine."""
    results = run_ranks(len(shards), on_rank, shards)
    rows = sum(shards)
    expected = step(Encoders(), slice(0, rows), rows, None)
    for name, (loss, gradients, draws) in expected.items():
        for rank in results:
            got_loss, got_gradients, _ = rank[name]
            torch.testing.assert_close(got_loss, loss, rtol=1e-12, atol=0)
            for got, true in zip(got_gradients, gradients, strict=True):
                torch.testing.assert_close(got, true, rtol=1e-9, atol=1e-12)
        for which in (0, 1):
            if draws[which] is None:
                assert results[0][name][2][which] is None
                continue
            joint = torch.cat([rank[name][2][which] for rank in results])
            assert torch.equal(joint, draws[which])
    for rank in results:
        torch.testing.assert_close(rank["no gradient"], expected["whole"][0])
        assert rank["empty"] == "query_info_nce: queries needs at least one row, got 0 on rank 0"
