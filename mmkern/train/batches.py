"""From a recipe's ``data`` to data sets, the order of their samples, and collators."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkern import data
from mmkern.data.emoji import cache_directory
from mmkern.train.recipe import DataConfig, Recipe, RecipeError, nearest
from mmkern.train.systems import System, system

# Kinds of a mixture for Flamingo.
DOCUMENT_READERS: dict[str, Callable[..., Any]] = {
    "pairs": data.PairDataset.from_jsonl,
    "documents": data.DocumentDataset,
}
READERS: dict[str, Callable[..., Any]] = {
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
    collator: Any


def build_data(recipe: Recipe, model: Any, rank: int = 0, world_size: int = 1) -> TrainingData:
    """The recipe's samples, their order, and the collator; sizes are the model's.

    Raises:
        RecipeError: values that only the data can judge.
    """
    source, seed = recipe.data, recipe.train.seed
    batches = system(recipe).batches
    collator = build_collator(recipe, model)
    sampler: Any = None
    with as_recipe_error("data"):
        if source.source == "mixture" and batches == "documents":
            parts = {
                name: DOCUMENT_READERS[entry.kind](str(entry.path), **entry.options)
                for name, entry in source.mixture.items()
            }
            dataset: Any = _mixture(source, parts, seed)
        elif source.source == "mixture":
            sets = {
                name: data.QuestionDataset.from_jsonl(
                    str(entry.path), kind=entry.kind, seed=seed, **entry.options
                )
                for name, entry in source.mixture.items()
            }
            dataset = _mixture(source, sets, seed)
        elif source.source == "emoji":
            view = emoji_view(source, image_size(model))
            dataset = view
            if batches == "documents":
                shots = source.options.get("shots", (0, 2, 4))
                dataset = data.EmojiEpisodes(view, shots=shots, seed=seed)
            elif source.mixture:
                kinds = {kind: data.EmojiQuestions(view, kind, seed) for kind in source.mixture}
                dataset = _mixture(source, kinds, seed)
            elif batches != "language":
                rows = recipe.train.batch_size // world_size
                labels = view.group_ids()
                sampler = data.UniqueBatchSampler(
                    labels, rows, seed, rank=rank, world_size=world_size
                )
        else:
            dataset = READERS[source.source](source.path, seed=seed, **source.options)
    if isinstance(collator, data.ContrastiveCollator) and source.source == "emoji":
        collator.pretokenize(dataset.names)
    return TrainingData(dataset, sampler, collator)


def emoji_view(source: DataConfig, size: int) -> data.EmojiView:
    """The emoji that a recipe trains on."""
    options = {"vendors": data.emoji.VENDORS, **source.options}
    options.pop("shots", None)  # of Flamingo's episodes
    return data.EmojiData.load(size).view(**options)


def _mixture(source: DataConfig, sets: Mapping[str, Any], seed: int) -> data.Mixture:
    weights = {name: entry.weight for name, entry in source.mixture.items()}
    return data.Mixture(sets, weights=weights, samples=source.samples, seed=seed)


def image_size(model: Any) -> int:
    """Edge of the pictures that a model takes."""
    size: int = getattr(model.config, "vision_config", model.config).image_size
    return size


def build_collator(recipe: Recipe, model: Any, *, test: bool = False) -> Any:
    """The collator of the recipe's system.

    Args:
        recipe, model: what is trained.
        test: no augmentation, and always the first of each task's templates.

    Raises:
        RecipeError: a tokenizer that the model has no room for, or values that do not fit.
    """
    source, seed = recipe.data, recipe.train.seed
    statistics = {"mean": source.mean or data.MEAN, "std": source.std or data.STD}
    augment: dict[str, Any] = {**statistics, "train": source.augment is not None and not test}
    augment.update(source.augment or {})
    with as_recipe_error("data"):
        transform: Any = (
            data.PixelTransform(**augment)
            if source.source == "emoji"
            else data.ClipTransform(image_size(model), **augment)
        )
        kind = system(recipe).batches
        if kind == "contrastive":
            tokenizer = data.ClipTokenizer(source.vocabulary, model.config.context_length)
            _require_room(tokenizer.vocab_size, model.config.vocab_size)
            return data.ContrastiveCollator(transform, tokenizer, seed, templates=source.templates)
        if kind == "documents":
            return _document_collator(recipe, model, transform)
        texts = data.Texts(prompt=source.text.prompt, captions=source.templates, first=test)
        if kind == "pretraining":
            tokenizer = load_tokenizer(source.text.tokenizer)
            _require_room(len(tokenizer), model.config.qformer_config.vocab_size)
            return data.PretrainingCollator(
                transform, tokenizer, texts=texts, length=source.text.length, seed=seed
            )
        return _language_collator(recipe, model, transform, texts)


def _language_collator(recipe: Recipe, model: Any, transform: Any, texts: data.Texts) -> Any:
    settings, config = recipe.data.text, model.config
    tokenizer = load_tokenizer(settings.tokenizer)
    _require_room(len(tokenizer), config.text_config.vocab_size)
    end = None
    if settings.end is not None:
        end = tokenizer(settings.end, add_special_tokens=False)["input_ids"]
    options: dict[str, Any] = {
        "texts": texts,
        "prompt_length": settings.prompt_length,
        "answer_length": settings.answer_length,
        "bos": tokenizer.bos_token_id if settings.bos else None,
        "eos": end,
        "seed": recipe.train.seed,
    }
    if settings.qformer_tokenizer is not None:
        options["qformer_tokenizer"] = load_tokenizer(settings.qformer_tokenizer)
    arguments = (transform, tokenizer, config.num_query_tokens, config.image_token_index)
    if config.text_config.is_encoder_decoder:
        return data.Seq2SeqCollator(*arguments, **options)
    return data.CausalCollator(*arguments, label_bos=settings.label_bos, **options)


def _document_collator(recipe: Recipe, model: Any, transform: Any) -> Any:
    settings, config = recipe.data.text, model.config
    tokenizer = load_tokenizer(settings.tokenizer)
    _require_room(len(tokenizer), config.text_config.vocab_size)
    weights = {name: entry.loss_weight for name, entry in recipe.data.mixture.items()}
    return data.DocumentCollator(
        transform,
        tokenizer,
        config.image_token_id,
        config.end_of_chunk_token_id,
        length=settings.length,
        weights=weights or None,
        bos=tokenizer.bos_token_id if settings.bos else None,
        eos=tokenizer.eos_token_id,
        seed=recipe.train.seed,
    )


def load_tokenizer(name: str | None) -> Any:
    """``minilm``, ``smollm2``, or transformers' tokenizer in a folder.

    Raises:
        RecipeError: no such folder.
    """
    from mmkern.models import packaged

    if name == "minilm":
        return packaged.minilm_tokenizer()
    if name == "smollm2":
        return packaged.smollm2_tokenizer(cache_directory())
    if name is None or not Path(name).is_dir():
        raise RecipeError(
            f"recipe: data.text: a tokenizer must be minilm, smollm2 or a folder, got {name!r}"
        )
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def _require_room(tokens: int, vocabulary: int) -> None:
    if tokens > vocabulary:
        raise RecipeError(
            f"recipe: the tokenizer has {tokens} tokens, the model's vocab_size is {vocabulary}"
        )


def check_data(recipe: Recipe, trained: System) -> None:
    """Everything about ``data`` that can be wrong and costs nothing to see.

    Raises:
        RecipeError: naming the key.
    """
    source = recipe.data
    transform: Any = data.ClipTransform
    if source.source == "emoji":
        allowed, transform = parameters(data.EmojiData.view), data.PixelTransform
        if trained.batches == "documents":
            allowed |= {"shots"}
        check_keys("data.mixture", source.mixture, set(data.KINDS))
    elif source.source == "mixture" and trained.batches == "documents":
        allowed = set()
        for name, entry in source.mixture.items():
            if entry.kind not in DOCUMENT_READERS:
                raise RecipeError(
                    f"recipe: data.mixture.{name}.kind must be one of {list(DOCUMENT_READERS)} for "
                    f"{trained.name}, got {entry.kind!r}"
                )
            reader = parameters(DOCUMENT_READERS[entry.kind]) - {"path"}
            check_keys(f"data.mixture.{name}.options", entry.options, reader)
    elif source.source == "mixture":
        allowed = set()
        reader = parameters(data.QuestionDataset.from_jsonl) - {"path", "kind", "seed"}
        for name, entry in source.mixture.items():
            check_keys(f"data.mixture.{name}.options", entry.options, reader)
    else:
        allowed = parameters(READERS[source.source])
        allowed -= {"path", "folder", "shards", "seed", "rank", "world_size"}
    check_keys("data.options", source.options, allowed)
    if source.source == "shards" and "epoch_samples" not in source.options:
        raise RecipeError(
            "recipe: data.options.epoch_samples must be set for shards: pairs in an epoch over all "
            "processes (tar files do not say how many they hold)"
        )
    augmentation = parameters(transform.__init__) - {"size", "mean", "std", "train"}
    check_keys("data.augment", source.augment or {}, augmentation)
    questions = source.source == "emoji" or trained.batches != "documents"
    if source.mixture and questions and trained.batches != "language":
        raise RecipeError(f"recipe: data.mixture: {trained.name} is trained on captions")
    if trained.batches != "contrastive" and source.text.tokenizer is None:
        raise RecipeError(f"recipe: data.text.tokenizer must be set for {trained.name}")
    reads = trained.name == "instructblip"
    if reads != (source.text.qformer_tokenizer is not None):
        raise RecipeError(
            f"recipe: data.text.qformer_tokenizer must {'' if reads else 'not '}be set for "
            f"{trained.name}"
        )


@contextmanager
def as_recipe_error(section: str) -> Iterator[None]:
    """Values that only the model or the data can judge: say where in the recipe they stand."""
    try:
        yield
    except (RecipeError, data.PairError, data.ShardError, data.ImageError):
        raise
    except (ValueError, TypeError) as error:
        raise RecipeError(f"recipe: {section}: {error}") from error


def parameters(function: Any) -> set[str]:
    """Names of a function's arguments."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(function).parameters.values()
    return {p.name for p in found if p.kind in kinds} - {"self"}


def check_keys(where: str, given: Mapping[str, Any], allowed: set[str]) -> None:
    """Refuse keys that nothing takes.

    Raises:
        RecipeError: with the nearest valid key.
    """
    for key in given:
        if key not in allowed:
            raise RecipeError(
                f"recipe: unknown key '{where}.{key}'{nearest(key, sorted(allowed))} "
                f"({where} has {', '.join(sorted(allowed))})"
            )
