"""Checkpoint layouts of LLaVA, and the maps between them.

================  ==================================  ==================================
ours              ``transformers_files``              ``transformers``
================  ==================================  ==================================
vision_model      vision_tower                        model.vision_tower
linear_1, _2      multi_modal_projector.linear_1, _2  model.multi_modal_projector.linear_1, _2
language_model    language_model                      model.language_model, lm_head
================  ==================================  ==================================

``transformers`` is the state dict of its live ``LlavaForConditionalGeneration``,
``transformers_files`` what it writes and the hub has (older ones with a level ``vision_model``
below ``vision_tower``). ``original`` is that of the authors' repository:
``model.vision_tower.vision_tower.vision_model``, ``model.mm_projector.{0,2}`` (without a number for
the linear projector), ``model.layers`` and so on, ``lm_head``. Our image encoder has OpenAI's keys
and fused q, k and v.

Blocks behind the features' layer and the norm behind all blocks are left out: nothing reads them.
Going back, there are no such blocks, and the norm is one that changes nothing.
"""

from __future__ import annotations

from pathlib import Path

import torch

from mmkern.models.clip_checkpoints import State, raise_for_keys, read, to_openai, vision_pairs

__all__ = ["LAYOUTS", "from_layout", "layout_of", "projector_state", "read_folder", "to_layout"]

# Prefixes of image encoder, projector, language model without its head, head.
_PREFIXES = {
    "transformers": (
        "model.vision_tower.",
        "model.multi_modal_projector.",
        "model.language_model.",
        "lm_head.",
    ),
    "transformers_files": (
        "vision_tower.",
        "multi_modal_projector.",
        "language_model.model.",
        "language_model.lm_head.",
    ),
    "original": (
        "model.vision_tower.vision_tower.vision_model.",
        "model.mm_projector.",
        "model.",
        "lm_head.",
    ),
}
_OURS = (
    "vision_model.",
    "multi_modal_projector.",
    "language_model.model.",
    "language_model.lm_head.",
)
LAYOUTS = tuple(_PREFIXES)
_NORM = ("post_layernorm.weight", "post_layernorm.bias")
# Buffers that transformers used to save.
_BUFFERS = ("embeddings.position_ids", "rotary_emb.inv_freq")
_WHERE = "LLaVA checkpoint"


def layout_of(state: State) -> str:
    """Which of :data:`LAYOUTS` a state dict has, by its projector.

    Raises:
        ValueError: none of them.
    """
    for layout, prefixes in _PREFIXES.items():
        if any(key.startswith(prefixes[1]) for key in state):
            return layout
    raise ValueError(
        f"{_WHERE}: none of the layouts {', '.join(LAYOUTS)} (no projector); its keys start "
        f"{sorted(state)[:5]}"
    )


def from_layout(state: State, blocks: int, *, vision: State | None = None) -> State:
    """A state dict of any layout under our keys.

    Args:
        state: of one of :data:`LAYOUTS`.
        blocks: of our image encoder; those behind them are left out.
        vision: a CLIP's own weights, in any layout of :mod:`mmkern.models.clip_checkpoints`, where
            the state has no image encoder (the authors' files of a frozen one).

    Raises:
        ValueError: keys of the image encoder that are missing or unknown, fewer blocks, keys that
            no rule knows.
    """
    layout = layout_of(state)
    encoder, projector, body, head = _PREFIXES[layout]
    found: State = {}
    tower: State = {}
    unknown = []
    for key, value in state.items():
        if key.endswith(_BUFFERS):
            continue
        if key.startswith(encoder):
            # Older files have one level more.
            tower[key.removeprefix(encoder).removeprefix("vision_model.")] = value
        elif key.startswith(projector):
            found[_OURS[1] + _projector_key(layout, key.removeprefix(projector))] = value
        elif key.startswith(head):
            found[_OURS[3] + key.removeprefix(head)] = value
        elif key.startswith(body):
            found[_OURS[2] + key.removeprefix(body)] = value
        else:
            unknown.append(key)
    raise_for_keys(_WHERE, (), unknown)
    if tower:
        found.update(_from_tower(tower, encoder, blocks))
    elif vision is not None:
        found.update(_from_clip(vision, blocks))
    return found


