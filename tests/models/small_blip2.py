"""Small BLIP-2 parts with random weights, ours and transformers', and a batch for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

HIDDEN, LAYERS, HEADS, INNER, WIDTH, VOCABULARY, POSITIONS = 32, 4, 4, 64, 24, 61, 64
QUERIES, TOKENS = 5, 7
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "encoder_hidden_size": WIDTH,
}
VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "initializer_range": 0.02,
}
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "use_qformer_text_input": True,
}


def redraw(module: nn.Module, std: float = 0.2, seed: int = 0) -> Any:
    """Draw every parameter N(0, std), norms' gains around 1, eval mode: zeros and identities hide a
    wrong map."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * std)
            if "norm" in name.lower() and name.endswith("weight"):
                value += 1
    return module.eval()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_ids(rows: int, columns: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, columns), generator=generator)


def assert_same_gradients(
    actual: dict[str, Tensor | None],
    expected: dict[str, Tensor | None],
    tolerance: float = 1e-5,
    floor: float = 1e-30,
) -> float:
    """Gradients by name: the largest difference, as a share of the largest entry, is returned.

    Raises beyond `tolerance`; entries below `floor` count as that. A gradient of 0 may be None on
    either side. That of a key's bias is 0 but for rounding (a softmax does not see it) and is
    compared to the size of its weight's.
    """
    assert actual.keys() >= expected.keys()
    worst = 0.0
    for name, reference in expected.items():
        value = actual[name]
        if reference is None or value is None:
            rest = value if reference is None else reference
            assert rest is None or not rest.any(), name
            continue
        scale = expected[name.replace("key.bias", "key.weight")]
        assert scale is not None
        error = float((value - reference).abs().max() / scale.abs().max().clamp(min=floor))
        assert error <= tolerance, (name, error)
        worst = max(worst, error)
    return worst


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: value.grad for name, value in module.named_parameters()}


def config(**overrides: Any) -> Any:
    """A small stage 1; dropout as published."""
    from mmkern.models.blip2 import Blip2Config

    fields: dict[str, Any] = {
        "vision_config": VISION,
        "qformer_config": {**SIZES, **TEXT},
        "num_query_tokens": QUERIES,
        "image_text_hidden_size": 16,
    }
    return Blip2Config(**{**fields, **overrides})


def small_stage1(**overrides: Any) -> Any:
    """Redrawn parameters, a temperature that leaves the softmax soft, eval mode."""
    from mmkern.models.blip2 import Blip2ForPretraining

    model = redraw(Blip2ForPretraining(config(**overrides)))
    model.temp.data.fill_(0.3)
    return model


def batch(rows: int = 5, columns: int = 6) -> dict[str, Tensor]:
    """Pairs with texts of 1 to `columns` tokens."""
    lengths = torch.tensor([6, 2, 4, 1, 5, 3, 6, 2])[:rows].clamp(max=columns)
    filled = torch.arange(columns) < lengths[:, None]
    return {
        "pixel_values": draw(rows, 3, 28, 28),
        "input_ids": draw_ids(rows, columns) * filled,
        "attention_mask": filled.long(),
    }
