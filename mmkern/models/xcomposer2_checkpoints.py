"""Released checkpoints of InternLM-XComposer2: their keys, and ours.

The language model, ``vision_proj.*`` and ``plora_{glb,sub}_GN`` are called alike. The image encoder
is transformers' ``CLIPVisionModel`` below ``vit.vision_tower``, here our own with fused q, k and v.
"""

from __future__ import annotations

from pathlib import Path

import torch

from mmkern.models.clip_checkpoints import BLOCKS, LEAVES, SINGLE, State, raise_for_keys, read

__all__ = ["from_released", "to_released"]

_THEIRS, _OURS = "vit.vision_tower.vision_model.", "vit."
# What serves the class token only, and a buffer that transformers used to save.
_UNUSED = ("post_layernorm.weight", "post_layernorm.bias", "embeddings.position_ids")
_OUTSIDE = {
    ours.removeprefix("visual."): theirs.removeprefix("vision_model.")
    for ours, theirs in SINGLE.items()
    if ours.startswith("visual.") and not ours.endswith("proj") and "ln_post" not in ours
}
_BLOCK = (
    "transformer.resblocks",
    BLOCKS["visual.transformer.resblocks"].removeprefix("vision_model."),
)


def _pairs(blocks: int) -> dict[str, tuple[str, ...]]:
    """Our key of the encoder to the released one, or for the fused projection the three."""
    pairs: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in _OUTSIDE.items()}
    for i in range(blocks):
        ours, theirs = (f"{name}.{i}" for name in _BLOCK)
        for kind in ("weight", "bias"):
            pairs[f"{ours}.attn.in_proj_{kind}"] = tuple(
                f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv"
            )
            for leaf, name in LEAVES.items():
                pairs[f"{ours}.{leaf}.{kind}"] = (f"{theirs}.{name}.{kind}",)
    return pairs


def _depth(names: set[str], prefix: str) -> int:
    start = f"{prefix}."
    return len({n.removeprefix(start).split(".")[0] for n in names if n.startswith(start)})


def from_released(source: State | str | Path) -> State:
    """A released state dict, or the files of one (a folder's parts together), under our keys.

    Raises:
        ValueError: keys of the image encoder that are missing or unknown; a folder without files.
    """
    state = source if isinstance(source, dict) else _read(Path(source))
    found = {name: value for name, value in state.items() if not name.startswith(_OURS)}
    found = {n: v for n, v in found.items() if not n.endswith("rotary_emb.inv_freq")}
    vision = {n.removeprefix(_THEIRS): v for n, v in state.items() if n.startswith(_OURS)}
    pairs = _pairs(_depth(set(vision), _BLOCK[1]))
    expected = {name for names in pairs.values() for name in names}
    raise_for_keys(
        "XComposer2 checkpoint",
        [f"{_THEIRS}{name}" for name in expected - vision.keys()],
        vision.keys() - expected - set(_UNUSED),
    )
    for ours, theirs in pairs.items():
        pieces = [vision[name] for name in theirs]
        found[f"{_OURS}{ours}"] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return found


def to_released(state: State) -> State:
    """The opposite of :func:`from_released`; copies."""
    vision = {n.removeprefix(_OURS): v for n, v in state.items() if n.startswith(_OURS)}
    found = {n: v.detach().clone() for n, v in state.items() if not n.startswith(_OURS)}
    for ours, theirs in _pairs(_depth(set(vision), _BLOCK[0])).items():
        for name, piece in zip(theirs, vision[ours].detach().chunk(len(theirs)), strict=True):
            found[f"{_THEIRS}{name}"] = piece.clone()
    return found


def _read(path: Path) -> State:
    if path.is_file():
        return read(path)
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"XComposer2 checkpoint: {path} has no safetensors and no .bin files")
    return {name: value for file in files for name, value in read(file).items()}