def to_layout(state: State, layout: str) -> State:
    """Copies of our weights under the keys of ``layout``.

    Raises:
        ValueError: an unknown layout; a linear projector, which transformers has no place for.
    """
    if layout not in _PREFIXES:
        raise ValueError(f"{_WHERE}: layout must be one of {LAYOUTS}, got {layout!r}")
    if layout != "original" and "multi_modal_projector.linear_2.weight" not in state:
        raise ValueError(f"{_WHERE}: transformers' LLaVA has no linear projector")
    encoder, projector, body, head = _PREFIXES[layout]
    linear = "multi_modal_projector.linear_2.weight" not in state
    found: State = {}
    tower: State = {}
    unknown = []
    for key, value in state.items():
        value = value.detach().clone()
        if key.startswith(_OURS[0]):
            tower[key.removeprefix(_OURS[0])] = value
        elif key.startswith(_OURS[1]):
            found[projector + _their_projector_key(layout, key.removeprefix(_OURS[1]), linear)] = (
                value
            )
        elif key.startswith(_OURS[2]):
            found[body + key.removeprefix(_OURS[2])] = value
        elif key.startswith(_OURS[3]):
            found[head + key.removeprefix(_OURS[3])] = value
        else:
            unknown.append(key)
    raise_for_keys(_WHERE, (), unknown)
    for ours, theirs in vision_pairs(_depth(tower, "transformer.resblocks")).items():
        for name, piece in zip(theirs, tower[ours].chunk(len(theirs)), strict=True):
            found[encoder + name] = piece.clone()
    width = tower["class_embedding"]
    found[encoder + _NORM[0]], found[encoder + _NORM[1]] = (
        torch.ones_like(width),
        torch.zeros_like(width),
    )
    return found


def projector_state(source: State | str | Path) -> State:
    """The projector of a file of its own (``mm_projector.bin``, ``non_lora_trainables.bin``).

    Keys are ``linear_1.*`` and, if it has two layers, ``linear_2.*``. Files are read with
    ``weights_only``.

    Raises:
        ValueError: anything that is not the projector's.
    """
    state = source if isinstance(source, dict) else read(source)
    found: State = {}
    unknown = []
    for key, value in state.items():
        _, mark, rest = key.rpartition("mm_projector.")
        layout = "original"
        if not mark:
            _, mark, rest = key.rpartition("multi_modal_projector.")
            layout = "transformers"
        if mark:
            found[_projector_key(layout, rest)] = value
        else:
            unknown.append(key)
    raise_for_keys("LLaVA projector", () if found else ("mm_projector.*",), unknown)
    return found


def read_folder(path: str | Path) -> State:
    """The weights in a file, or in all files of a folder (safetensors, else ``.bin``).

    Raises:
        ValueError: a folder without such files.
    """
    path = Path(path)
    if path.is_file():
        return read(path)
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{_WHERE}: {path} has no safetensors and no pytorch_model*.bin")
    return {name: value for file in files for name, value in read(file).items()}


def _projector_key(layout: str, key: str) -> str:
    if layout != "original":
        return key
    layer, _, leaf = key.rpartition(".")
    return {"": "linear_1", "0": "linear_1", "2": "linear_2"}.get(layer, layer) + f".{leaf}"


def _their_projector_key(layout: str, key: str, linear: bool) -> str:
    if layout != "original":
        return key
    layer, _, leaf = key.rpartition(".")
    return leaf if linear else {"linear_1": "0", "linear_2": "2"}[layer] + f".{leaf}"


def _depth(state: State, prefix: str) -> int:
    start = f"{prefix}."
    return len({key[len(start) :].split(".")[0] for key in state if key.startswith(start)})


def _require_blocks(there: int, wanted: int) -> None:
    if there < wanted:
        raise ValueError(
            f"{_WHERE}: the image encoder must have at least {wanted} blocks, got {there}"
        )


def _from_tower(tower: State, prefix: str, blocks: int) -> State:
    depth = _depth(tower, "encoder.layers")
    expected = {name for names in vision_pairs(depth).values() for name in names}
    raise_for_keys(
        _WHERE,
        [prefix + name for name in expected - tower.keys()],
        [prefix + name for name in tower.keys() - expected - set(_NORM)],
    )
    _require_blocks(depth, blocks)
    return {
        _OURS[0] + ours: tower[theirs[0]]
        if len(theirs) == 1
        else torch.cat([tower[name] for name in theirs])
        for ours, theirs in vision_pairs(blocks).items()
    }


def _from_clip(vision: State, blocks: int) -> State:
    own = {n.removeprefix("visual."): v for n, v in to_openai(vision).items() if "visual." in n}
    _require_blocks(_depth(own, "transformer.resblocks"), blocks)
    wanted = vision_pairs(blocks)
    raise_for_keys(f"{_WHERE} (CLIP)", [name for name in wanted if name not in own], ())
    return {_OURS[0] + name: own[name] for name in wanted}
