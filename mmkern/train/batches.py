"""From a recipe's ``data`` to data sets, the order of their samples, and collators."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmkern import data
from mmkern.compose.emoji import PICTURE_CHOICE, EmojiChoice
from mmkern.compose.tasks import DocumentTasks
from mmkern.data.emoji import cache_directory
from mmkern.train.recipe import DataConfig, MixtureConfig, Recipe, RecipeError, nearest
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
    "conversations": data.ConversationDataset.from_json,
}
# Batches of a language model, which questions can be asked of.
_TEXTS = ("language", "interleaved", "conversation")
# Kinds of tables whose rows are no questions about one picture: articles with pictures
# (docs/composition.md), questions without any.
_TABLES: dict[str, Callable[..., Any]] = {
    "documents": DocumentTasks.from_jsonl,
    "text": data.TextQuestions.from_jsonl,
}
# Kinds of questions about emoji: from the pictures, the kind and a seed to a data set.
_EMOJI: dict[str, Callable[[data.EmojiView, str, int], Any]] = {
    "caption": lambda view, kind, seed: view,
    PICTURE_CHOICE: lambda view, kind, seed: EmojiChoice(view, seed),
    **dict.fromkeys(data.KINDS, data.EmojiQuestions),
    **dict.fromkeys(data.GRID_KINDS, data.EmojiGrids),
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
                name: _table(entry, seed)(str(entry.path), **entry.options)
                for name, entry in source.mixture.items()
            }
            dataset = _mixture(source, sets, seed)
        elif source.source == "emoji":
            view = emoji_view(source, image_size(model))
            dataset = view
            if batches == "documents":
                shots = source.options.get("shots", (0, 2, 4))
                dataset = data.EmojiEpisodes(view, shots=shots, seed=seed)
            elif source.mixture and batches == "conversation":
                dataset = data.EmojiConversations(view, list(source.mixture), seed)
            elif source.mixture:
                kinds = {kind: _EMOJI[kind](view, kind, seed) for kind in source.mixture}
                dataset = _mixture(source, kinds, seed)
            elif batches not in _TEXTS:
                rows = recipe.train.batch_size // world_size
                labels = view.group_ids()
                sampler = data.UniqueBatchSampler(
                    labels, rows, seed, rank=rank, world_size=world_size
                )
        else:
            dataset = READERS[source.source](source.path, seed=seed, **source.options)
        if source.source == "conversations":
            sampler = data.GroupedBatchSampler(
                dataset.lengths(model.image_positions),
                dataset.pictured,
                recipe.train.batch_size // world_size,
                seed,
                rank=rank,
                world_size=world_size,
            )
    if isinstance(collator, data.ContrastiveCollator) and source.source == "emoji":
        collator.pretokenize(dataset.names)
    return TrainingData(dataset, sampler, collator)


def emoji_view(source: DataConfig, size: int) -> data.EmojiView:
    """The emoji that a recipe trains on."""
    options = {"vendors": data.emoji.VENDORS, **source.options}
    options.pop("shots", None)  # of Flamingo's episodes
    return data.EmojiData.load(size).view(**options)


def _table(entry: MixtureConfig, seed: int = 0) -> Callable[..., Any]:
    """What reads a table of a mixture, with the seed where it draws anything."""
    reader = _TABLES.get(entry.kind, partial(data.QuestionDataset.from_jsonl, kind=entry.kind))
    return partial(reader, seed=seed) if "seed" in parameters(reader) else reader


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
        transform: Any
        if source.source == "emoji":
            transform = data.PixelTransform(**augment)
        elif getattr(model.config, "hd_num", 0):
            transform = data.TileTransform(image_size(model), model.config.hd_num, **statistics)
        else:
            transform = data.ClipTransform(image_size(model), pad=source.pad, **augment)
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
        if kind == "conversation":
            return _conversation_collator(recipe, model, transform, texts)
        return _language_collator(recipe, model, transform, texts)


def _conversation_collator(recipe: Recipe, model: Any, transform: Any, texts: data.Texts) -> Any:
    settings, config = recipe.data.text, model.config
    tokenizer = load_tokenizer(settings.tokenizer)
    _require_room(len(tokenizer), config.text_config.vocab_size)
    return data.ConversationCollator(
        transform,
        tokenizer,
        model.image_positions,
        config.image_token_index,
        template=settings.template,
        texts=texts,
        max_length=settings.max_length or 2048,  # LLaVA's
        bos=tokenizer.bos_token_id if settings.bos else None,
        seed=recipe.train.seed,
    )


def _language_collator(recipe: Recipe, model: Any, transform: Any, texts: data.Texts) -> Any:
    settings, config, trained = recipe.data.text, model.config, system(recipe)
    tokenizer = load_tokenizer(settings.tokenizer)
    _require_room(len(tokenizer), config.get_text_config().vocab_size)
    end = settings.end
    options: dict[str, Any] = {
        "texts": texts,
        "prompt_length": settings.prompt_length,
        "answer_length": settings.answer_length,
        "bos": tokenizer.bos_token_id if settings.bos else None,
        "eos": None if end is None else tokenizer(end, add_special_tokens=False)["input_ids"],
        "seed": recipe.train.seed,
    }
    if trained.batches == "interleaved":
        if settings.max_length is not None:  # of the row, instead of its two parts
            del options["prompt_length"], options["answer_length"]
            options["max_length"] = settings.max_length
        tokens, index = config.image_tokens, config.image_token_index
        options |= {"chat": settings.chat, "spans": trained.spans}
        return data.InterleavedCollator(transform, tokenizer, tokens, index, **options)
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
    if source.source == "conversations" and trained.batches != "conversation":
        raise RecipeError(f"recipe: data.source: {trained.name} is not trained on conversations")
    transform: Any = data.ClipTransform
    if source.source == "emoji":
        allowed, transform = parameters(data.EmojiData.view), data.PixelTransform
        if trained.batches == "documents":
            allowed |= {"shots"}
        check_keys("data.mixture", source.mixture, {*data.KINDS, *trained.kinds})
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
        for name, entry in source.mixture.items():
            reader = parameters(_table(entry)) - {"path", "kind", "seed"}
            check_keys(f"data.mixture.{name}.options", entry.options, reader)
            if entry.kind in _TABLES and trained.batches != "interleaved":
                raise RecipeError(
                    f"recipe: data.mixture.{name}.kind: {trained.name} reads one picture a sample, "
                    f"not {entry.kind}"
                )
    else:
        allowed = parameters(READERS[source.source])
        allowed -= {"path", "folder", "shards", "seed", "rank", "world_size"}
    check_keys("data.options", source.options, allowed)
    if source.source == "shards" and "epoch_samples" not in source.options:
        raise RecipeError(
            "recipe: data.options.epoch_samples must be set for shards: pairs in an epoch over all "
            "processes (tar files do not say how many they hold)"
        )
    augmentation = parameters(transform.__init__) - {"size", "mean", "std", "train", "pad"}
    check_keys("data.augment", source.augment or {}, augmentation)
    questions = source.source == "emoji" or trained.batches != "documents"
    if source.mixture and questions and trained.batches not in _TEXTS:
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
