"""The trainer: losses, logging, parameter groups, order of data, gradient cache, two ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmkern.train.parameter_groups import GroupRules
from mmkern.train.sampler import EpochBatchSampler
from mmkern.train.stage import OBJECTIVES, Stage, info_nce
from mmkern.train.trainer import Trainer, check_hooks
from tests.train.runs import arguments, trainer
from tests.train.tiny import Pairs, TinyClip, bits, collate, deviation, plain, same_bits


class Branches(nn.Module):
    """Returns two named losses, takes labels and any keyword, as a language model does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 1)
        self.seen: list[int] = []

    def forward(self, pixel_values: Tensor, **anything: Any) -> dict[str, Tensor]:
        self.seen.append(len(pixel_values))
        out = self.layer(pixel_values.flatten(1))
        first, second = out.square().mean(), (out - 1).abs().mean()
        return {"loss": first + second, "loss_first": first, "loss_second": second}


def test_named_losses_are_logged_as_means_of_the_window(tmp_path: Path) -> None:
    """A stage with several losses is blind if the log shows only their sum."""
    run = trainer(tmp_path, Branches(), max_steps=4, save_strategy="no")
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [2, 4]
    for entry in logs:
        assert entry["loss_first"] + entry["loss_second"] == pytest.approx(entry["loss"], rel=1e-5)


def test_stage_weights_losses(tmp_path: Path) -> None:
    """A weight of 0 must leave a loss out; a name that the model lacks must not go unnoticed."""
    stage = Stage(losses={"loss_first": 2.0, "loss_second": 0.0})
    run = trainer(tmp_path, Branches(), stage, max_steps=2, save_strategy="no")
    run.train()
    entry = run.state.log_history[0]
    assert entry["loss"] == pytest.approx(2 * entry["loss_first"], rel=1e-5)
    run = trainer(tmp_path, Branches(), Stage(losses={"loss_third": 1.0}), save_strategy="no")
    with pytest.raises(ValueError, match=r"lacks loss_third; it has loss, loss_first"):
        run.train()


class Labelled(Pairs):
    """Pairs with labels, which make transformers count items."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "labels": torch.ones(3, dtype=torch.long)}


def test_accumulation_is_a_mean_though_forward_takes_kwargs(tmp_path: Path) -> None:
    """transformers takes **kwargs for a promise to divide, and gradients grow with the steps."""
    weights = []
    for size, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        settings = arguments(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            max_steps=3, save_strategy="no", optim="sgd",
        )  # fmt: skip
        run = Trainer(Branches(), settings, train_dataset=Labelled(), data_collator=collate)
        run.train()
        weights.append(bits(run.model))
    assert deviation(*weights) < 1e-6


def test_nan_loss_stops_the_run(tmp_path: Path) -> None:
    """A run that goes on with NaN wastes days, and rotation deletes the last good weights."""

    class Broken(Branches):
        def forward(self, pixel_values: Tensor, **anything: Any) -> dict[str, Tensor]:
            broken = len(self.seen) >= 4
            out = super().forward(pixel_values)
            return {**out, "loss": out["loss"] * (math.nan if broken else 1)}

    run = trainer(tmp_path, Broken(), save_steps=2)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 6.*checkpoint-4"):
        run.train()


def test_schedule_is_cosine_after_warm_up(tmp_path: Path) -> None:
    """The paper's schedule; a schedule by epochs or without warm-up diverges at its rates."""
    run = trainer(tmp_path, plain(), logging_steps=1, save_strategy="no")
    run.train()
    rates = [e["learning_rate"] for e in run.state.log_history if "learning_rate" in e]
    expected = [0.0, 0.005] + [0.005 * (1 + math.cos(math.pi * k / 10)) for k in range(10)]
    assert rates == pytest.approx(expected)


def test_logit_scale_stays_in_bounds(tmp_path: Path) -> None:
    """Beyond 100 training becomes unstable; CLIP clips the parameter after each step."""
    model = plain()
    nn.init.constant_(model.logit_scale, math.log(99.9))
    seen = []

    def grow(outputs: Any, group: Any) -> Tensor:
        seen.append(outputs["logit_scale"].item())
        return -outputs["logit_scale"] + 0 * outputs["image_features"].sum()

    trainer(tmp_path, model, Stage(objective=grow), save_strategy="no", warmup_steps=0).train()
    assert max(seen) <= 100.001 and model.logit_scale.item() <= math.log(100) + 1e-6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_cache_trains_the_same_model(precision: str, tmp_path: Path) -> None:
    """Choosing a chunk that fits memory must not change what is learnt."""
    weights = []
    for rows in (None, 3):
        stage = Stage(objective=info_nce, gradient_cache_chunk=rows)
        run = trainer(tmp_path, plain(), stage, save_strategy="no", max_steps=5,
                      bf16=precision == "bf16", optim="sgd")  # fmt: skip
        run.train()
        weights.append(bits(run.model))
    assert deviation(*weights) < (1e-5 if precision == "fp32" else 2e-3)
    assert not same_bits(weights[0], bits(plain()))


