"""What the parts of a model start from: ``model.start`` of a recipe.

===================  ==========================================  ================================
part                 source                                      what is taken
===================  ==========================================  ================================
``vision``           a run of CLIP, or a CLIP's file             the blocks that the encoder has
``qformer``          a run of BLIP-2's first or second stage     Q-Former, queries, last norm of
                     or of InstructBLIP                          the image encoder
\\                    ``minilm``, or a BERT's folder              Q-Former and embeddings
``language_model``   ``smollm2``, or a folder                    the language model
``projection``       a run of the second stage or InstructBLIP   the projection, and of the
                                                                 Q-Former what it was trained with
``projector``        a file: LLaVA's ``mm_projector.bin``        its projector
``earlier``          a run of the same system                    all; LoRA that the run does not
                                                                 have stays fresh
===================  ==========================================  ================================

A run is its directory, or the name of a recipe that comes with mmkern: its ``output_dir``, trained
first if it is not there. Every tensor of a part must be found, in its shape. Parts are taken in
this order, so a projection's Q-Former counts more than ``qformer``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmkern.data.emoji import cache_directory
from mmkern.models.bert import load_bert, shared_name
from mmkern.train.recipe import Recipe, RecipeError, load_recipe, recipe_names

LoadRun = Callable[[Path], tuple[Recipe, nn.Module]]

PACKAGED = {"qformer": "minilm", "language_model": "smollm2"}
# The last norm of the image encoder is trained with the Q-Former.
_QFORMER = ("qformer.", "query_tokens", "embeddings.", "vision_model.post_layernorm.")
_WEIGHTS = "model.safetensors"


def required_runs(recipe: Recipe) -> list[str]:
    """Recipes whose runs this one starts from."""
    return [source for source in recipe.model.start.values() if source in recipe_names()]


def start(recipe: Recipe, model: Any, load_run: LoadRun) -> None:
    """Give each part of a fresh model its weights.

    Raises:
        RecipeError: a source that is not there or does not fit; see the table.
        CheckpointError: a run without a complete checkpoint.
    """
    for part, source in sorted(recipe.model.start.items(), key=lambda item: ORDER.index(item[0])):
        try:
            _PARTS[part](model, source, load_run)
        except (RecipeError, ImportError):
            raise
        except (ValueError, KeyError, RuntimeError, OSError) as error:
            raise RecipeError(f"recipe: model.start.{part}={source}: {error}") from error


def _run(source: str) -> Path:
    return Path(load_recipe(source).output_dir if source in recipe_names() else source)


def _copy(model: nn.Module, values: Mapping[str, Tensor], wanted: Callable[[str], bool]) -> None:
    """Copy into the tensors that are wanted; each must be there, in its shape."""
    values = {shared_name(name): value for name, value in values.items()}
    own = {shared_name(n): value for n, value in model.state_dict().items() if wanted(n)}
    missing = [name for name in own if name not in values]
    shapes = [
        f"{name} {list(values[name].shape)} for {list(value.shape)}"
        for name, value in own.items()
        if name in values and values[name].shape != value.shape
    ]
    if missing or shapes or not own:
        raise ValueError(f"it lacks {missing[:3] or 'nothing'}; other shapes: {shapes[:3]}")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(values[name])


def _vision(model: Any, source: str, load_run: LoadRun) -> None:
    from mmkern.models.clip import CLIP

    file = Path(source)
    clip: nn.Module
    if file.is_file():
        clip = CLIP.from_state_dict(file, quick_gelu=model.config.vision_config.quick_gelu)
    else:
        clip = load_run(_run(source))[1]
    if not isinstance(clip, CLIP):
        raise ValueError(f"it holds {type(clip).__name__}, not a CLIP")
    model.vision_model.load_clip(clip)


def _qformer(model: Any, source: str, load_run: LoadRun) -> None:
    folder = Path(source)
    if source == PACKAGED["qformer"] or (folder / _WEIGHTS).is_file():
        from mmkern.models.packaged import minilm_state

        load_bert(model, minilm_state() if source == "minilm" else load_file(folder / _WEIGHTS))
        return
    values = load_run(_run(source))[1].state_dict()
    _copy(model, values, lambda name: name.startswith(_QFORMER))


def _language_model(model: Any, source: str, load_run: LoadRun) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from mmkern.models.internlm2 import InternLM2ForCausalLM

    if source == PACKAGED["language_model"]:
        from mmkern.models.packaged import smollm2

        found = smollm2(cache_directory())
    else:
        if not Path(source).is_dir():
            raise ValueError("no such folder")
        seq2seq = model.language_model.config.is_encoder_decoder
        kind = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
        found = kind.from_pretrained(source, dtype="auto")
    own = model.language_model.get_input_embeddings().weight.shape
    if found.get_input_embeddings().weight.shape[0] < own[0]:
        found.resize_token_embeddings(own[0])  # published vocabularies are padded
    if isinstance(model, InternLM2ForCausalLM):
        model.load_llama(found)
    else:
        _copy(model.language_model, found.state_dict(), lambda name: ".lora_" not in name)
    if hasattr(model, "special_embeddings"):
        model.reset_parameters()  # rows of the table that was just read


def _projection(model: Any, source: str, load_run: LoadRun) -> None:
    # With the queries that it was trained to read; the second stage has no text to give.
    values = load_run(_run(source))[1].state_dict()
    known = {shared_name(name) for name in values}
    _copy(
        model,
        values,
        lambda name: (
            name.startswith("language_projection.")
            or (name.startswith(_QFORMER) and shared_name(name) in known)
        ),
    )


def _projector(model: Any, source: str, load_run: LoadRun) -> None:
    model.load_projector(source)


def _earlier(model: Any, source: str, load_run: LoadRun) -> None:
    values = load_run(_run(source))[1].state_dict()
    _copy(model, values, lambda name: name in values or ".lora_" not in name)


_PARTS: dict[str, Callable[[Any, str, LoadRun], None]] = {
    "vision": _vision,
    "qformer": _qformer,
    "language_model": _language_model,
    "projection": _projection,
    "projector": _projector,
    "earlier": _earlier,
}
ORDER = tuple(_PARTS)
