"""InstructBLIP: a Q-Former that reads the instruction, in front of a language model that does too.

Dai et al., "InstructBLIP: Towards General-purpose Vision-Language Models with Instruction Tuning"
(arXiv 2305.06500), section 2.3. Trained from BLIP-2's first stage or second, with the image encoder
and the language model (T5 or Vicuna) frozen. State-dict keys are those of transformers'
``InstructBlipForConditionalGeneration``: its folders load and ours load there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import InstructBlipConfig as TransformersConfig
from transformers import LlamaConfig, PretrainedConfig

from mmkern.layout import RowIntervals
from mmkern.models.blip2_base import ClipVisionConfig
from mmkern.models.blip2_generation import flan_t5
from mmkern.models.blip2_language import LanguageSide
from mmkern.models.language import GenerationOutput

__all__ = [
    "InstructBlipConfig",
    "InstructBlipForConditionalGeneration",
    "instructblip_flan_t5_xl",
    "instructblip_flan_t5_xxl",
    "instructblip_vicuna_7b",
    "instructblip_vicuna_13b",
]


class InstructBlipConfig(TransformersConfig):
    """transformers' ``InstructBlipConfig``, read from and written to the same ``config.json``.

    ``vision_config`` may also be a :class:`~mmkern.models.blip2_base.ClipVisionConfig`. Further
    fields, which transformers ignores, are those of
    :class:`~mmkern.models.blip2_base.Blip2Config`:

    Args:
        freeze_vision: the image encoder is fixed and in eval mode; its last norm is trained.
        vision_norm_eps: ε of that norm; LAVIS trained with 1e-5. None keeps the encoder's.
        freeze_language_model: the language model is fixed.
    """

    vision_config: Any = None
    freeze_vision: bool = True
    vision_norm_eps: float | None = None
    freeze_language_model: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        vision: Any = self.vision_config
        if isinstance(vision, dict) and vision.get("model_type") == ClipVisionConfig.model_type:
            self.vision_config = ClipVisionConfig(**vision)
        super().__post_init__(**kwargs)
        # Trainer counts a T5's labels by it: they are not shifted.
        self.is_encoder_decoder = self.text_config.is_encoder_decoder


class InstructBlipForConditionalGeneration(LanguageSide):
    """Image encoder, Q-Former with text, projection, language model.

    The Q-Former sees [queries | instruction], each row all rows that are no pads; its query rows
    are projected to the language model's width and stand where ``input_ids`` hold
    ``config.image_token_index`` (``config.num_query_tokens`` times a sample). The instruction then
    follows once more, in the language model's own tokens. The loss is that of
    :class:`~mmkern.models.blip2_generation.Blip2ForConditionalGeneration`, on the answer's tokens;
    ``language_model`` as there.
    """

    config_class = InstructBlipConfig
    lavis_instruct = True

    def __init__(self, config: InstructBlipConfig, language_model: Any = None) -> None:
        super().__init__(config)
        own = config.qformer_config
        self.build_image_side(
            config,
            use_qformer_text_input=True,
            vocab_size=own.vocab_size,
            max_position_embeddings=own.max_position_embeddings,
            pad_token_id=own.pad_token_id,
        )
        self.build_language_side(config, language_model)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        return_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **language_model_options: Any,
    ) -> GenerationOutput:
        """Loss, and logits where they are wanted.

        Args:
            qformer_input_ids: [B, Tq], the instruction in the Q-Former's tokens (BERT's).
            qformer_attention_mask: [B, Tq], 0 at pads, which stand at one end or both; None: no
                pads.

        All else, and the errors, as in
        :class:`~mmkern.models.blip2_generation.Blip2ForConditionalGeneration`.
        """
        features = self._features(pixel_values, qformer_input_ids, qformer_attention_mask)
        return self.forward_language(
            input_ids,
            attention_mask,
            labels,
            features,
            return_logits,
            num_items_in_batch,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            **language_model_options,
        )

    def image_features(
        self, pixel_values: Tensor, qformer_input_ids: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """What the language model reads of the image, [B, Q, H]; depends on the instruction."""
        if len(qformer_input_ids) != len(pixel_values):
            raise ValueError(
                f"{self._name}: qformer_input_ids must have a row for each of the "
                f"{len(pixel_values)} images, got {len(qformer_input_ids)}"
            )
        if not len(pixel_values):
            return self.no_features()
        return self.project(
            self.qformer(
                self.query_tokens,
                qformer_input_ids,
                mask=self._instruction_mask(qformer_input_ids, mask),
                image=self.encode_image(pixel_values),
                text_rows=0,
            )
        )

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """transformers' ``generate``: beams, sampling, lengths and penalties are ``options``.

        LAVIS takes ``num_beams=5, repetition_penalty=1.5, length_penalty=1``, up to 256 tokens.
        There, Vicuna's id 0 (``<unk>``, which pads) is turned into 2 (``</s>``) before decoding;
        here ids are what the model said: decode with ``skip_special_tokens=True``.
        """
        if input_ids is None:
            if pixel_values is None:
                raise ValueError(f"{self._name}.generate: give pixel_values, input_ids or both")
            input_ids = self.default_prompt(len(pixel_values), pixel_values.device)
        features = self._features(pixel_values, qformer_input_ids, qformer_attention_mask)
        return self.generate_text(input_ids, attention_mask, features, options)

    def _features(
        self, pixel_values: Tensor | None, ids: Tensor | None, mask: Tensor | None
    ) -> Tensor | None:
        if (pixel_values is None) != (ids is None):
            present, absent = "pixel_values", "qformer_input_ids"
            if pixel_values is None:
                present, absent = absent, present
            raise ValueError(f"{self._name}: {present} need {absent}")
        if pixel_values is None or ids is None:
            return None
        return self.image_features(pixel_values, ids, mask)

    def _instruction_mask(self, ids: Tensor, mask: Tensor | None) -> RowIntervals:
        """Rows and keys [queries | instruction]: everything sees all that is no pad."""
        queries = self.config.num_query_tokens
        if mask is None:
            return RowIntervals.bidirectional(queries, ids.shape[1]).to(ids.device)
        if mask.shape != ids.shape:
            raise ValueError(
                f"{self._name}: qformer_attention_mask must be {list(ids.shape)} as "
                f"qformer_input_ids, got {list(mask.shape)}"
            )
        kept = mask != 0
        lengths = kept.sum(1)
        first = kept.int().argmax(1) if ids.shape[1] else lengths
        if mask.device.type == "cpu" and not torch.compiler.is_compiling():
            place = torch.arange(ids.shape[1])
            run = (place >= first[:, None]) & (place < (first + lengths)[:, None])
            if bool((run != kept).any()):
                i = int((run != kept).any(1).nonzero()[0])
                raise ValueError(
                    f"{self._name}: qformer_attention_mask of sample {i} has a gap between tokens"
                )
        return RowIntervals.bidirectional(queries, ids.shape[1], lengths, first)


def _vicuna(hidden_size: int, intermediate_size: int, layers: int) -> LlamaConfig:
    # 32,000 words, a pad and the image token, rounded up.
    return LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=layers,
        vocab_size=32064,
        pad_token_id=32000,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
    )


def _published(text: PretrainedConfig, image_token: int, overrides: dict[str, Any]) -> Any:
    # BERT's vocabulary and [DEC].
    fields: dict[str, Any] = {
        "vision_config": {"initializer_range": 0.02},
        "vision_norm_eps": 1e-5,
        "text_config": text,
        "qformer_config": {"vocab_size": 30523},
        "image_token_index": image_token,
    }
    return InstructBlipForConditionalGeneration(InstructBlipConfig(**{**fields, **overrides}))


def instructblip_vicuna_7b(**overrides: Any) -> InstructBlipForConditionalGeneration:
    """ViT-g and Vicuna-7B, random weights; ``overrides``: :class:`InstructBlipConfig` fields."""
    return _published(_vicuna(4096, 11008, 32), 32001, overrides)


def instructblip_vicuna_13b(**overrides: Any) -> InstructBlipForConditionalGeneration:
    """ViT-g and Vicuna-13B, random weights; ``overrides``: :class:`InstructBlipConfig` fields."""
    return _published(_vicuna(5120, 13824, 40), 32001, overrides)


def instructblip_flan_t5_xl(**overrides: Any) -> InstructBlipForConditionalGeneration:
    """ViT-g and Flan-T5 XL, random weights; ``overrides``: :class:`InstructBlipConfig` fields."""
    return _published(flan_t5("xl"), 32100, overrides)


def instructblip_flan_t5_xxl(**overrides: Any) -> InstructBlipForConditionalGeneration:
    """ViT-g and Flan-T5 XXL, random weights; ``overrides``: :class:`InstructBlipConfig` fields."""
    return _published(flan_t5("xxl"), 32100, overrides)
