"""Short runs of the trainer on the tiny CLIP."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from mmkern.train.stage import Stage
from mmkern.train.trainer import Trainer
from tests.train.tiny import Pairs, TinyClip, collate


def arguments(output_dir: Any, **changes: Any) -> TrainingArguments:
    """A run of 12 steps over two and a half epochs of 40 pairs, saved every 3."""
    settings = {
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.0,
        "save_steps": 3,
        "save_total_limit": 2,
        "logging_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(output_dir), **{**settings, **changes})


def trainer(
    output_dir: Any, model: nn.Module | None = None, stage: Stage | None = None, **changes: Any
) -> Trainer:
    """A trainer of a tiny CLIP (with dropout, unless a model is given)."""
    torch.manual_seed(0)
    return Trainer(
        TinyClip(dropout=0.3) if model is None else model,
        arguments(output_dir, **changes),
        stage=stage,
        train_dataset=Pairs(),
        data_collator=collate,
    )
