"""BLIP-2's second stage: query outputs, projected, in front of a frozen language model.

Li et al., "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large
Language Models" (arXiv 2301.12597), section 3.2 and figure 3. The language model is any causal one
or a T5 of transformers. State-dict keys are those of transformers'
``Blip2ForConditionalGeneration``: its folders load and ours load there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import OPTConfig, PretrainedConfig, T5Config

from mmkern.models.blip2_base import Blip2Config
from mmkern.models.blip2_language import LanguageSide
from mmkern.models.language import GenerationOutput

__all__ = [
    "Blip2ForConditionalGeneration",
    "GenerationOutput",
    "blip2_flan_t5_xl",
    "blip2_flan_t5_xxl",
    "blip2_opt_2_7b",
    "blip2_opt_6_7b",
]


class Blip2ForConditionalGeneration(LanguageSide):
    """Image encoder, Q-Former without text, projection, language model.

    ``input_ids`` hold ``config.image_token_index`` ``config.num_query_tokens`` times a sample,
    anywhere, as transformers' processor and our collators write it (first); the id may lie outside
    the language model's vocabulary.

    The loss is the language-modelling loss of a causal model (position t predicts t + 1) or a T5's
    (labels are the decoder's targets), through :func:`mmkern.ops.linear_cross_entropy`: only
    labelled rows meet the head, and a frozen head gets no weight gradient.

    ``language_model`` is used as it is, and its configuration with it; without one, transformers'
    model of ``config.text_config`` is built with random weights.
    """

    def __init__(self, config: Blip2Config, language_model: Any = None) -> None:
        super().__init__(config)
        self.build_image_side(config)
        self.build_language_side(config, language_model)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
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
            pixel_values: [B, 3, S, S]; None for a batch of plain text.
            input_ids: [B, T]. Text may stand after pads: [image][pads][text] is a text after an
                image, pads taking no position.
            attention_mask: [B, T], 0 at pads; None: all attended.
            labels: [B, T] for a causal model, [B, T'] for a T5; -100 is ignored.
            decoder_input_ids, decoder_attention_mask: a T5's; by default from the labels.
            return_logits: None: only without labels. With True the loss is computed from them.
            num_items_in_batch: divides the sum of the labelled positions' losses; None: their
                number in this batch. (Trainer gives that of all accumulated batches.)
            language_model_options: for the language model, such as ``output_hidden_states``.

        Raises:
            ValueError: sizes that do not fit; on a CPU also, naming the sample, another number of
                image tokens than the image needs, and ids outside the vocabulary. Elsewhere wrong
                numbers of image tokens are a device-side assertion.
            NotImplementedError: a loss without logits of a language model that does more behind its
                head than a bias.
        """
        features = None if pixel_values is None else self.image_features(pixel_values)
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

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, S, S] to what the language model reads of the image, [B, Q, H]."""
        if not len(pixel_values):
            return self.no_features()
        return self.project(self.qformer(self.query_tokens, image=self.encode_image(pixel_values)))

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """transformers' ``generate``: beams, sampling, lengths and penalties are ``options``.

        Without ``input_ids`` the prompt is the image and the language model's first token. A causal
        model returns the prompt and what follows, a T5 what its decoder says. Say
        ``max_new_tokens`` and ``min_new_tokens``: ``max_length`` counts a prompt with its image
        tokens. The paper's captions take ``num_beams=5, length_penalty=-1``, with ``max_new_tokens=
        30, min_new_tokens=8`` on COCO; answers to questions ``max_new_tokens=10``.
        """
        if input_ids is None:
            if pixel_values is None:
                raise ValueError(f"{self._name}.generate: give pixel_values, input_ids or both")
            input_ids = self.default_prompt(len(pixel_values), pixel_values.device)
        features = None if pixel_values is None else self.image_features(pixel_values)
        return self.generate_text(input_ids, attention_mask, features, options)


def flan_t5(size: str) -> T5Config:
    """Flan-T5 "xl" or "xxl" as LAVIS runs it: an exact GELU, and a beginning of texts."""
    sizes = {
        "xl": {"d_model": 2048, "d_ff": 5120, "num_heads": 32},
        "xxl": {"d_model": 4096, "d_ff": 10240, "num_heads": 64},
    }
    return T5Config(
        **sizes[size],
        d_kv=64,
        num_layers=24,
        num_decoder_layers=24,
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
        dense_act_fn="gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        bos_token_id=1,
    )


def _opt(hidden_size: int, ffn_dim: int) -> OPTConfig:
    # LAVIS ends a caption with a line feed, id 50118.
    return OPTConfig(
        hidden_size=hidden_size,
        ffn_dim=ffn_dim,
        word_embed_proj_dim=hidden_size,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=50304,
        eos_token_id=50118,
    )


def _published(text: PretrainedConfig, image_token: int, overrides: dict[str, Any]) -> Any:
    fields: dict[str, Any] = {
        "vision_config": {"initializer_range": 0.02},
        "vision_norm_eps": 1e-5,
        "text_config": text,
        "image_token_index": image_token,
    }
    return Blip2ForConditionalGeneration(Blip2Config(**{**fields, **overrides}))


def blip2_opt_2_7b(**overrides: Any) -> Blip2ForConditionalGeneration:
    """ViT-g and OPT-2.7B, random weights; ``overrides`` are fields of :class:`Blip2Config`."""
    return _published(_opt(2560, 10240), 50265, overrides)


def blip2_opt_6_7b(**overrides: Any) -> Blip2ForConditionalGeneration:
    """ViT-g and OPT-6.7B, random weights; ``overrides`` are fields of :class:`Blip2Config`."""
    return _published(_opt(4096, 16384), 50265, overrides)


def blip2_flan_t5_xl(**overrides: Any) -> Blip2ForConditionalGeneration:
    """ViT-g and Flan-T5 XL, random weights; ``overrides`` are fields of :class:`Blip2Config`."""
    return _published(flan_t5("xl"), 32100, overrides)


def blip2_flan_t5_xxl(**overrides: Any) -> Blip2ForConditionalGeneration:
    """ViT-g and Flan-T5 XXL, random weights; ``overrides`` are fields of :class:`Blip2Config`."""
    return _published(flan_t5("xxl"), 32100, overrides)
