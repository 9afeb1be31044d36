"""The systems that recipes train: which model, which batches, which loss.

A recipe names a builder (``clip_vit_b_32``) or a model class (``Blip2ForConditionalGeneration``).
The class decides everything else, by the table below: a new system is one entry.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from torch import nn

import mmkern.models
from mmkern.compose.emoji import PICTURE_CHOICE
from mmkern.data import GRID_KINDS
from mmkern.train.recipe import Recipe, RecipeError, nearest

Batches = Literal[
    "contrastive", "pretraining", "language", "interleaved", "conversation", "documents"
]


@dataclass(frozen=True)
class System:
    """How a model class is trained.

    Attributes:
        name: of the system and stage.
        module: of ``mmkern.models`` that has the class.
        batches: what the collator makes.
        operator: the operator whose backend a run's metrics name.
        parts: what ``model.start`` may name.
        kinds: of questions about emoji, beside those of ``mmkern.data.KINDS``.
        spans: interleaved batches say which rows are images' (``VisualSpans``).
        objective: the stage computes the loss from features, so ``train.loss`` and the gradient
            cache apply.
    """

    name: str
    module: str
    batches: Batches
    operator: str
    parts: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    spans: bool = False
    objective: bool = False


SYSTEMS: dict[str, System] = {
    "CLIP": System("clip", "clip", "contrastive", "info_nce_fwd", objective=True),
    "Blip2ForPretraining": System(
        "blip2-stage1", "blip2", "pretraining", "query_info_nce_fwd", ("vision", "qformer")
    ),
    "Blip2ForConditionalGeneration": System(
        "blip2-stage2",
        "blip2_generation",
        "language",
        "linear_cross_entropy_fwd",
        ("vision", "qformer", "language_model", "projection"),
    ),
    "InstructBlipForConditionalGeneration": System(
        "instructblip",
        "instructblip",
        "language",
        "linear_cross_entropy_fwd",
        ("vision", "qformer", "language_model", "projection"),
    ),
    "XComposer2ForConditionalGeneration": System(
        "xcomposer2",
        "xcomposer2",
        "interleaved",
        "plora_linear_fwd",
        ("vision", "language_model"),
        kinds=("caption", *GRID_KINDS),
        spans=True,
    ),
    "XComposer": System(
        "xcomposer",
        "xcomposer",
        "interleaved",
        "linear_cross_entropy_fwd",
        ("vision", "qformer", "language_model", "earlier"),
        kinds=(PICTURE_CHOICE,),
    ),
    "LlavaForConditionalGeneration": System(
        "llava",
        "llava",
        "conversation",
        "linear_cross_entropy_fwd",
        ("vision", "language_model", "projector", "earlier"),
    ),
    "Flamingo": System(
        "flamingo",
        "flamingo",
        "documents",
        "linear_cross_entropy_fwd",
        ("vision", "language_model"),
    ),
}


def system(recipe: Recipe) -> System:
    """The recipe's system.

    Raises:
        RecipeError: no such builder or class.
    """
    return SYSTEMS[model_class(recipe.model.builder).__name__]


def model_class(name: str) -> Any:
    """The model class that a builder makes, or the class of that name.

    Raises:
        RecipeError: there is neither.
    """
    if name in SYSTEMS:
        return getattr(importlib.import_module(f"mmkern.models.{SYSTEMS[name].module}"), name)
    return get_type_hints(_builder(name))["return"]


def make_model(name: str, overrides: Mapping[str, Any]) -> nn.Module:
    """A model with random weights."""
    model: nn.Module
    if name in SYSTEMS:
        kind = model_class(name)
        model = kind(kind.config_class(**overrides))
    else:
        model = _builder(name)(**overrides)
    return model


def _builder(name: str) -> Callable[..., Any]:
    """The function of that name in ``mmkern.models``, in a module of its system."""
    prefix = name.partition("_")[0]
    modules = (info.name for info in pkgutil.iter_modules(mmkern.models.__path__))
    found: dict[str, Any] = {}
    for module in modules:
        if module == prefix or module.startswith(f"{prefix}_"):
            members = vars(importlib.import_module(f"mmkern.models.{module}"))
            found.update({n: f for n, f in members.items() if n.startswith(f"{prefix}_")})
    if name not in found:
        names = sorted(found)
        hint = nearest(name, names) if names else "; names begin with the system, clip_vit_b_32"
        raise RecipeError(f"recipe: no model builder {name!r}{hint}")
    function: Callable[..., Any] = found[name]
    return function
