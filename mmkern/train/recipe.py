"""Recipes: one YAML file says everything about one training run.

``load_recipe("clip-emoji", ["train.lr=1e-3"])`` reads a recipe that the package ships (or a file),
applies the overrides, and checks keys, types and values before any data or model is loaded. The
dataclasses below are the schema: a key that is not one of their fields is refused, with the nearest
valid key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml


class RecipeError(ValueError):
    """A recipe that cannot be run: an unknown key, a wrong type, or a value out of range."""


def _require(condition: bool, key: str, expected: str, got: object) -> None:
    if not condition:
        raise RecipeError(f"recipe: {key} must be {expected}, got {got!r}")


def _require_templates(key: str, templates: Sequence[str]) -> None:
    for template in templates:
        _require(template.count("{}") == 1, key, "texts with one {} each", template)


@dataclass(frozen=True)
class ModelConfig:
    """Which model. ``builder`` names a function or a class of ``mmkern.models``.

    Attributes:
        builder: for example ``clip_vit_b_32``, or ``Blip2ForConditionalGeneration`` for sizes of
            one's own.
        overrides: its keyword arguments, that is, fields of the model's configuration.
        weights: a directory written by ``save_pretrained`` (a run's checkpoint, say) to start from
            instead of the builder's initialisation; read strictly.
        start: part of the model -> what it starts from (:mod:`mmkern.train.starts`): a run, the
            recipe of a run (trained first if it is not there), a model that a package brings, or a
            folder of transformers.
        language_model_dtype: what a frozen language model is held in; LoRA on it stays in fp32.
    """

    builder: str
    overrides: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    start: dict[str, str] = field(default_factory=dict)
    language_model_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"


@dataclass(frozen=True)
class MixtureConfig:
    """One data set of a mixture; its share is weight times the square root of its size.

    Attributes:
        weight: see :class:`mmkern.data.Mixture`.
        path: a table of JSON lines. Not used by ``emoji``, where the entry's name is the kind.
        kind: of its questions; see ``mmkern.data.TEMPLATES``. For systems that read texts with any
            number of pictures also ``documents``: articles with pictures
            (:mod:`mmkern.compose.tasks`), and ``text``: questions without any (``TextQuestions``).
            Flamingo's are ``pairs`` and ``documents`` (:mod:`mmkern.data.documents`).
        options: further keyword arguments of that kind's ``from_jsonl`` (``QuestionDataset``'s).
        loss_weight: factor of its part of the loss (Flamingo).
    """

    weight: float = 1.0
    loss_weight: float = 1.0
    path: str | None = None
    kind: str = "question"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TextConfig:
    """Tokens of systems with a Q-Former or a language model (:mod:`mmkern.data.language`).

    Attributes:
        tokenizer: of the language model, or of the Q-Former in BLIP-2's first stage: ``smollm2``,
            ``minilm``, or a folder of transformers.
        qformer_tokenizer: of the Q-Former that reads instructions (InstructBLIP).
        length: tokens of a caption in the first stage, of a whole sample of Flamingo.
        prompt: stands before captions and is not trained on.
        prompt_length, answer_length: tokens at most.
        bos: begin texts with the tokenizer's first token; ``label_bos``: and train on it.
        end: text that ends an answer; null is the tokenizer's own end.
        template: how conversations become texts (LLaVA): ``v1``, ``llama_2``, ``bare`` (v1 without
            its first words), or ``plain`` for captions (:data:`mmkern.data.CONVERSATIONS`).
        max_length: tokens of a row of text and images at most, instead of the two lengths (LLaVA,
            InternLM-XComposer and XComposer2).
        chat: the two tokens that begin and end a turn: prompts and answers are then turns of a
            conversation (the same two).
    """

    tokenizer: str | None = None
    qformer_tokenizer: str | None = None
    length: int = 32
    prompt: str = ""
    prompt_length: int = 128
    answer_length: int = 256
    bos: bool = False
    label_bos: bool = False
    end: str | None = None
    template: Literal["v1", "llama_2", "bare", "plain"] = "v1"
    max_length: int | None = None
    chat: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        least_of = {"length": 3, "prompt_length": 3, "answer_length": 1, "max_length": 2}
        for key, least in least_of.items():
            value = getattr(self, key)
            enough = value is None or value >= least
            _require(enough, f"data.text.{key}", f"at least {least}", value)


@dataclass(frozen=True)
class DataConfig:
    """Which pictures and texts.

    Attributes:
        source: ``emoji`` (pictures that come in Python packages), a ``folder`` of pictures with
            captions beside them, a ``csv`` or ``jsonl`` table, webdataset tar ``shards``, a
            ``mixture`` of questions in JSON lines, or LLaVA's ``conversations`` in JSON.
        path: the folder, the table, or the shards' pattern. Not used by ``emoji`` and ``mixture``.
        options: further keyword arguments of that source's reader (column names, for example).
        templates: captions are put in the place of "{}" in one of these, drawn anew each epoch.
        augment: arguments of the augmentation (``ClipTransform``: scale, ratio; for emoji
            ``PixelTransform``: shift, jitter); null switches it off.
        pad: fit whole pictures into a square, its border of CLIP's mean colour (LLaVA 1.5's
            finetuning), instead of cropping them; not for emoji.
        mean, std: normalisation, CLIP's when null.
        vocabulary: CLIP's vocabulary file; null finds an installed one.
        text: tokens of the other systems.
        mixture: name -> data set of questions. With ``emoji`` the names are kinds of questions, and
            without any the names of the pictures are captions. LLaVA joins two or three of the
            kinds in a conversation about each emoji; weights and ``samples`` do not count there.
        samples: of a mixture's epoch; null is the sum of its sizes.
    """

    source: Literal["emoji", "folder", "csv", "jsonl", "shards", "mixture", "conversations"]
    path: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    templates: tuple[str, ...] = ("{}",)
    augment: dict[str, Any] | None = field(default_factory=dict)
    pad: bool = False
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    vocabulary: str | None = None
    text: TextConfig = field(default_factory=TextConfig)
    mixture: dict[str, MixtureConfig] = field(default_factory=dict)
    samples: int | None = None

    def __post_init__(self) -> None:
        if self.source == "mixture":
            for name, entry in self.mixture.items():
                _require(entry.path is not None, f"data.mixture.{name}.path", "set", entry.path)
            _require(len(self.mixture) > 0, "data.mixture", "set for source mixture", self.mixture)
        elif self.source != "emoji":
            _require(self.path is not None, "data.path", f"set for source {self.source}", self.path)
            _require(
                not self.mixture, "data.mixture", "empty but for emoji and mixture", self.mixture
            )
        _require(self.samples is None or self.samples > 0, "data.samples", "positive", self.samples)
        _require(len(self.templates) > 0, "data.templates", "at least one", self.templates)
        _require_templates("data.templates", self.templates)
        if self.std is not None:
            _require(min(self.std) > 0, "data.std", "positive", list(self.std))


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation. Defaults are those of the CLIP paper's ViT models (table 18 and 19).

    Attributes:
        epochs, max_steps: how long; exactly one of them.
        batch_size: pairs in a step over all processes: a recipe means the same run on any number.
        gradient_cache_chunk: pairs that a process encodes at once (null: the whole local batch).
            Smaller is slower and needs less memory; the gradient is the same.
        precision: autocast dtype; ``fp16`` also scales the loss and needs a GPU.
        loss: ``mmkern`` (the fused operator) or ``torch`` (the N x N matrix, for comparison).
        schedule: after ``warmup_steps`` linear ones. ``warmup_steps`` below 1 is a share of all.
        min_lr: where the cosine ends.
        layer_decay: the rate of block i of L is lr * layer_decay**(L - i); 1 switches it off.
        layer_decay_in: shell patterns of the parameter names that it applies to.
        rates: shell patterns of parameter names -> factor of lr (a fresh projector's, say).
        freeze: shell patterns of parameter names that are not trained.
        no_decay: shell patterns of parameter names without weight decay, besides gains, biases and
            embeddings of places.
        max_grad_norm: clip gradients to this norm; null does not.
        save_every: steps between checkpoints; null saves only the last. ``keep``: how many stay.
        workers: processes that load data, per training process.
    """

    batch_size: int
    epochs: float | None = None
    max_steps: int | None = None
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.2
    warmup_steps: float = 2000
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr: float = 0.0
    layer_decay: float = 1.0
    layer_decay_in: tuple[str, ...] = ("*",)
    rates: dict[str, float] = field(default_factory=dict)
    freeze: tuple[str, ...] = ()
    no_decay: tuple[str, ...] = ()
    max_grad_norm: float | None = None
    gradient_cache_chunk: int | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    loss: Literal["mmkern", "torch"] = "mmkern"
    seed: int = 0
    save_every: int | None = None
    keep: int = 2
    log_every: int = 10
    workers: int = 0

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.max_steps is None):
            raise RecipeError(
                "recipe: set exactly one of train.epochs and train.max_steps, got "
                f"{self.epochs!r} and {self.max_steps!r}"
            )
        for key in ("batch_size", "keep", "log_every", "epochs", "max_steps", "save_every", "lr",
                    "eps", "gradient_cache_chunk", "max_grad_norm"):  # fmt: skip
            value = getattr(self, key)
            _require(value is None or value > 0, f"train.{key}", "positive", value)
        for key in ("weight_decay", "warmup_steps", "seed", "workers", "min_lr"):
            value = getattr(self, key)
            _require(value >= 0, f"train.{key}", "at least 0", value)
        _require(self.batch_size > 1, "train.batch_size", "at least 2", self.batch_size)
        _require(all(0 <= b < 1 for b in self.betas), "train.betas", "in [0, 1)", self.betas)
        _require(0 < self.layer_decay <= 1, "train.layer_decay", "in (0, 1]", self.layer_decay)
        _require(
            not self.min_lr or self.schedule == "cosine",
            "train.min_lr",
            "0 but for cosine",
            self.min_lr,
        )
        whole = self.warmup_steps < 1 or self.warmup_steps == int(self.warmup_steps)
        _require(whole, "train.warmup_steps", "whole, or a share below 1", self.warmup_steps)


