"""Sizes of an InternLM-XComposer2, and how an image of several tiles becomes tokens."""

from __future__ import annotations

from typing import Any

from mmkern.models.blip2_base import ClipVisionConfig
from mmkern.models.internlm2_config import InternLM2Config

__all__ = ["XComposer2Config"]


class XComposer2Config(InternLM2Config):
    """Fields of :class:`~mmkern.models.internlm2_config.InternLM2Config`, and of the image side.

    Args:
        vision_config: a :class:`~mmkern.models.blip2_base.ClipVisionConfig`; the default is CLIP's
            ViT-L/14 for images of 490 pixels.
        image_token_index: the id that stands for an image's token; may lie outside the vocabulary.
            None: the first one that does.
        hd_num: 4KHD: an image has at most so many tiles of ``vision_config.image_size``, and its
            tokens are joined by twos both ways. 0: one square image, every patch a token.
        language_weight, contrastive_weight: of the two losses. What was released is trained by
            the first alone; the second is built only if it has a weight.
        contrastive_width: D of the contrastive loss.
        initial_temperature: τ of the contrastive loss at the start.

    Raises:
        ValueError: no loss at all, or tiles whose patches cannot be joined by twos.
    """

    model_type = "mmkern_xcomposer2"

    vision_config: Any = None
    image_token_index: int | None = None
    hd_num: int = 0
    language_weight: float = 1.0
    contrastive_weight: float = 0.0
    contrastive_width: int = 256
    initial_temperature: float = 0.07

    def __post_init__(self, **kwargs: Any) -> None:
        vision: Any = self.vision_config
        if vision is None:
            vision = {"image_size": 490, "num_hidden_layers": 24}
        if isinstance(vision, dict):
            vision = ClipVisionConfig(**vision)
        self.vision_config = vision
        if self.image_token_index is None:
            self.image_token_index = self.vocab_size
        weights = (self.language_weight, self.contrastive_weight)
        if min(weights) < 0 or not any(weights):
            raise ValueError(
                "XComposer2Config: language_weight and contrastive_weight must not be negative and "
                f"not both 0, got {weights}"
            )
        if self.hd_num and self.grid % 2:
            raise ValueError(
                f"XComposer2Config: tiles of {vision.image_size} pixels have {self.grid} patches a "
                "side, but hd_num needs an even number"
            )
        super().__post_init__(**kwargs)

    @property
    def grid(self) -> int:
        """Patches on a side of an image, or of a tile."""
        size: int = self.vision_config.image_size // self.vision_config.patch_size
        return size

    def image_tokens(self, height: int, width: int) -> int:
        """Tokens of an image of so many pixels.

        g² for the fixed square of g patches a side. For h x w tiles, after joining m = g / 2 a
        side: (h w + 1) m² for the tiles and the whole image at a tile's size, m (h + 1) newlines
        and one separator.

        Raises:
            ValueError: a size that is no multiple of a tile's, or too many tiles.
        """
        size = self.vision_config.image_size
        if not self.hd_num:
            if (height, width) != (size, size):
                raise ValueError(
                    f"XComposer2: an image must be {size} x {size} pixels, got {height} x {width}"
                )
            return self.grid**2
        high, wide = height // size, width // size
        if height % size or width % size or not 0 < high * wide <= self.hd_num:
            raise ValueError(
                f"XComposer2: an image must be 1 to {self.hd_num} tiles of {size} x {size} pixels, "
                f"got {height} x {width}"
            )
        side = self.grid // 2
        return (high * wide + 1) * side**2 + (high + 1) * side + 1
