"""Checkpoint layouts of BLIP-2 and InstructBLIP, and the maps between them.

Ours are transformers' keys (``Blip2ForImageTextRetrieval``, ``Blip2ForConditionalGeneration``,
``InstructBlipForConditionalGeneration``). The other layout is LAVIS's ``.pth``:

==========================================  =====================================================
LAVIS                                       transformers
==========================================  =====================================================
visual_encoder.cls_token, pos_embed         vision_model.embeddings.class_embedding,
                                            .position_embedding
visual_encoder.patch_embed.proj             vision_model.embeddings.patch_embedding
visual_encoder.blocks.i.norm1, norm2        vision_model.encoder.layers.i.layer_norm1, layer_norm2
….attn.qkv.weight, q_bias, v_bias           ….self_attn.qkv.weight, qkv.bias = (q_bias, 0, v_bias)
….attn.proj, mlp.fcN                        ….self_attn.projection, mlp.fcN
ln_vision                                   vision_model.post_layernorm
Qformer.bert.embeddings.LayerNorm           qformer.layernorm (InstructBLIP
                                            qformer.embeddings.layernorm)
Qformer.bert.embeddings.X_embeddings        embeddings.X_embeddings (InstructBLIP
                                            qformer.embeddings.X_embeddings)
Qformer.bert.encoder.layer.i.A.self         qformer.encoder.layer.i.A.attention
Qformer.bert.encoder.layer.i, other keys    qformer.encoder.layer.i, the same
Qformer.cls.predictions                     none; here cls.predictions
temp                                        none; here temp
vision_proj, text_proj                      vision_projection, text_projection
itm_head, query_tokens                      the same
opt_proj, t5_proj, llm_proj                 language_projection
opt_model, t5_model, llm_model              language_model
internlm_proj, internlm_model               the same two (InternLM-XComposer)
flag_image_start, flag_image_end            the same (InternLM-XComposer)
==========================================  =====================================================

CLIP's ViT-L (``visual_encoder.conv1`` ...) keeps OpenAI's keys under ``vision_model.``. Every
weight has one name in each layout; a key that no rule knows raises.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from mmkern.models.clip_checkpoints import State, check, raise_for_keys, read

__all__ = ["check", "from_lavis", "raise_for_keys", "read", "to_lavis"]

Rules = tuple[tuple[str, str], ...]

# (LAVIS, transformers); "#" stands for a number, a trailing "." for all keys below. First match.
_RULES = (
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
    ("visual_encoder.blocks.#.norm1.", "vision_model.encoder.layers.#.layer_norm1."),
    ("visual_encoder.blocks.#.norm2.", "vision_model.encoder.layers.#.layer_norm2."),
    ("visual_encoder.blocks.#.attn.qkv.", "vision_model.encoder.layers.#.self_attn.qkv."),
    ("visual_encoder.blocks.#.attn.proj.", "vision_model.encoder.layers.#.self_attn.projection."),
    ("visual_encoder.blocks.#.mlp.", "vision_model.encoder.layers.#.mlp."),
    ("visual_encoder.conv1.", "vision_model.conv1."),
    ("visual_encoder.class_embedding", "vision_model.class_embedding"),
    ("visual_encoder.positional_embedding", "vision_model.positional_embedding"),
    ("visual_encoder.ln_pre.", "vision_model.ln_pre."),
    ("visual_encoder.transformer.resblocks.#.", "vision_model.transformer.resblocks.#."),
    ("ln_vision.", "vision_model.post_layernorm."),
    (
        "Qformer.bert.encoder.layer.#.attention.self.",
        "qformer.encoder.layer.#.attention.attention.",
    ),
    (
        "Qformer.bert.encoder.layer.#.crossattention.self.",
        "qformer.encoder.layer.#.crossattention.attention.",
    ),
    ("Qformer.bert.encoder.layer.#.", "qformer.encoder.layer.#."),
    ("Qformer.cls.", "cls."),
    ("vision_proj.", "vision_projection."),
    ("text_proj.", "text_projection."),
    ("itm_head.", "itm_head."),
    ("query_tokens", "query_tokens"),
    ("temp", "temp"),
    ("flag_image_start", "flag_image_start"),
    ("flag_image_end", "flag_image_end"),
)
_EMBEDDINGS = "Qformer.bert.embeddings."
_SHARED = (
    (f"{_EMBEDDINGS}LayerNorm.", "qformer.layernorm."),
    (f"{_EMBEDDINGS}word_embeddings.", "embeddings.word_embeddings."),
    (f"{_EMBEDDINGS}position_embeddings.", "embeddings.position_embeddings."),
)
_OWN = (
    (f"{_EMBEDDINGS}LayerNorm.", "qformer.embeddings.layernorm."),
    (f"{_EMBEDDINGS}word_embeddings.", "qformer.embeddings.word_embeddings."),
    (f"{_EMBEDDINGS}position_embeddings.", "qformer.embeddings.position_embeddings."),
)
_LANGUAGE = ("opt", "t5", "llm", "internlm")
# Copies of other weights, and a buffer.
_TIED = "Qformer.cls.predictions.decoder."
_BUFFER = f"{_EMBEDDINGS}position_ids"
_QKV = re.compile(r"^(visual_encoder\.blocks\.\d+\.attn\.)([qv])_bias$")


def _rename(key: str, rules: Rules) -> str | None:
    for source, target in rules:
        pattern = re.escape(source).replace(r"\#", r"(\d+)")
        match = re.match(pattern if source.endswith(".") else pattern + "$", key)
        if match:
            number = match.group(1) if match.groups() else ""
            return target.replace("#", number) + key[match.end() :]
    return None


def _language_rules(language: str) -> Rules:
    return (
        (f"{language}_proj.", "language_projection."),
        (f"{language}_model.", "language_model."),
    )


def from_lavis(
    state: State | str | Path, *, instruct: bool = False, vision: State | str | Path | None = None
) -> State:
    """A LAVIS state dict or ``.pth`` file under transformers' keys.

    Args:
        state: LAVIS's keys; a training checkpoint's ``model`` entry is taken.
        instruct: InstructBLIP, whose Q-Former holds its own embeddings.
        vision: the image encoder's own weights, without ``visual_encoder.``, as LAVIS's checkpoints
            leave frozen weights out.

    Raises:
        ValueError: keys that no rule knows, a ``q_bias`` without its ``v_bias``, or an output
            matrix of the generation head that is not the table of word embeddings.
    """
    where = "BLIP-2 checkpoint (LAVIS)"
    state = _read(state)
    if vision is not None:
        frozen = _read(vision)
        state = {**state, **{f"visual_encoder.{key}": value for key, value in frozen.items()}}
    rules: Rules = (*_RULES, *(_OWN if instruct else _SHARED))
    for language in _LANGUAGE:
        rules += _language_rules(language)
    result: State = {}
    unknown = []
    for key, value in state.items():
        if key == _BUFFER or key.startswith(_TIED) or _QKV.match(key):
            continue
        name = _rename(key, rules)
        if name is None:
            unknown.append(key)
        else:
            result[name] = value
    _check_tied(where, state)
    missing = []
    for key in state:
        if not (match := _QKV.match(key)):
            continue
        parts = {part: f"{match[1]}{part}_bias" for part in "qv"}
        missing += [name for name in parts.values() if name not in state]
        if not missing and match[2] == "q":
            query, value = state[parts["q"]], state[parts["v"]]
            name = _rename(f"{match[1]}qkv.bias", rules)
            assert name is not None
            result[name] = torch.cat([query, torch.zeros_like(query), value])
    raise_for_keys(where, missing, unknown)
    return result


def _read(source: State | str | Path) -> State:
    state = source if isinstance(source, dict) else read(source)
    inner = state.get("model")
    return inner if isinstance(inner, dict) else state


def _check_tied(where: str, state: State) -> None:
    for name, source in (
        ("weight", f"{_EMBEDDINGS}word_embeddings.weight"),
        ("bias", "Qformer.cls.predictions.bias"),
    ):
        copy, original = state.get(_TIED + name), state.get(source)
        if copy is not None and original is not None and not torch.equal(copy, original):
            raise ValueError(f"{where}: {_TIED}{name} differs from {source}, to which it is tied")


def to_lavis(state: State, *, instruct: bool = False, language: str = "llm") -> State:
    """Copies of the weights under LAVIS's keys, tied ones included.

    Args:
        state: transformers' keys.
        instruct: InstructBLIP's keys.
        language: what the language model is called there, "opt", "t5", "llm" or "internlm".

    Raises ValueError for another language and for keys that no rule knows. A bias of the image
    encoder's keys, which LAVIS has no place for, is dropped: a softmax does not see it.
    """
    where = "BLIP-2 checkpoint (to LAVIS)"
    if language not in _LANGUAGE:
        raise ValueError(f"{where}: language must be one of {_LANGUAGE}, got {language!r}")
    rules = tuple(
        (ours, theirs)
        for theirs, ours in (*(_OWN if instruct else _SHARED), *_RULES, *_language_rules(language))
    )
    result: State = {}
    unknown = []
    for key, value in state.items():
        name = _rename(key, rules)
        if name is None:
            unknown.append(key)
        elif name.startswith("visual_encoder.blocks.") and name.endswith(".attn.qkv.bias"):
            query, _, value = value.detach().chunk(3)
            stem = name.removesuffix("qkv.bias")
            result[f"{stem}q_bias"], result[f"{stem}v_bias"] = query.clone(), value.clone()
        else:
            result[name] = value.detach().clone()
    raise_for_keys(where, (), unknown)
    if "Qformer.cls.predictions.bias" in result:
        words = result[f"{_EMBEDDINGS}word_embeddings.weight"]
        result[f"{_TIED}weight"] = words.clone()
        result[f"{_TIED}bias"] = result["Qformer.cls.predictions.bias"].clone()
    return result