@dataclass(frozen=True)
class EvaluationConfig:
    """What to measure after training.

    Attributes:
        batch_size: pictures or texts encoded at once.
        templates: prompts with one ``{}``, averaged into a classifier; the first alone is reported
            beside the ensemble. For data with names (emoji).
        options: further settings of the source's evaluation (vendors to test on, for example).
    """

    batch_size: int = 256
    templates: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(self.batch_size > 0, "evaluation.batch_size", "positive", self.batch_size)
        _require_templates("evaluation.templates", self.templates)


@dataclass(frozen=True)
class Recipe:
    """A run: model, data, optimisation, evaluation, and the directory it is written to."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    output_dir: str
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Recipe:
        """Check and convert nested mappings, as read from YAML.

        Raises:
            RecipeError: an unknown or missing key, a wrong type, a value out of range.
        """
        recipe: Recipe = _build(Recipe, values, "")
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Nested mappings of plain YAML types, every default spelled out."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain

    def save(self, path: str | Path) -> None:
        """Write the resolved recipe as YAML."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")


def recipe_names() -> list[str]:
    """Recipes that come with the package."""
    folder = resources.files("mmkern") / "recipes"
    if not folder.is_dir():
        return []
    names = (entry.name for entry in folder.iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply ``key=value`` overrides, check it.

    Args:
        name_or_path: a name of :func:`recipe_names`, or a path to a YAML file.
        overrides: dotted keys and YAML values, ``train.lr=1e-3`` or ``train.betas=[0.9, 0.95]``; a
            value that is not YAML is text.

    Raises:
        RecipeError: no such recipe, YAML that does not parse, and what ``Recipe.from_dict`` raises.
    """
    values = _parse(_text(name_or_path), f"recipe {name_or_path}")
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {name_or_path}: expected a mapping, got {type(values).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"override must be key=value, got {override!r}")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            parsed = value  # text such as {000..041}.tar
        _assign(values, key.strip(), parsed)
    return Recipe.from_dict(values)


def _text(name_or_path: str | Path) -> str:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        try:
            return path.read_text(encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"recipe {path}: cannot be read ({error.strerror})") from error
    name, names = str(name_or_path), recipe_names()
    if name not in names:
        raise RecipeError(
            f"no recipe named {name!r}{nearest(name, names)}; there are: "
            f"{', '.join(names) or 'none'} (a path must end in .yaml)"
        )
    return (resources.files("mmkern") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {error}") from error


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, making the mappings on the way; `from_dict` checks that it exists."""
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"override {key}={value!r}: {parent} is {inner!r}, not a mapping")
        values = inner
    values[last] = value


