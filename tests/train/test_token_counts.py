"""A language model's loss over batches, accumulation and ranks with other numbers of labels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

pytest.importorskip("transformers")

from mmkern.train.stage import Stage
from mmkern.train.trainer import Trainer
from tests.models.small_generation import batch, small
from tests.testing import run_ranks
from tests.train.runs import arguments
from tests.train.tiny import collate

ROWS = 8
STAGE = Stage(freeze=("vision_model.e*", "language_model.*"))


class Captions(Dataset[dict[str, Tensor]]):
    """Rows with 1 to 5 labels, one of them with none."""

    def __init__(self, kind: str) -> None:
        parts = [batch(kind, seed=seed) for seed in range(3)]
        self.rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self.rows["labels"][4] = -100

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[index] for name, value in self.rows.items()}


def step(kind: str, directory: str | Path, **changes: Any) -> dict[str, Tensor]:
    """What is trained, after one step on all rows."""
    options = {"max_steps": 1, "save_strategy": "no", "optim": "sgd", "warmup_steps": 0}
    options |= {"learning_rate": 1.0, "weight_decay": 0.0}
    settings = arguments(directory, **{**options, **changes})
    run = Trainer(
        small(kind), settings, stage=STAGE, train_dataset=Captions(kind), data_collator=collate
    )
    run.train()
    return {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}


def on_rank(rank: int, world: int, directory: str) -> dict[str, Tensor]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    size = ROWS // world
    return step(
        "llama", directory, per_device_train_batch_size=size, ddp_find_unused_parameters=False
    )


def deviation(kind: str, one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference in proportion to the step that was taken."""
    before = small(kind).state_dict()
    moved = max(float((value - before[name]).abs().max()) for name, value in one.items())
    return max(float((value - other[name]).abs().max()) for name, value in one.items()) / moved


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_accumulated_labels_weigh_the_same(kind: str, tmp_path: Path) -> None:
    """The same data in smaller batches would train another model."""
    whole = step(kind, tmp_path, per_device_train_batch_size=ROWS)
    parts = step(kind, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert deviation(kind, whole, parts) < 1e-5


def test_labels_weigh_the_same_on_two_ranks(tmp_path: Path) -> None:
    """The same data on two GPUs would train another model."""
    whole = step("llama", tmp_path, per_device_train_batch_size=ROWS)
    for other in run_ranks(2, on_rank, str(tmp_path)):
        assert deviation("llama", whole, other) < 1e-5
