"""Checkpoint layouts of CLIP, and the maps between them.

Ours are OpenAI's keys. Known layouts:

- ``openai``: OpenAI's dictionaries; a JIT archive's holds three sizes beside the weights.
- ``open_clip``: open_clip's ``CLIP``, the same keys.
- ``open_clip_custom_text``: open_clip's ``CustomTextCLIP``, the text tower under ``text.``.
- ``transformers``: ``CLIPModel``, separate query, key and value, projections transposed.

Maps are total and strict: what a layout does not know raises with the list of keys.
"""

import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig as TransformersConfig

State = dict[str, Tensor]

#: What OpenAI's JIT archives hold beside the weights.
ARCHIVE_KEYS = frozenset({"input_resolution", "context_length", "vocab_size"})
LAYOUTS = ("openai", "open_clip", "open_clip_custom_text", "transformers")

_TEXT_PARTS = (
    "token_embedding.",
    "positional_embedding",
    "transformer.",
    "ln_final.",
    "text_projection",
)
# Buffers that transformers used to save.
_OLD_BUFFERS = frozenset(f"{tower}_model.embeddings.position_ids" for tower in ("text", "vision"))
_TRANSPOSED = frozenset({"visual.proj", "text_projection"})
SINGLE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
BLOCKS = {
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
}
LEAVES = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def read(path: str | Path) -> State:
    """The state dict in a file: safetensors, ``torch.save``, or a TorchScript archive.

    A training checkpoint's ``state_dict`` entry is taken, and the ``module.`` (DDP) and
    ``_orig_mod.`` (compile) prefixes fall off.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_file(path)
    if _is_torchscript(path):
        return dict(torch.jit.load(path, map_location="cpu").state_dict())
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    state: State = loaded.get("state_dict", loaded)
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def to_openai(state: State) -> State:
    """A state dict of any known layout under OpenAI's keys, without an archive's sizes."""
    if "text_model.final_layer_norm.weight" in state:
        return _from_transformers(state)
    if "text.text_projection" in state:
        return {key.removeprefix("text."): value for key, value in state.items()}
    if "text_projection" in state:
        return {key: value for key, value in state.items() if key not in ARCHIVE_KEYS}
    raise ValueError(
        f"CLIP checkpoint: none of the layouts {', '.join(LAYOUTS)}; its keys start "
        f"{sorted(state)[:5]}"
    )


def from_openai(state: State, layout: str) -> State:
    """Copies of the weights under the keys of ``layout``, one of :data:`LAYOUTS`."""
    if layout not in LAYOUTS:
        raise ValueError(f"CLIP checkpoint: layout must be one of {LAYOUTS}, got {layout!r}")
    if layout == "transformers":
        return _to_transformers(state)
    custom = layout == "open_clip_custom_text"
    return {
        f"text.{key}" if custom and key.startswith(_TEXT_PARTS) else key: value.detach().clone()
        for key, value in state.items()
    }


def _pairs(depths: dict[str, int]) -> dict[str, tuple[str, ...]]:
    """Our key to transformers' key or, for the fused projection, its three keys."""
    pairs: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in SINGLE.items()}
    for ours, theirs in BLOCKS.items():
        for i in range(depths[ours]):
            for kind in ("weight", "bias"):
                pairs[f"{ours}.{i}.attn.in_proj_{kind}"] = tuple(
                    f"{theirs}.{i}.self_attn.{part}_proj.{kind}" for part in "qkv"
                )
                for leaf, name in LEAVES.items():
                    pairs[f"{ours}.{i}.{leaf}.{kind}"] = (f"{theirs}.{i}.{name}.{kind}",)
    return pairs


def _depth(state: State, prefix: str) -> int:
    """Number of blocks below ``prefix``."""
    start = f"{prefix}."
    return len({key[len(start) :].split(".")[0] for key in state if key.startswith(start)})


def _from_transformers(state: State) -> State:
    pairs = _pairs({ours: _depth(state, theirs) for ours, theirs in BLOCKS.items()})
    expected = {name for names in pairs.values() for name in names}
    raise_for_keys(
        "CLIP checkpoint (transformers)",
        expected - state.keys(),
        state.keys() - expected - _OLD_BUFFERS,
    )
    result = {}
    for ours, theirs in pairs.items():
        value = state[theirs[0]] if len(theirs) == 1 else torch.cat([state[key] for key in theirs])
        result[ours] = value.T.contiguous() if ours in _TRANSPOSED else value
    return result


def _to_transformers(state: State) -> State:
    pairs = _pairs({ours: _depth(state, ours) for ours in BLOCKS})
    if pairs.keys() != state.keys():
        raise ValueError(
            "CLIP checkpoint: transformers' CLIPModel has no place for "
            f"{sorted(state.keys() - pairs.keys())[:5]} (it knows the ViT only)"
        )
    result = {}
    for ours, theirs in pairs.items():
        value = state[ours].detach()
        value = value.T if ours in _TRANSPOSED else value
        parts = (value,) if len(theirs) == 1 else value.chunk(len(theirs))
        for key, part in zip(theirs, parts, strict=True):
            result[key] = part.clone(memory_format=torch.contiguous_format)
    return result


def infer_sizes(state: State) -> dict[str, Any]:
    """The fields of ``CLIPConfig`` that the shapes under OpenAI's keys tell."""
    try:
        return {**_text_sizes(state), **_vision_sizes(state)}
    except KeyError as error:
        raise ValueError(f"CLIP checkpoint: missing key {error}") from None


