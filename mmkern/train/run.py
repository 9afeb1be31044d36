"""From a recipe to a trained run.

A run directory holds ``recipe.yaml`` (every default spelled out), ``checkpoint-<step>``,
``tensorboard`` and ``metrics.json``. Training the same recipe again goes on from the last complete
checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.integrations import TensorBoardCallback

from mmkern import _library
from mmkern.train import checkpoint
from mmkern.train.batches import (
    as_recipe_error,
    build_data,
    check_data,
    check_keys,
    parameters,
)
from mmkern.train.parameter_groups import NO_DECAY, GroupRules, parameter_groups
from mmkern.train.recipe import Recipe, RecipeError, load_recipe
from mmkern.train.stage import OBJECTIVES, Stage
from mmkern.train.starts import required_runs, start
from mmkern.train.systems import make_model, model_class, system
from mmkern.train.trainer import Trainer

RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.json"
# What may differ when a run goes on: none of these changes what is learnt.
_FREE = ("output_dir", "evaluation", "train.log_every", "train.save_every", "train.keep")
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# A number of steps that no run reaches: only the last checkpoint is written.
_NEVER = 2**31


def train(recipe: Recipe) -> dict[str, Any]:
    """Train what a recipe describes, or go on with it; returns what ``metrics.json`` then says.

    One process, or each of several under torchrun. A run that is ``finished`` is left as it is.

    Raises:
        RecipeError: a setting that does not fit this machine, the model or the data source, or
            another recipe's run in ``output_dir``. Raised before the model is built, but for
            patterns of parameter names: those before data are loaded.
        ImportError: a package that the data source needs is missing.
        CheckpointError: ``output_dir`` cannot be written or is full.
    """
    directory = Path(recipe.output_dir)
    check(recipe)
    checkpoint.require_space(directory)
    arguments = training_arguments(recipe)
    if arguments.process_index == 0:
        recipe.save(directory / f"{RECIPE_FILE}.new")
        os.replace(directory / f"{RECIPE_FILE}.new", directory / RECIPE_FILE)
    if done := finished(directory):
        return done
    for needed in required_runs(recipe):
        train(load_recipe(needed))
    model = build_model(recipe)
    _check_patterns(recipe, model)
    pairs = build_data(recipe, model, arguments.process_index, arguments.world_size)
    trainer = Trainer(
        model,
        arguments,
        stage=stage(recipe),
        train_dataset=pairs.dataset,
        batch_sampler=pairs.batch_sampler,
        data_collator=pairs.collator,
        callbacks=[TensorBoardCallback(_writer(directory, arguments))],
    )
    resumed = bool(checkpoint.complete_checkpoints(directory))
    result = trainer.train(resume_from_checkpoint=resumed)
    metrics = {
        "steps": result.global_step,
        "train_seconds": round(trainer.seconds, 3),
        "resumed": resumed,
        "pairs": len(pairs.dataset),
        "loss": next((e["loss"] for e in reversed(trainer.state.log_history) if "loss" in e), None),
        "backend": _library.backend(system(recipe).operator, arguments.device.type)[0]
        if recipe.train.loss == "mmkern"
        else "torch",
    }
    return write_metrics(directory, metrics) if arguments.process_index == 0 else metrics


def finished(directory: str | Path) -> dict[str, Any] | None:
    """What ``metrics.json`` says of a run with nothing left to train; None for any other."""
    whole = checkpoint.complete_checkpoints(directory)
    if not whole:
        return None
    state = json.loads((whole[-1] / checkpoint.STATE).read_text(encoding="utf-8"))
    metrics = _read_metrics(Path(directory))
    # Without "steps" it was killed after its last checkpoint, before it wrote them.
    return metrics if state["global_step"] >= state["max_steps"] and "steps" in metrics else None


def load_run(directory: str | Path) -> tuple[Recipe, nn.Module]:
    """The recipe of a run, and its model with the weights of the last complete checkpoint.

    Raises:
        CheckpointError: not a run, or no complete checkpoint in it.
    """
    directory = Path(directory)
    if not (directory / RECIPE_FILE).is_file():
        raise checkpoint.CheckpointError(f"{directory} is not a run: it has no {RECIPE_FILE}")
    recipe = load_recipe(directory / RECIPE_FILE)
    whole = checkpoint.complete_checkpoints(directory)
    if not whole:
        raise checkpoint.CheckpointError(f"{directory} has no complete checkpoint yet")
    model = build_model(recipe, fresh=False)
    checkpoint.load_strict(model, whole[-1])
    return recipe, model.eval()


def write_metrics(directory: str | Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Merge numbers into a run's ``metrics.json`` and return all of them."""
    path = Path(directory) / METRICS_FILE
    merged = {**_read_metrics(Path(directory)), **metrics}
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps(merged, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, path)
    return merged


def _read_metrics(directory: Path) -> dict[str, Any]:
    path = directory / METRICS_FILE
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return read


