"""Flamingo's sizes and its vision tower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from mmkern.models.blip2_base import ClipVisionConfig
from mmkern.models.clip import CLIP
from mmkern.models.clip_checkpoints import raise_for_keys
from mmkern.nn.towers import VisionTransformer

__all__ = ["FlamingoConfig", "FlamingoVisionModel"]


class FlamingoConfig(PretrainedConfig):
    """Sizes of a Flamingo.

    Args:
        vision_config: a :class:`~mmkern.models.blip2_base.ClipVisionConfig`, all blocks of a CLIP.
        text_config: of any causal language model of transformers whose vocabulary has room for the
            two special tokens.
        image_token_id, end_of_chunk_token_id: the ids of ``<image>`` and ``<|endofchunk|>``. The
            loss is cheapest where they are the last of the vocabulary.
        cross_attn_every_n_layers: n; layers n − 1, 2n − 1, ... have a block in front of them.
        only_attend_immediate_media: a text reads its own picture; else all up to it.
        apply_ln_post: the tower's last norm is applied to the patches. OpenFlamingo was trained
            without it; open_clip from 2.23.0 on applies it.
        resampler_depth, num_latents, heads, head_width, ff_mult: of the resampler; the last three
            of the blocks too.
        max_media, max_frames: learned embeddings of a picture's place and of frames; None: none.
    """

    model_type = "mmkern_flamingo"

    vision_config: Any = None
    text_config: Any = None
    image_token_id: int = 50278
    end_of_chunk_token_id: int = 50277
    cross_attn_every_n_layers: int = 1
    only_attend_immediate_media: bool = True
    apply_ln_post: bool = False
    resampler_depth: int = 6
    num_latents: int = 64
    heads: int = 8
    head_width: int = 64
    ff_mult: int = 4
    max_media: int | None = None
    max_frames: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_config is None:
            self.vision_config = ClipVisionConfig(num_hidden_layers=24)
        elif isinstance(self.vision_config, dict):
            self.vision_config = ClipVisionConfig(**self.vision_config)
        if isinstance(self.text_config, dict):
            sizes = dict(self.text_config)
            self.text_config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
        elif self.text_config is None:
            self.text_config = AutoConfig.for_model("mpt")
        super().__post_init__(**kwargs)


class FlamingoVisionModel(VisionTransformer):
    """CLIP's vision transformer: [B, 3, S, S] to its patch tokens [B, L, W], without the class's.

    Keys are OpenAI's without ``visual.``; ``ln_post`` is there where it is applied.
    """

    def __init__(self, config: ClipVisionConfig, apply_ln_post: bool) -> None:
        super().__init__(
            config.image_size,
            config.patch_size,
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            1,
            mlp_ratio=config.mlp_ratio,
            quick_gelu=config.quick_gelu,
        )
        del self.proj
        self.apply_ln_post = apply_ln_post
        if not apply_ln_post:
            del self.ln_post

    def reset_parameters(self) -> None:
        for parameter in (self.class_embedding, self.positional_embedding):
            nn.init.normal_(parameter, std=self.class_embedding.shape[0] ** -0.5)

    def forward(self, pixel_values: Tensor) -> Tensor:  # type: ignore[override]
        x = self.transformer(self.tokens(pixel_values))
        return self.ln_post(x)[:, 1:] if self.apply_ln_post else x[:, 1:]

    @torch.no_grad()
    def load_clip(self, clip: CLIP) -> None:
        """Copy the weights of a CLIP's tower.

        Raises:
            ValueError: weights that the tower lacks or has in another shape, by name.
        """
        state, own = clip.state_dict(), self.state_dict()
        found = {key: state.get(f"visual.{key}") for key in own}
        wrong = [k for k, v in found.items() if v is None or v.shape != own[k].shape]
        raise_for_keys("FlamingoVisionModel.load_clip", wrong, ())
        self.load_state_dict({key: value for key, value in found.items() if value is not None})