def _keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a schema."""
    for name, kind in get_type_hints(schema).items():
        if dataclasses.is_dataclass(kind):
            yield from _keys(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        yield f"{prefix}{name}"


def nearest(key: str, valid: Sequence[str]) -> str:
    """``", did you mean ...?"``: by the whole dotted key, else by its last part."""
    found = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    if not found:
        last = {k.rpartition(".")[2]: k for k in valid}
        found = [last[m] for m in difflib.get_close_matches(key.rpartition(".")[2], list(last), 1)]
    return f", did you mean {found[0]!r}?" if found else ""


def _build(schema: type, values: object, prefix: str) -> Any:
    """An instance of the dataclass `schema` from a mapping."""
    here = prefix.removesuffix(".") or "the recipe"
    if not isinstance(values, Mapping):
        raise RecipeError(f"recipe: {here} must be a mapping, got {values!r}")
    hints = get_type_hints(schema)
    for key in values:
        if key not in hints:
            near = nearest(f"{prefix}{key}", list(_keys(Recipe)))
            raise RecipeError(
                f"recipe: unknown key '{prefix}{key}'{near} ({here} has {', '.join(hints)})"
            )
    for f in dataclasses.fields(schema):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in values:
            raise RecipeError(f"recipe: {prefix}{f.name} is missing")
    return schema(**{key: _convert(hints[key], v, f"{prefix}{key}") for key, v in values.items()})


def _convert(kind: Any, value: Any, key: str) -> Any:
    """`value` as `kind`, one of the few kinds that the schema uses."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, f"{key}.")  # type: ignore[arg-type]
    if origin in (Union, UnionType):
        if value is None and NoneType in args:
            return None
        return _convert(next(a for a in args if a is not NoneType), value, key)
    if origin is Literal:
        if value not in args:
            near = nearest(str(value), [str(a) for a in args])
            raise RecipeError(f"recipe: {key} must be one of {list(args)}, got {value!r}{near}")
        return value
    if origin is tuple:
        _require(isinstance(value, list | tuple), key, "a list", value)
        if args[-1] is Ellipsis:
            args = (args[0],) * len(value)
        _require(len(value) == len(args), key, f"a list of {len(args)}", value)
        return tuple(_convert(a, v, key) for a, v in zip(args, value, strict=True))
    if origin is dict:
        _require(isinstance(value, Mapping), key, "a mapping", value)
        return {str(k): _convert(args[1], v, f"{key}.{k}") for k, v in value.items()}
    return _scalar(kind, value, key)


def _scalar(kind: type, value: Any, key: str) -> Any:
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        # YAML 1.1 reads 5e-4, without a point, as text.
        with contextlib.suppress(ValueError):
            if math.isfinite(number := float(value)):
                return number
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise RecipeError(f"recipe: {key} must be {kind.__name__}, got {value!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple | list) else value