def check(recipe: Recipe) -> None:
    """Everything about a recipe that can be wrong and costs nothing to see.

    Raises:
        RecipeError: see ``train``.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if recipe.train.batch_size % world:
        raise RecipeError(
            f"recipe: train.batch_size={recipe.train.batch_size} must be a multiple of the "
            f"{world} processes"
        )
    if recipe.train.precision == "fp16" and not torch.cuda.is_available():
        raise RecipeError("recipe: train.precision=fp16 needs a CUDA device; use bf16 or fp32")
    trained = system(recipe)
    configuration = model_class(recipe.model.builder).config_class
    check_keys("model.overrides", recipe.model.overrides, parameters(configuration.__init__))
    check_keys("model.start", recipe.model.start, set(trained.parts))
    cached = recipe.train.gradient_cache_chunk is not None
    if not trained.objective and (cached or recipe.train.loss != "mmkern"):
        raise RecipeError(
            f"recipe: train.gradient_cache_chunk and train.loss are not for {trained.name}: its "
            "losses are the model's"
        )
    check_data(recipe, trained)
    _check_same_run(recipe)


def build_model(recipe: Recipe, *, fresh: bool = True) -> nn.Module:
    """The recipe's model, initialised from its seed and its ``start``, or read from ``weights``.

    With ``fresh=False`` its weights are about to be loaded, and nothing is read.
    """
    torch.manual_seed(recipe.train.seed)
    with as_recipe_error("model"):
        model = make_model(recipe.model.builder, recipe.model.overrides)
    if fresh:
        start(recipe, model, load_run)
    if fresh and recipe.model.weights is not None:
        checkpoint.load_strict(model, recipe.model.weights)
    if recipe.model.language_model_dtype != "fp32":
        language: Any = model
        language.cast_language_model(_DTYPES[recipe.model.language_model_dtype])
    return model


def _check_patterns(recipe: Recipe, model: nn.Module) -> None:
    """Settings that only the model's parameter names can judge."""
    chosen = stage(recipe)
    with as_recipe_error("train"):
        chosen.apply(model)
        parameter_groups(model, recipe.train.lr, chosen.groups)


def stage(recipe: Recipe) -> Stage:
    """The recipe's stage."""
    settings = recipe.train
    return Stage(
        name=recipe.model.builder,
        freeze=settings.freeze,
        objective=OBJECTIVES[settings.loss] if system(recipe).objective else None,
        gradient_cache_chunk=settings.gradient_cache_chunk,
        groups=GroupRules(
            weight_decay=settings.weight_decay,
            layer_decay=settings.layer_decay,
            layer_decay_in=settings.layer_decay_in,
            rates=settings.rates,
            no_decay=(*NO_DECAY, *settings.no_decay),
        ),
    )


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The recipe as transformers' arguments; joins the process group under torchrun."""
    settings = recipe.train
    warmup = settings.warmup_steps
    return TrainingArguments(
        output_dir=recipe.output_dir,
        per_device_train_batch_size=settings.batch_size // int(os.environ.get("WORLD_SIZE", "1")),
        num_train_epochs=settings.epochs or 1,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.lr,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_epsilon=settings.eps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm or 0.0,
        lr_scheduler_type="cosine_with_min_lr"
        if settings.min_lr
        else _SCHEDULES[settings.schedule],
        lr_scheduler_kwargs={"min_lr": settings.min_lr} if settings.min_lr else {},
        warmup_steps=warmup if warmup < 1 else int(warmup),
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16",
        seed=settings.seed,
        save_strategy="steps",
        save_steps=settings.save_every or _NEVER,
        save_total_limit=settings.keep,
        logging_steps=settings.log_every,
        report_to=[],
        dataloader_num_workers=settings.workers,
        ddp_find_unused_parameters=False,
        use_cpu=not torch.accelerator.is_available(),
    )


def _writer(directory: Path, arguments: TrainingArguments) -> Any:
    if arguments.process_index != 0:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(log_dir=str(directory / "tensorboard"))


def _check_same_run(recipe: Recipe) -> None:
    """Refuse to go on with a run of another recipe."""
    directory = Path(recipe.output_dir)
    if not checkpoint.complete_checkpoints(directory) or not (directory / RECIPE_FILE).is_file():
        return
    old, new = (dict(_flat(r)) for r in (load_recipe(directory / RECIPE_FILE), recipe))
    changed = [key for key in new if old.get(key) != new[key] and not key.startswith(_FREE)]
    if changed:
        shown = ", ".join(f"{key} ({old.get(key)!r} there, {new[key]!r} here)" for key in changed)
        raise RecipeError(
            f"{directory} holds checkpoints of another recipe: {shown}. Choose another output_dir, "
            "or delete that one"
        )


def _flat(recipe: Recipe) -> Iterable[tuple[str, Any]]:
    for f in fields(recipe):
        value = recipe.to_dict()[f.name]
        if not isinstance(value, dict):
            yield f.name, value
        else:
            yield from ((f"{f.name}.{key}", inner) for key, inner in value.items())
