"""A small InternLM-XComposer2, batches for it, and a CLIP whose tower fits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkern.models.clip import CLIP, CLIPConfig
from mmkern.models.xcomposer2 import XComposer2Config, XComposer2ForConditionalGeneration
from tests.models.test_internlm2 import VOCABULARY, shake

IMAGE = VOCABULARY
TILE = 13  # tokens of an image of one tile
VISION = {
    "model_type": "mmkern_clip_vision", "hidden_size": 16, "image_size": 8, "patch_size": 2,
    "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 128,
    "initializer_range": 0.1, "plora_rank": 4, "plora_dropout": 0.0, "vision_config": VISION,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip


def small(seed: int = 0, **fields: Any) -> XComposer2ForConditionalGeneration:
    """16 tokens an image of 8 pixels; random adapters, in eval mode."""
    torch.manual_seed(seed)
    model = XComposer2ForConditionalGeneration(XComposer2Config(**{**SIZES, **fields})).eval()
    shake(model)
    if model.config.hd_num:
        with torch.no_grad():
            model.plora_glb_GN.normal_()
            model.plora_sub_GN.normal_()
    return model


def clip(image_size: int = 8) -> CLIP:
    """A CLIP with the tower's sizes."""
    torch.manual_seed(5)
    return CLIP(
        CLIPConfig(
            embed_dim=8, image_size=image_size, vision_layers=2, vision_width=16,
            vision_patch_size=2, vision_heads=2, text_width=16, text_heads=2, text_layers=1,
            context_length=4, vocab_size=10, quick_gelu=True,
        )
    )  # fmt: skip


def pixels(count: int = 1, high: int = 8, wide: int = 8, seed: int = 0) -> Tensor:
    """Pictures."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, high, wide, generator=generator)


def row(text: list[int], tokens: int = 16) -> list[int]:
    """[bos][image][text], or text alone."""
    return [1, *[IMAGE] * tokens, *text]


def batch(rows: list[list[int]], images: Any = None) -> dict[str, Any]:
    """Padded to the right; everything but bos and images is trained."""
    width = max(map(len, rows))
    ids = torch.tensor([[*r, *[2] * (width - len(r))] for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    labels = ids.masked_fill((mask == 0) | (ids == IMAGE) | (ids == 1), -100)
    found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return found if images is None else {**found, "pixel_values": images}
