"""Two ranks against one process: the gradient cache's gradients, and whole runs of the trainer.

Everything runs in one pair of processes, since starting them takes longer than the work.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmkern import ops
from mmkern.train.gradient_cache import cached_step, split_batch
from mmkern.train.stage import OBJECTIVES, Stage, info_nce
from tests.testing import run_ranks
from tests.train.runs import trainer
from tests.train.tiny import batch, bits, deviation, plain, same_bits

RUN: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 7,
    "save_total_limit": None,
    "ddp_find_unused_parameters": False,
}
STAGES = {
    "model": Stage(),
    "cached": Stage(objective=info_nce, gradient_cache_chunk=3),
    "torch": Stage(objective=OBJECTIVES["torch"]),
}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def cached_gradients(rank: int) -> list[dict[str, Tensor]]:
    """Of half of a batch of 24, in chunks of 5 and in one piece."""
    model = plain()
    wrapped = nn.parallel.DistributedDataParallel(model)
    local = {key: value[rank * 12 : rank * 12 + 12] for key, value in batch().items()}

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return ops.info_nce(image, text, scale, group=dist.group.WORLD)

    results = []
    for rows in (5, 12):
        model.zero_grad()
        cached_step(
            lambda c: tuple(wrapped(**c, return_loss=False).values()),
            loss,
            split_batch(local, rows),
            no_sync=wrapped.no_sync,
        )
        results.append(gradients(model))
    return results


def on_rank(rank: int, world: int, directory: str) -> dict[str, Any]:
    """All that is tested."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    results: dict[str, Any] = {"gradients": cached_gradients(rank)}
    for name, stage in STAGES.items():
        run = trainer(Path(directory, name), plain(), stage, **RUN)
        run.train()
        logs = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        results[name] = (run.args.world_size, bits(run.model), logs)
    again = trainer(Path(directory, "cached"), plain(), STAGES["cached"], **RUN)
    again.train(resume_from_checkpoint=str(Path(directory, "cached", "checkpoint-6")))
    results["resumed"] = bits(again.model)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of both ranks."""
    return run_ranks(2, on_rank, str(tmp_path_factory.mktemp("ranks")))


def test_cached_gradients_are_those_of_the_whole_batch(ranks: list[dict[str, Any]]) -> None:
    """Two GPUs with the cache must step as one with the whole batch, temperature included."""
    model = plain()
    model(**batch())["loss"].backward()
    expected = gradients(model)
    for actual in [*ranks[0]["gradients"], *ranks[1]["gradients"]]:
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", STAGES)
def test_two_ranks_train_as_one(name: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    """Half of the batch on each of two GPUs must give the model that one GPU gives."""
    one = trainer(tmp_path, plain(), max_steps=7, save_strategy="no")
    one.train()
    losses = [entry["loss"] for entry in one.state.log_history if "loss" in entry]
    world, weights, logs = ranks[0][name]
    assert world == 2
    assert deviation(weights, bits(one.model)) < 1e-4
    assert same_bits(weights, ranks[1][name][1])
    assert logs == pytest.approx(losses, rel=1e-4), "the logged loss is the global one"


def test_two_ranks_resume_in_mid_epoch(ranks: list[dict[str, Any]]) -> None:
    """Loaders that are sharded twice lose the epoch on resuming, and with it the order."""
    assert same_bits(ranks[0]["resumed"], ranks[0]["cached"][1])
    assert same_bits(ranks[1]["resumed"], ranks[0]["resumed"])
