"""InternLM-XComposer: a perceive sampler's 64 queries an image, anywhere in a text.

Zhang et al., "InternLM-XComposer: A Vision-Language Large Model for Advanced Text-image
Comprehension and Composition" (arXiv 2309.15112), and its released checkpoints. EVA-CLIP ViT-g with
a trained last norm, the perceive sampler (a Q-Former of queries only), a projection, a start and an
end around each image, and InternLM-chat: a LLaMA with biases in attention. State-dict keys are this
package's for BLIP-2; :meth:`XComposer.from_released` and :meth:`XComposer.to_released` map the
released ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import LlamaConfig

from mmkern.models.blip2_base import Blip2Config
from mmkern.models.blip2_checkpoints import to_lavis
from mmkern.models.clip_checkpoints import State, read
from mmkern.models.images_in_text import ImagesInText
from mmkern.nn.lora import add_lora

__all__ = ["LORA_TARGETS", "XComposer", "XComposerConfig", "internlm_7b", "xcomposer_7b"]

# The released configuration's q, v and feed-forward network.
LORA_TARGETS = ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")


class XComposerConfig(Blip2Config):
    """:class:`~mmkern.models.blip2_base.Blip2Config` with 64 queries, and LoRA.

    Args:
        lora_rank: of the adapters on the language model; 0: there are none.
        lora_alpha: the adapters' scale is lora_alpha / lora_rank.
        lora_dropout: of the adapters' inputs.
        lora_targets: names of the layers that have one.
        freeze_language_model: the language model is fixed, its adapters are not. False here, as
            pretraining trains it.
    """

    model_type = "mmkern_xcomposer"

    num_query_tokens: int = 64
    freeze_language_model: bool = False
    lora_rank: int = 0
    lora_alpha: float = 256.0
    lora_dropout: float = 0.05
    lora_targets: tuple[str, ...] | list[str] = LORA_TARGETS

    def image_tokens(self, height: int, width: int) -> int:
        """Tokens of an image, of whatever size: its start, its queries, its end."""
        return self.num_query_tokens + 2


class XComposer(ImagesInText):
    """Image encoder, perceive sampler, projection, language model.

    An image takes ``image_positions`` = ``config.num_query_tokens`` + 2 places in ``input_ids``,
    all of them ``config.image_token_index``: its start, its queries, its end. A sample has any
    number of images, a batch may have none: the sampler's gradients are then zero, not missing, so
    DistributedDataParallel goes on. Start and end are fixed zeros unless a checkpoint says
    otherwise; they are buffers, so that no stage trains them.

    The loss is the next token's, on labelled rows, through
    :func:`mmkern.ops.linear_cross_entropy`. ``language_model`` as in
    :class:`~mmkern.models.blip2_generation.Blip2ForConditionalGeneration`, causal.
    """

    config_class = XComposerConfig
    main_input_name = "input_ids"

    flag_image_start: Tensor
    flag_image_end: Tensor

    def __init__(self, config: XComposerConfig, language_model: Any = None) -> None:
        super().__init__(config)
        self.build_image_side(config)
        self.build_language_side(config, language_model)
        if self.language_model.config.is_encoder_decoder:
            raise ValueError(f"{self._name}: the language model must be causal")
        width = self.language_projection.out_features
        for name in ("flag_image_start", "flag_image_end"):
            self.register_buffer(name, torch.zeros(1, 1, width))
        if config.lora_rank:
            add_lora(
                self.language_model,
                config.lora_targets,
                config.lora_rank,
                config.lora_alpha,
                config.lora_dropout,
            )
        self.post_init()

    @property
    def image_positions(self) -> int:
        """What an image takes in a text: 66 in the released model."""
        size = self.config.vision_config.image_size
        positions: int = self.config.image_tokens(size, size)
        return positions

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, S, S] to what the language model reads of each, [N, Q + 2, H]."""
        if not len(pixel_values):
            return self.no_features()
        queries = self.qformer(self.query_tokens, image=self.encode_image(pixel_values))
        projected = self.project(queries)
        start, end = (
            flag.to(projected.dtype).expand(len(projected), -1, -1)
            for flag in (self.flag_image_start, self.flag_image_end)
        )
        return torch.cat([start, projected, end], 1)

    def no_features(self) -> Tensor:
        """Features of no image, [0, Q + 2, H]."""
        weight = self.language_projection.weight
        return weight.new_zeros(0, self.image_positions, weight.shape[0])

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_counts: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """transformers' ``generate``; prompt and what follows. Arguments as in :meth:`forward`.

        Without ``input_ids`` each image is the prompt of a sample, behind the language model's
        first token.
        """
        if input_ids is None:
            if pixel_values is None:
                raise ValueError(f"{self._name}.generate: give pixel_values, input_ids or both")
            input_ids = self.default_prompt(len(pixel_values), pixel_values.device)
        features = self._features(input_ids, pixel_values, image_counts)
        return self.generate_text(input_ids, attention_mask, features, options)

    def default_prompt(self, batch: int, device: torch.device) -> Tensor:
        """The language model's beginning of a text, where it has one, and an image."""
        begin = self.config.text_config.bos_token_id
        row = [] if begin is None else [begin]
        row += [self.config.image_token_index] * self.image_positions
        return torch.tensor([row], device=device).repeat(batch, 1)

    def freeze(self) -> None:
        """As in BLIP-2; a frozen language model's adapters are trained."""
        super().freeze()
        if hasattr(self, "language_model") and self.config.freeze_language_model:
            self.freeze_but_adapters()

    @classmethod
    def from_released(
        cls,
        state: State | str | Path,
        config: XComposerConfig,
        *,
        language_model: Any = None,
        vision: State | str | Path | None = None,
    ) -> Self:
        """The model of a released checkpoint, in eval mode; see :meth:`from_lavis`.

        The chat release has its LoRA merged (``lora_rank=0``), the composition release has it apart
        (``lora_rank=256``).

        Raises ValueError with the missing, unexpected and misshapen keys.
        """
        state = state if isinstance(state, dict) else read(state)
        # A buffer that older versions of the remote code saved.
        kept = {n: v for n, v in state.items() if not n.endswith("rotary_emb.inv_freq")}
        return cls.from_lavis(kept, config, language_model=language_model, vision=vision)

    def to_released(self) -> State:
        """The weights under the released keys; copies, in the model's dtype."""
        return to_lavis(self.state_dict(), language="internlm")

    to_lavis = to_released


def internlm_7b(**overrides: Any) -> LlamaConfig:
    """InternLM-chat-7B as transformers' LLaMA: biases in attention, 103,168 words."""
    fields: dict[str, Any] = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 103168,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    return LlamaConfig(**{**fields, **overrides})


def xcomposer_7b(**overrides: Any) -> XComposer:
    """ViT-g and InternLM-7B, random weights; ``overrides``: :class:`XComposerConfig` fields.

    The image token is 103,170, behind the released vocabulary, which chat's marks extend by two.
    """
    fields: dict[str, Any] = {
        "vision_config": {"initializer_range": 0.02},
        "vision_norm_eps": 1e-5,
        "text_config": internlm_7b(vocab_size=103170),
        "image_token_index": 103170,
    }
    return XComposer(XComposerConfig(**{**fields, **overrides}))