def _text_sizes(state: State) -> dict[str, Any]:
    context_length, width = state["positional_embedding"].shape
    return {
        "embed_dim": state["text_projection"].shape[1],
        "context_length": context_length,
        "vocab_size": state["token_embedding.weight"].shape[0],
        "text_width": width,
        "text_layers": _depth(state, "transformer.resblocks"),
    }


def _vision_sizes(state: State) -> dict[str, Any]:
    if "visual.attnpool.positional_embedding" in state:
        return {
            "image_size": 32 * _grid(state["visual.attnpool.positional_embedding"]),
            "vision_layers": tuple(_depth(state, f"visual.layer{i}") for i in (1, 2, 3, 4)),
            "vision_width": state["visual.layer1.0.conv1.weight"].shape[0],
            "vision_patch_size": None,
        }
    width, _, patch, _ = state["visual.conv1.weight"].shape
    hidden = state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    return {
        "image_size": patch * _grid(state["visual.positional_embedding"]),
        "vision_layers": _depth(state, "visual.transformer.resblocks"),
        "vision_width": width,
        "vision_patch_size": patch,
        "vision_mlp_ratio": hidden / width,
    }


def _grid(positions: Tensor) -> int:
    return round((positions.shape[0] - 1) ** 0.5)


def sizes_from_transformers(config: Any) -> dict[str, Any]:
    """The fields of our ``CLIPConfig`` for a transformers ``CLIPConfig``."""
    text, vision = config.text_config, config.vision_config
    unsupported = {
        "hidden_act": text.hidden_act != vision.hidden_act
        or text.hidden_act not in ("gelu", "quick_gelu"),
        "layer_norm_eps": (text.layer_norm_eps, vision.layer_norm_eps) != (1e-5, 1e-5),
        "attention_dropout": bool(text.attention_dropout or vision.attention_dropout),
        "num_channels": vision.num_channels != 3,
        "text_config.intermediate_size": text.intermediate_size != 4 * text.hidden_size,
    }
    if any(unsupported.values()):
        raise ValueError(
            "CLIP.from_transformers: not supported: "
            + ", ".join(name for name, found in unsupported.items() if found)
        )
    return {
        "embed_dim": config.projection_dim,
        "image_size": vision.image_size,
        "vision_layers": vision.num_hidden_layers,
        "vision_width": vision.hidden_size,
        "vision_patch_size": vision.patch_size,
        "vision_heads": vision.num_attention_heads,
        "vision_mlp_ratio": vision.intermediate_size / vision.hidden_size,
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "text_width": text.hidden_size,
        "text_heads": text.num_attention_heads,
        "text_layers": text.num_hidden_layers,
        "quick_gelu": text.hidden_act == "quick_gelu",
        "init_logit_scale": config.logit_scale_init_value,
        # transformers pools at the largest id when this is 2, else at its first occurrence.
        "eot_token_id": None if text.eos_token_id == 2 else text.eos_token_id,
    }


def transformers_config(config: Any) -> TransformersConfig:
    """The transformers configuration for our ``CLIPConfig``."""
    if config.vision_patch_size is None or config.vision_pool != "tok":
        raise ValueError(
            "CLIP.to_transformers: CLIPModel is a ViT that pools its class token; this model has "
            + (
                "a ResNet"
                if config.vision_patch_size is None
                else f"{config.vision_pool!r} pooling"
            )
        )
    common = {
        "hidden_act": "quick_gelu" if config.quick_gelu else "gelu",
        "projection_dim": config.embed_dim,
        "layer_norm_eps": 1e-5,
    }
    return TransformersConfig(
        projection_dim=config.embed_dim,
        logit_scale_init_value=config.init_logit_scale,
        text_config={
            **common,
            "vocab_size": config.vocab_size,
            "hidden_size": config.text_width,
            "intermediate_size": 4 * config.text_width,
            "num_hidden_layers": config.text_layers,
            "num_attention_heads": config.text_heads,
            "max_position_embeddings": config.context_length,
            "eos_token_id": 2 if config.eot_token_id is None else config.eot_token_id,
        },
        vision_config={
            **common,
            "hidden_size": config.vision_width,
            "intermediate_size": round(config.vision_width * config.vision_mlp_ratio),
            "num_hidden_layers": config.vision_layers,
            "num_attention_heads": config.vision_heads,
            "image_size": config.image_size,
            "patch_size": config.vision_patch_size,
        },
    )


def check(where: str, state: State, expected: State) -> None:
    """Raise ValueError unless ``state`` has exactly the keys and shapes of ``expected``."""
    misshapen = [
        f"{key} {list(state[key].shape)} instead of {list(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    raise_for_keys(where, missing, unexpected, misshapen)


def raise_for_keys(
    where: str,
    missing: Collection[str],
    unexpected: Collection[str],
    misshapen: Collection[str] = (),
) -> None:
    """Raise ValueError that lists the keys, when there are any."""
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    found = [f"{kind}: {', '.join(sorted(keys))}" for kind, keys in kinds.items() if keys]
    if found:
        raise ValueError(f"{where}: the checkpoint does not fit; " + "; ".join(found))


def vision_pairs(blocks: int) -> dict[str, tuple[str, ...]]:
    """What :func:`_pairs` says of the vision transformer alone, with so many blocks.

    Without the prefixes ``visual.`` and ``vision_model.``; without the last norm and the
    projection, which serve the pooled token.
    """
    pairs = _pairs({"visual.transformer.resblocks": blocks, "transformer.resblocks": 0})
    return {
        ours.removeprefix("visual."): tuple(n.removeprefix("vision_model.") for n in theirs)
        for ours, theirs in pairs.items()
        if ours.startswith("visual.") and ours != "visual.proj" and "ln_post" not in ours
    }
