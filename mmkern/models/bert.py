"""BERT's weights as the start of a Q-Former, as BLIP-2's stage 1 starts from BERT-base.

What is copied: self-attention; the feed-forward networks, to the text rows' and to the query rows';
word and position embeddings and their norm; the prediction head where there is one. BERT adds its
embedding of the first segment to every token of a lone text; a Q-Former has no segments, so that
vector goes into the position embeddings. The Q-Former's text pass then is BERT. Cross-attention and
query tokens stay random.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from mmkern.models.clip_checkpoints import State, raise_for_keys

__all__ = ["load_bert", "qformer_from_bert"]

_LAYER = re.compile(
    r"^encoder\.layer\.(\d+)\.(attention\.self|attention\.output|intermediate|output)\."
)
_TARGETS = {
    "attention.self": ("attention.attention",),
    "attention.output": ("attention.output",),
    "intermediate": ("intermediate", "intermediate_query"),
    "output": ("output", "output_query"),
}
# The head of next sentences, the pooler, a buffer, and a copy of the word embeddings.
_UNUSED = (
    "pooler.",
    "cls.seq_relationship.",
    "embeddings.position_ids",
    "cls.predictions.decoder.",
)
_SEGMENTS = "embeddings.token_type_embeddings.weight"
_POSITIONS = "embeddings.position_embeddings.weight"
# Tables with a row a word, of which a Q-Former may have more: [DEC].
_WORDS = ("word_embeddings.weight", "cls.predictions.bias")


def qformer_from_bert(state: State) -> State:
    """A state dict of transformers' ``BertModel`` or one of its heads, under BLIP-2's keys.

    ``embeddings.*`` and ``qformer.*`` as in stage 1. Raises ValueError for keys that no BERT has.
    """
    result: State = {}
    unknown = []
    for full, value in state.items():
        key = full.removeprefix("bert.")
        key = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", key))
        if match := _LAYER.match(key):
            for target in _TARGETS[match[2]]:
                result[f"qformer.encoder.layer.{match[1]}.{target}.{key[match.end() :]}"] = value
        elif key.startswith("embeddings.LayerNorm."):
            result[key.replace("embeddings.LayerNorm", "qformer.layernorm")] = value
        elif key == _POSITIONS:
            segments = state.get(full.replace("position", "token_type"))
            result[key] = value if segments is None else value + segments[0]
        elif key == "embeddings.word_embeddings.weight" or (
            key.startswith("cls.predictions.") and not key.startswith(_UNUSED)
        ):
            result[key] = value
        elif key != _SEGMENTS and not key.startswith(_UNUSED):
            unknown.append(full)
    raise_for_keys("qformer_from_bert", (), unknown)
    return result


@torch.no_grad()
def load_bert(model: Any, state: State) -> list[str]:
    """Start the Q-Former of a BLIP-2 (either stage) or InstructBLIP at a BERT's weights.

    ``state`` has BERT's keys. The model may have more words (they keep their rows), fewer positions
    and no text branch (stage 2).

    Returns:
        The names of the Q-Former's weights that BERT does not have.

    Raises:
        ValueError: unknown keys; weights of other sizes, or layers that BERT does not have.
    """
    found = qformer_from_bert(state)
    kept, missing, misshapen = [], [], []
    for name, own in model.state_dict().items():
        if not name.startswith(("qformer.", "embeddings.", "cls.", "query_tokens")):
            continue
        source = found.get(shared_name(name))
        if source is None:
            kept.append(name)
            fresh = "crossattention" in name or not name.startswith("qformer.")
            missing += [] if fresh else [name]
            continue
        if name.endswith("position_embeddings.weight"):
            source = source[: len(own)]
        if name.endswith(_WORDS) and len(source) < len(own):
            source = torch.cat([source, own[len(source) :].to(source)])
        if source.shape != own.shape:
            misshapen.append(f"{name} {list(source.shape)} instead of {list(own.shape)}")
        else:
            own.copy_(source)
    raise_for_keys("load_bert", missing, (), misshapen)
    return kept


def shared_name(name: str) -> str:
    """One name for what is ``qformer.embeddings.*`` in InstructBLIP, outside in BLIP-2."""
    if name.startswith("qformer.embeddings.layernorm."):
        return name.replace("embeddings.", "", 1)
    return name.removeprefix("qformer.") if name.startswith("qformer.embeddings.") else name
