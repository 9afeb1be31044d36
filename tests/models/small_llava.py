"""A small LLaVA with random weights, ours and transformers', and batches of 0, 1 and 2 images."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from mmkern.models.llava import LlavaConfig, LlavaForConditionalGeneration
from tests.models.small_generation import shake

VOCABULARY, IMAGE, PAD, BEGIN, END = 70, 69, 0, 1, 2
PATCHES = 4
TEXT = {
    "model_type": "llama", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "vocab_size": VOCABULARY, "bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD,
}  # fmt: skip
VISION = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 40,
    "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip


def fields(**changes: Any) -> dict[str, Any]:
    return {
        "vision_config": dict(VISION), "text_config": dict(TEXT), "image_token_index": IMAGE,
        "image_seq_length": PATCHES, **changes,
    }  # fmt: skip


def small(**changes: Any) -> LlavaForConditionalGeneration:
    """Ours, everything trained, in eval mode."""
    config = LlavaConfig(**fields(**{"freeze_vision": False, **changes}))
    return shake(LlavaForConditionalGeneration(config)).eval()


def theirs(attention: str = "sdpa", **changes: Any) -> Any:
    """transformers', in eval mode."""
    config = transformers.LlavaConfig(**fields(**changes))
    config._attn_implementation = attention
    for part in (config.vision_config, config.text_config):
        part._attn_implementation = attention
    return shake(transformers.LlavaForConditionalGeneration(config)).eval()


def pair(attention: str = "sdpa", **changes: Any) -> tuple[LlavaForConditionalGeneration, Any]:
    """Ours with the weights of transformers'."""
    reference = theirs(attention, **changes)
    config = LlavaConfig(**fields(freeze_vision=False, **changes))
    return LlavaForConditionalGeneration.from_checkpoint(reference.state_dict(), config), reference


def samples(counts: list[int], seed: int = 1, each: int = PATCHES) -> list[dict[str, Tensor]]:
    """Samples of unequal lengths with so many images, each a batch of one."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number, images in enumerate(counts):
        words = torch.randint(3, IMAGE, (9 - 2 * (number % 3),), generator=generator)
        pieces = [words[:2]]
        for _ in range(images):
            pieces += [torch.full((each,), IMAGE), words[2:3]]
        ids = torch.cat([*pieces, words[3:]])[None]
        labels = ids.masked_fill(ids == IMAGE, -100)
        labels[:, :-3] = -100
        made.append(
            {
                "input_ids": ids,
                "labels": labels,
                "attention_mask": torch.ones_like(ids),
                "pixel_values": torch.randn(images, 3, 28, 28, generator=generator),
            }
        )
    return made


def padded(parts: list[dict[str, Tensor]], left: bool) -> dict[str, Tensor]:
    """One batch of several."""
    width = max(part["input_ids"].shape[1] for part in parts)
    batch = {"pixel_values": torch.cat([part["pixel_values"] for part in parts])}
    for name, value in (("input_ids", PAD), ("labels", -100), ("attention_mask", 0)):
        rows = []
        for part in parts:
            row = part[name][0]
            pads = row.new_full((width - len(row),), value)
            rows.append(torch.cat([pads, row] if left else [row, pads]))
        batch[name] = torch.stack(rows)
    return batch
