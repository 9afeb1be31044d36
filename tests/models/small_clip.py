"""Small CLIPs with random weights, ours and transformers', and a batch for them."""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig as TransformersConfig
from transformers import CLIPModel

from mmkern.models.clip import CLIP, CLIPConfig

VOCABULARY, CONTEXT, END = 100, 16, 99


def small(**overrides: Any) -> CLIP:
    """A ViT CLIP of odd sizes, with random weights that make every part matter."""
    sizes = {
        "embed_dim": 24,
        "image_size": 28,
        "vision_layers": 3,
        "vision_width": 64,
        "vision_patch_size": 14,
        "vision_heads": 2,
        "vision_mlp_ratio": 3.0,
        "context_length": CONTEXT,
        "vocab_size": VOCABULARY,
        "text_width": 64,
        "text_layers": 2,
        "init_logit_scale": math.log(5.0),
    }
    torch.manual_seed(0)
    return shake(CLIP(CLIPConfig(**{**sizes, **overrides})))


def small_resnet(**overrides: Any) -> CLIP:
    sizes = {"image_size": 64, "vision_layers": (1, 2, 1, 1), "vision_width": 8}
    heads = {"vision_patch_size": None, "vision_heads": None, "vision_mlp_ratio": 4.0}
    return small(**{**sizes, **heads, **overrides})


def shake(model: Any) -> Any:
    """Give norms and biases random values too: identities hide a wrong map."""
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:
                value.add_(torch.randn_like(value) * 0.1)
        for name, value in model.named_buffers():
            if "running" in name:
                value.add_(torch.rand_like(value))
    return model


def batch(size: int = 28, count: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, size, size, generator=generator)
    ids = torch.randint(1, END - 1, (count, CONTEXT), generator=generator)
    for row, end in enumerate((3, CONTEXT - 1, 7, 1, 9)[:count]):
        ids[row, end] = END
        ids[row, end + 1 :] = 0
    return images, ids


def transformers_model(attention: str, activation: str, end: int) -> Any:
    text = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 1,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "eos_token_id": end,
        "hidden_act": activation,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 200,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "hidden_act": activation,
    }
    config = TransformersConfig(
        text_config=text, vision_config=vision, projection_dim=24, logit_scale_init_value=1.5
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    return shake(CLIPModel(config))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
