"""OpenFlamingo's checkpoint layout, and the map to ours.

=================================================  ==============================================
OpenFlamingo                                       here
=================================================  ==============================================
perceiver.*                                        the same
lang_encoder.P.i.gated_cross_attn_layer.*          gated_cross_attn_layers.j.*, i = (j + 1)·n − 1
lang_encoder.gated_cross_attn_layers.i.*           an alias of it; skipped
lang_encoder.old_decoder_blocks.i.*                an alias of the next; skipped
lang_encoder.P.i.decoder_layer.*                   language_model.P.i.*
lang_encoder.*                                     language_model.*
vision_encoder.*                                   vision_model.*
=================================================  ==============================================

P is the path of the language model's layers (``transformer.blocks`` of MPT, ``model.layers`` of
LLaMA), n every which layer has a block. Its files hold resampler, blocks and the table of
embeddings alone; the rest is frozen and left out.
"""

from __future__ import annotations

import re

from mmkern.models.clip_checkpoints import State, raise_for_keys

__all__ = ["from_openflamingo", "to_openflamingo"]

_ALIASES = ("lang_encoder.gated_cross_attn_layers.", "lang_encoder.old_decoder_blocks.")
# Of open_clip's tower what patches do not pass through.
_UNUSED = ("vision_encoder.proj", "vision_encoder.ln_post.")


def from_openflamingo(state: State, path: str, every: int) -> State:
    """A state dict of OpenFlamingo under our keys.

    Args:
        state: its keys; ``model_state_dict`` of a training checkpoint, and DDP's ``module.``, are
            seen through.
        path: of the decoder layers in the language model.
        every: n.

    Raises:
        ValueError: keys that no rule knows, or a block before a layer that has none here.
    """
    inner = state.get("model_state_dict")
    state = inner if isinstance(inner, dict) else state
    layer = re.compile(rf"^lang_encoder\.{re.escape(path)}\.(\d+)\.(\w+)\.(.+)$")
    result: State = {}
    unknown = []
    for full, value in state.items():
        key = full.removeprefix("module.")
        if key.startswith(_ALIASES) or (key.startswith(_UNUSED)):
            continue
        match = layer.match(key)
        if key.startswith("perceiver."):
            result[key] = value
        elif match and match[2] == "gated_cross_attn_layer":
            number = int(match[1]) + 1
            if number % every:
                unknown.append(full)
            result[f"gated_cross_attn_layers.{number // every - 1}.{match[3]}"] = value
        elif match and match[2] == "decoder_layer":
            result[f"language_model.{path}.{match[1]}.{match[3]}"] = value
        elif key.startswith("lang_encoder."):
            result[f"language_model.{key.removeprefix('lang_encoder.')}"] = value
        elif key.startswith("vision_encoder."):
            result[f"vision_model.{key.removeprefix('vision_encoder.')}"] = value
        else:
            unknown.append(full)
    raise_for_keys("Flamingo checkpoint (OpenFlamingo)", (), unknown)
    return result


def to_openflamingo(state: State, path: str, every: int) -> State:
    """Copies of resampler, blocks and embeddings under OpenFlamingo's keys; arguments as above."""
    block = re.compile(r"^gated_cross_attn_layers\.(\d+)\.(.+)$")
    result: State = {}
    for key, value in state.items():
        if match := block.match(key):
            number = (int(match[1]) + 1) * every - 1
            name = f"lang_encoder.{path}.{number}.gated_cross_attn_layer.{match[2]}"
        elif key.startswith("language_model."):
            name = f"lang_encoder.{key.removeprefix('language_model.')}"
        else:
            name = key
        result[name] = value.detach().clone()
    return result
