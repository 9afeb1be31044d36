"""InternLM2's weights under the keys of transformers' LLaMA, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mmkern.models.clip_checkpoints import State

__all__ = ["from_llama", "to_llama"]

# Key maps. LLaMA's names of a layer's parts; q, k and v are split from wqkv.
_PARTS = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OUTSIDE = {
    "model.tok_embeddings.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PACKED, _SPLIT = "attention.wqkv", tuple(f"self_attn.{part}_proj" for part in "qkv")
# Its rows are inputs, of which q, k and v have the same: it is not split.
_SHARED = "Plora_A.weight"


def _layer_key(key: str, parts: Mapping[str, str]) -> tuple[str, str, str]:
    """model.layers.3.attention.wo.Plora_A.weight to (model.layers.3., part, .Plora_A.weight)."""
    pieces = key.split(".", 3)
    if len(pieces) == 4 and key.startswith("model.layers."):
        for part in parts:
            if pieces[3].startswith(f"{part}."):
                return ".".join(pieces[:3]) + ".", part, pieces[3].removeprefix(part)
    raise ValueError(f"InternLM2: no place in a LLaMA for the key {key}")


def to_llama(state: State, config: Any) -> State:
    """The weights under transformers' LLaMA keys; copies.

    ``wqkv`` is split by group, and so are the rows of its ``Plora_B``, which are outputs. Its
    ``Plora_A`` has no rows to split: q, k and v get one each, equal. (The converter that came with
    InternLM2 splits every key with ``wqkv`` in it.) LLaMA has no adapters of its own; the keys
    ``...q_proj.Plora_A.weight`` are for models whose layers are
    :class:`~mmkern.nn.plora.PLoRALinear`.

    Raises:
        ValueError: a key that InternLM2 does not have.
    """
    kv_heads = config.num_key_value_heads
    groups = config.num_attention_heads // kv_heads
    found = {}
    for key, value in state.items():
        if key in _OUTSIDE:
            found[_OUTSIDE[key]] = value.clone()
            continue
        layer, part, leaf = _layer_key(key, {**_PARTS, _PACKED: ""})
        if part != _PACKED:
            found[f"{layer}{_PARTS[part]}{leaf}"] = value.clone()
        elif leaf == f".{_SHARED}":
            found.update({f"{layer}{name}{leaf}": value.clone() for name in _SPLIT})
        else:
            rows = value.unflatten(0, (kv_heads, groups + 2, -1))
            for name, piece in zip(_SPLIT, rows.split([groups, 1, 1], 1), strict=True):
                found[f"{layer}{name}{leaf}"] = piece.flatten(0, 2).clone()
    return found


def from_llama(state: State, config: Any) -> State:
    """The opposite of :func:`to_llama`; a tied head may be absent.

    Raises:
        ValueError: a key that InternLM2 does not have, or q, k and v of which one is missing or
            has another ``Plora_A``.
    """
    kv_heads = config.num_key_value_heads
    names = {theirs: ours for ours, theirs in _PARTS.items()}
    outside = {theirs: ours for ours, theirs in _OUTSIDE.items()}
    found: State = {}
    packed: dict[tuple[str, str], State] = {}
    for key, value in state.items():
        if key.endswith("rotary_emb.inv_freq"):
            continue
        if key in outside:
            found[outside[key]] = value.clone()
            continue
        layer, part, leaf = _layer_key(key, {**names, **dict.fromkeys(_SPLIT, "")})
        if part in names:
            found[f"{layer}{names[part]}{leaf}"] = value.clone()
        else:
            packed.setdefault((layer, leaf), {})[part] = value
    for (layer, leaf), parts in packed.items():
        key = f"{layer}{_PACKED}{leaf}"
        if missing := [name for name in _SPLIT if name not in parts]:
            raise ValueError(f"InternLM2: {key} needs {layer}{missing[0]}{leaf}, which is missing")
        pieces = [parts[name] for name in _SPLIT]
        if leaf == f".{_SHARED}":
            if not all(torch.equal(piece, pieces[0]) for piece in pieces):
                raise ValueError(f"InternLM2: {key} is shared, but q, k and v have different ones")
            found[key] = pieces[0].clone()
        else:
            rows = [piece.unflatten(0, (kv_heads, -1)) for piece in pieces]
            found[key] = torch.cat(rows, 1).flatten(0, 1)
    return found
