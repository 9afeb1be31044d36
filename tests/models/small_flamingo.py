"""A small Flamingo with random weights, a batch, and its sizes for the plain reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkern.models.blip2_base import ClipVisionConfig
from mmkern.models.flamingo import Flamingo, FlamingoConfig
from tests.models.plain_flamingo import Sizes
from tests.models.small_generation import shake

# The special tokens and one more are the last rows, as an added pad is behind them.
VOCABULARY, END, IMAGE, PAD, SIZE = 50, 47, 48, 49, 28
LLAMA = {
    "model_type": "llama", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": PAD,
    "tie_word_embeddings": True,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "image_size": SIZE, "patch_size": 14, "num_hidden_layers": 2,
    "num_attention_heads": 2, "quick_gelu": False,
}  # fmt: skip


def config(text: dict[str, Any] | None = None, **options: Any) -> FlamingoConfig:
    sizes: dict[str, Any] = {
        "image_token_id": IMAGE, "end_of_chunk_token_id": END, "cross_attn_every_n_layers": 2,
        "resampler_depth": 2, "num_latents": 3, "heads": 2, "head_width": 8,
    }  # fmt: skip
    return FlamingoConfig(
        vision_config=ClipVisionConfig(**VISION),
        text_config={**LLAMA, **(text or {})},
        **{**sizes, **options},
    )


def small(text: dict[str, Any] | None = None, **options: Any) -> Flamingo:
    """In eval mode, every parameter random, gates open."""
    return shake(Flamingo(config(text, **options))).eval()


def sizes(model: Flamingo) -> Sizes:
    config = model.config
    return Sizes(
        patch=14, vision_layers=2, vision_heads=2, resampler_layers=2, heads=2, layers=4,
        text_heads=4, kv_heads=2, every=config.cross_attn_every_n_layers, image=IMAGE, end=END,
        all_previous=not config.only_attend_immediate_media, ln_post=config.apply_ln_post,
        tied=model.tied,
    )  # fmt: skip


def batch(left: bool = False) -> dict[str, Tensor]:
    """Four samples of 2, 1, 0 and 3 pictures and unequal lengths; one picture is shown twice."""
    generator = torch.Generator().manual_seed(3)
    texts = [
        [1, 5, IMAGE, 7, 8, END, IMAGE, 9, 10, END],
        [IMAGE, 11, 12, END, 2],
        [1, 13, 14, 15],
        [3, 4, IMAGE, 5, IMAGE, 6, END, IMAGE, 8, 9, 10, END],
    ]
    width = max(map(len, texts))
    ids = torch.full((4, width), PAD)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        place = slice(width - len(text), width) if left else slice(0, len(text))
        ids[row, place], mask[row, place] = torch.tensor(text), 1
    first = mask.cumsum(1) == 1  # of a text; what stands before it is a pad, or nothing
    labels = ids.masked_fill((mask == 0) | (ids == IMAGE) | first, -100)
    index = torch.tensor([[0, 1, -1], [2, -1, -1], [-1, -1, -1], [3, 1, 4]])
    return {
        "pixel_values": torch.randn(5, 3, SIZE, SIZE, generator=generator),
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "image_index": index,
    }
