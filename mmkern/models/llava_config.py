"""Sizes of a LLaVA, and what an image encoder's configuration becomes."""

from __future__ import annotations

from typing import Any, Literal

from transformers import AutoConfig
from transformers import LlavaConfig as TransformersConfig

from mmkern.models.blip2_base import ClipVisionConfig

__all__ = ["LlavaConfig"]


class LlavaConfig(TransformersConfig):
    """transformers' ``LlavaConfig`` with our image encoder, and more.

    ``vision_config`` is a :class:`~mmkern.models.blip2_base.ClipVisionConfig`, or transformers'
    ``CLIPVisionConfig``, which becomes one. ``vision_feature_layer`` counts blocks from the end.
    Those behind it are never built: from then on it is -1, and ``num_hidden_layers`` what is left,
    so that a configuration that was read and one that was written say the same.

    Args:
        mm_projector_type: ``mlp2x_gelu`` (1.5) or ``linear`` (1.0).
        freeze_vision: the image encoder is fixed and in eval mode.
        freeze_language_model: the language model is fixed, its adapters are not.
        lora_rank, lora_alpha, lora_dropout, lora_targets: of LoRA on the language model, as
            :func:`mmkern.nn.lora.add_lora` takes them; rank 0: none. The authors' is 128 and 256 on
            every linear layer.

    Raises:
        ValueError: an encoder, a projector or feature layers that LLaVA does not have.
    """

    model_type = "mmkern_llava"

    mm_projector_type: Literal["mlp2x_gelu", "linear"] = "mlp2x_gelu"
    freeze_vision: bool = True
    freeze_language_model: bool = False
    lora_rank: int = 0
    lora_alpha: float = 256.0
    lora_dropout: float = 0.05
    lora_targets: tuple[str, ...] | list[str] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip

    def __post_init__(self, **kwargs: Any) -> None:
        given: Any = self
        vision, layer = _vision_config(given.vision_config), given.vision_feature_layer
        if not isinstance(layer, int) or not -vision.num_hidden_layers <= layer < 0:
            raise ValueError(
                f"LlavaConfig: vision_feature_layer must be one of -1 to "
                f"{-vision.num_hidden_layers}, got {layer!r}"
            )
        vision.num_hidden_layers += 1 + layer
        self.vision_config, self.vision_feature_layer = vision, -1
        self.image_seq_length = self.image_tokens
        super().__post_init__(**kwargs)
        for field, expected in (
            ("projector_hidden_act", "gelu"),
            ("multimodal_projector_bias", True),
        ):
            if (got := getattr(self, field)) != expected:
                raise ValueError(f"LlavaConfig: {field} must be {expected!r}, got {got!r}")

    @property
    def image_tokens(self) -> int:
        """Positions of an image: patches, and the class token if the strategy is "full"."""
        vision: Any = self.vision_config
        patches: int = (vision.image_size // vision.patch_size) ** 2
        return patches + (self.vision_feature_select_strategy == "full")


def _vision_config(given: Any) -> ClipVisionConfig:
    """Ours, of whatever describes the image encoder; a copy."""
    if given is None:
        return ClipVisionConfig(image_size=336, num_hidden_layers=24)
    fields = dict(given) if isinstance(given, dict) else given.to_dict()
    if fields.get("model_type", ClipVisionConfig.model_type) == ClipVisionConfig.model_type:
        return ClipVisionConfig(**fields)
    if fields["model_type"] not in ("clip_vision_model", "clip"):
        raise ValueError(
            "LlavaConfig: vision_config must be a CLIP's vision transformer, got "
            f"{fields['model_type']!r}"
        )
    theirs: Any = AutoConfig.for_model(**{**fields, "model_type": "clip_vision_model"})
    if theirs.hidden_act not in ("gelu", "quick_gelu") or theirs.layer_norm_eps != 1e-5:
        raise ValueError(
            "LlavaConfig: vision_config must have hidden_act gelu or quick_gelu and layer_norm_eps "
            f"1e-5, got {theirs.hidden_act!r} and {theirs.layer_norm_eps}"
        )
    return ClipVisionConfig(
        hidden_size=theirs.hidden_size,
        image_size=theirs.image_size,
        patch_size=theirs.patch_size,
        num_hidden_layers=theirs.num_hidden_layers,
        num_attention_heads=theirs.num_attention_heads,
        mlp_ratio=theirs.intermediate_size / theirs.hidden_size,
        quick_gelu=theirs.hidden_act == "quick_gelu",
    )