def test_mmkern_and_torch_losses_train_the_same_model(tmp_path: Path) -> None:
    """The comparison run must differ in the kernel only."""
    weights = []
    for objective in (None, *OBJECTIVES.values()):  # None: the model's own loss
        run = trainer(tmp_path, plain(), Stage(objective=objective), save_strategy="no")
        run.train()
        weights.append(bits(run.model))
    assert deviation(weights[0], weights[1]) == 0
    assert deviation(weights[1], weights[2]) < 1e-4


def test_order_and_epochs(tmp_path: Path) -> None:
    """Every sample once an epoch, another order each epoch, and the data set told which it is."""
    seen: list[tuple[int, int]] = []

    class Spy(Pairs):
        def __getitem__(self, index: int) -> dict[str, Any]:
            seen.append((self.epoch, index))
            return super().__getitem__(index)

    settings = arguments(tmp_path, max_steps=10, save_strategy="no")
    Trainer(Branches(), settings, train_dataset=Spy(), data_collator=collate).train()
    epochs = [[i for e, i in seen if e == epoch] for epoch in (0, 1)]
    assert all(sorted(order) == list(range(40)) for order in epochs)
    assert epochs[0] != epochs[1]


def test_batches_do_not_depend_on_the_number_of_ranks() -> None:
    """A recipe must mean the same run on one GPU and on eight."""
    whole = list(EpochBatchSampler(50, 12, seed=7))
    ranks = [list(EpochBatchSampler(50, 4, seed=7, rank=r, world_size=3)) for r in range(3)]
    assert whole == [[*a, *b, *c] for a, b, c in zip(*ranks, strict=True)]
    assert len(whole) == 4 and len({i for batch in whole for i in batch}) == 48
    with pytest.raises(ValueError, match="a batch of 60 needs as many samples, got 50"):
        EpochBatchSampler(50, 20, world_size=3)


def test_frozen_tower_neither_learns_nor_drifts(tmp_path: Path) -> None:
    """Weight decay, dropout or batch statistics must not act on a tower that is locked."""
    model = TinyClip(dropout=0.5, norm=True)
    before = bits(model)
    run = trainer(tmp_path, model, Stage(freeze=["visual.*"]), max_steps=2, save_strategy="no")
    run.train()
    after = bits(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith("visual") for name in changed)
    x = torch.randn(6, 12)
    model.train()
    assert torch.equal(model.visual(x), model.visual(x)), "dropout must be off in the frozen tower"


def test_a_later_stage_trains_what_an_earlier_one_froze() -> None:
    """Its dropout and batch statistics would stay switched off, and nothing would say so."""
    model = TinyClip(dropout=0.3)
    Stage(freeze=["visual.*"]).apply(model)
    Stage().apply(model)
    model.train()
    model.visual(torch.zeros(2, 12))
    assert model.visual.training and all(p.requires_grad for p in model.parameters())


def test_optimizer_gets_the_groups(tmp_path: Path) -> None:
    """Decay on gains and temperatures, or a projector at the tower's rate, trains worse."""
    rules = GroupRules(weight_decay=0.1, rates={"visual.4.*": 10.0})
    run = trainer(tmp_path, plain(), Stage(groups=rules), warmup_steps=0)
    groups = run.create_optimizer().param_groups
    found = {name: (g["lr"], g["weight_decay"]) for g in groups for name in g["names"]}
    assert found["visual.4.weight"] == (0.1, 0.1) and found["visual.4.bias"] == (0.1, 0.0)
    assert found["logit_scale"] == found["positional_embedding"] == (0.01, 0.0)
    assert found["token_embedding.weight"] == (0.01, 0.1)


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ({"gradient_cache_chunk": 2}, {}, "needs an objective"),
        ({"gradient_cache_chunk": 0, "objective": info_nce}, {}, "at least 1"),
        ({"losses": {"loss": 1.0}, "objective": info_nce}, {}, "not both"),
        ({"freeze": ["vision.*"]}, {}, r"matches freeze pattern 'vision\.\*'"),
        ({"freeze": ["*"]}, {}, "leaves nothing"),
        ({}, {"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "persist"),
    ],
)
def test_settings_that_cannot_work(
    stage: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """A wrong stage must be refused before hours of training, by name."""
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, plain(), Stage(**stage), **changes)


def test_unknown_transformers_is_refused() -> None:
    """An override that transformers no longer calls would silently bring its traps back."""

    class Renamed(Trainer.__bases__[0]):  # type: ignore[name-defined,misc]
        def _save(self, output_dir: str | None = None) -> None:
            """Has lost a parameter."""

    check_hooks(Trainer.__bases__[0])
    with pytest.raises(ImportError, match=r"_save\(state_dict\), which transformers [\d.]+"):
        check_hooks(Renamed)
    with pytest.raises(ImportError, match=r"object\.train"):
        check_hooks(object)
