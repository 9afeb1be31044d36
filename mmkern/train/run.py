"""From a recipe to a trained run.

A run directory holds ``recipe.yaml`` (every default spelled out), ``checkpoint-<step>``,
``tensorboard`` and ``metrics.json``. Training the same recipe again goes on from the last complete
checkpoint.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.integrations import TensorBoardCallback

from mmkern import _library, data
from mmkern.train import checkpoint
from mmkern.train.parameter_groups import GroupRules, parameter_groups
from mmkern.train.recipe import Recipe, RecipeError, load_recipe, nearest
from mmkern.train.stage import OBJECTIVES, Stage
from mmkern.train.trainer import Trainer

RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.json"
# What may differ when a run goes on: none of these changes what is learnt.
_FREE = ("output_dir", "evaluation", "train.log_every", "train.save_every", "train.keep")
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
# A number of steps that no run reaches: only the last checkpoint is written.
_NEVER = 2**31
_READERS: dict[str, Callable[..., Any]] = {
    "folder": data.PairDataset.from_folder,
    "csv": data.PairDataset.from_csv,
    "jsonl": data.PairDataset.from_jsonl,
    "shards": data.ShardDataset,
}


@dataclass(frozen=True)
class TrainingData:
    """What a trainer needs besides the model."""

    dataset: Any
    batch_sampler: Any
    collator: data.ContrastiveCollator


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
        "backend": _library.backend("info_nce_fwd", arguments.device.type)[0]
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
    model = build_model(recipe)
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
    configuration = get_type_hints(builder(recipe.model.builder))["return"].config_class
    _check_keys("model.overrides", recipe.model.overrides, _parameters(configuration.__init__))
    transform: Any = data.ClipTransform
    if recipe.data.source == "emoji":
        allowed, transform = _parameters(data.EmojiData.view), data.PixelTransform
    else:
        allowed = _parameters(_READERS[recipe.data.source])
        allowed -= {"path", "folder", "shards", "seed", "rank", "world_size"}
    _check_keys("data.options", recipe.data.options, allowed)
    if recipe.data.source == "shards" and "epoch_samples" not in recipe.data.options:
        raise RecipeError(
            "recipe: data.options.epoch_samples must be set for shards: pairs in an epoch over all "
            "processes (tar files do not say how many they hold)"
        )
    augmentation = _parameters(transform.__init__) - {"size", "mean", "std", "train"}
    _check_keys("data.augment", recipe.data.augment or {}, augmentation)
    _check_same_run(recipe)


def builder(name: str) -> Callable[..., Any]:
    """The function of that name in ``mmkern.models``.

    Raises:
        RecipeError: there is none.
    """
    system = name.partition("_")[0]
    path = f"mmkern.models.{system}"
    module = importlib.import_module(path) if _exists(path) else None
    names = [n for n in dir(module) if n.startswith(f"{system}_")]
    if module is None or name not in names:
        hint = nearest(name, names) if names else "; names begin with the system, clip_vit_b_32"
        raise RecipeError(f"recipe: no model builder {name!r}{hint}")
    function: Callable[..., Any] = getattr(module, name)
    return function


def build_model(recipe: Recipe) -> nn.Module:
    """The recipe's model, initialised from its seed or read from its ``weights``."""
    torch.manual_seed(recipe.train.seed)
    with _as_recipe_error("model"):
        model: nn.Module = builder(recipe.model.builder)(**recipe.model.overrides)
    if recipe.model.weights is not None:
        checkpoint.load_strict(model, recipe.model.weights)
    return model


def build_data(recipe: Recipe, model: Any, rank: int = 0, world_size: int = 1) -> TrainingData:
    """The recipe's pairs, their order, and the collator; sizes are the model's."""
    source, seed = recipe.data, recipe.train.seed
    statistics = {"mean": source.mean or data.MEAN, "std": source.std or data.STD}
    augment: dict[str, Any] = {**statistics, "train": source.augment is not None}
    augment.update(source.augment or {})
    tokenizer = data.ClipTokenizer(source.vocabulary, model.config.context_length)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise RecipeError(
            f"recipe: the tokenizer has {tokenizer.vocab_size} tokens, the model's vocab_size is "
            f"{model.config.vocab_size}"
        )
    with _as_recipe_error("data"):
        sampler: Any = None
        if source.source == "emoji":
            options = {"vendors": data.emoji.VENDORS, **source.options}
            dataset: Any = data.EmojiData.load(model.config.image_size).view(**options)
            rows = recipe.train.batch_size // world_size
            labels = dataset.group_ids()
            sampler = data.UniqueBatchSampler(labels, rows, seed, rank=rank, world_size=world_size)
            transform: Any = data.PixelTransform(**augment)
        else:
            dataset = _READERS[source.source](source.path, seed=seed, **source.options)
            transform = data.ClipTransform(model.config.image_size, **augment)
        collator = data.ContrastiveCollator(transform, tokenizer, seed, templates=source.templates)
    if source.source == "emoji":
        collator.pretokenize(dataset.names)
    return TrainingData(dataset, sampler, collator)


@contextmanager
def _as_recipe_error(section: str) -> Iterator[None]:
    """Values that only the model or the data can judge: say where in the recipe they stand."""
    try:
        yield
    except (RecipeError, data.PairError, data.ShardError, data.ImageError):
        raise
    except (ValueError, TypeError) as error:
        raise RecipeError(f"recipe: {section}: {error}") from error


def _check_patterns(recipe: Recipe, model: nn.Module) -> None:
    """Settings that only the model's parameter names can judge."""
    chosen = stage(recipe)
    with _as_recipe_error("train"):
        chosen.apply(model)
        parameter_groups(model, recipe.train.lr, chosen.groups)


def stage(recipe: Recipe) -> Stage:
    """The recipe's stage."""
    settings = recipe.train
    return Stage(
        name=recipe.model.builder,
        freeze=settings.freeze,
        objective=OBJECTIVES[settings.loss],
        gradient_cache_chunk=settings.gradient_cache_chunk,
        groups=GroupRules(
            weight_decay=settings.weight_decay,
            layer_decay=settings.layer_decay,
            rates=settings.rates,
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
        lr_scheduler_type=_SCHEDULES[settings.schedule],
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


def _parameters(function: Any) -> set[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(function).parameters.values()
    return {p.name for p in found if p.kind in kinds} - {"self"}


def _check_keys(where: str, given: Mapping[str, Any], allowed: set[str]) -> None:
    for key in given:
        if key not in allowed:
            raise RecipeError(
                f"recipe: unknown key '{where}.{key}'{nearest(key, sorted(allowed))} "
                f"({where} has {', '.join(sorted(allowed))})"
            )


def _exists(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
