"""InternLM-XComposer2: CLIP's image tokens, an MLP, and a language model with partial LoRA.

Dong et al., "InternLM-XComposer2" (arXiv 2401.16420) and "InternLM-XComposer2-4KHD" (arXiv
2404.06512). The language model's linear layers have an adapter that acts on image tokens alone, so
text costs and says what it did before. Both stages train by next-token loss; a contrastive loss
beside it, or instead, is an option of ours. Released checkpoints:
:mod:`mmkern.models.xcomposer2_checkpoints`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers.utils import ModelOutput

from mmkern.layout import VisualSpans
from mmkern.models.clip_checkpoints import State, check, raise_for_keys
from mmkern.models.internlm2 import InternLM2ForCausalLM
from mmkern.models.xcomposer2_checkpoints import from_released, to_released
from mmkern.models.xcomposer2_config import XComposer2Config
from mmkern.models.xcomposer2_vision import (
    ContrastiveHead,
    VisionTower,
    check_images,
    mean_rows,
    runs_by_sample,
    tiled_tokens,
)
from mmkern.nn.lora import cast_but_adapters

__all__ = [
    "XComposer2Config",
    "XComposer2ForConditionalGeneration",
    "XComposer2Output",
    "xcomposer2_4khd_7b",
    "xcomposer2_7b",
    "xcomposer2_vl_7b",
]

MAX_LOGIT_SCALE = math.log(100)
Pixels = Tensor | Sequence[Tensor]


@dataclass
class XComposer2Output(ModelOutput):
    """What ``forward`` returns.

    ``loss`` is the weighted sum of ``loss_language`` and ``loss_contrastive``, scalars that are
    None without labels or without weight. ``image_features`` are what stands in the placeholders'
    positions, [rows, W] over all images; ``logits`` [B, L, V] are None unless wanted.
    """

    loss: Tensor | None = None
    loss_language: Tensor | None = None
    loss_contrastive: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    image_features: Tensor | None = None


class XComposer2ForConditionalGeneration(InternLM2ForCausalLM):
    """CLIP's vision transformer, a projector and InternLM2 with partial LoRA.

    ``input_ids`` hold ``config.image_token_index`` once for each token of each image
    (:meth:`XComposer2Config.image_tokens`), as :class:`mmkern.data.InterleavedCollator` writes
    them. Images are given flat, in the order of their places in the batch. ``spans`` are the
    placeholders' rows; the collator builds them once for all layers.

    The text's loss does not depend on the image side; a batch of plain text gives it zero
    gradients, not missing ones, so that other ranks need not wait.
    """

    config_class = XComposer2Config
    base_model_prefix = "model"
    _no_split_modules = ("InternLM2DecoderLayer", "Block")  # type: ignore[assignment]

    def build(self, config: Any) -> None:
        """The image side: ``vit.*``, ``vision_proj.{0,2}.*`` and, for tiles, ``plora_*_GN``."""
        vision, width = config.vision_config, config.hidden_size
        self.vit = VisionTower(vision)
        tokens = vision.hidden_size * (4 if config.hd_num else 1)
        self.vision_proj = nn.Sequential(
            nn.Linear(tokens, width), nn.GELU(), nn.Linear(width, width)
        )
        if config.hd_num:
            # The separator of the two views and the end of a line of tokens, before the projector.
            self.plora_glb_GN = nn.Parameter(torch.zeros(1, 1, tokens))
            self.plora_sub_GN = nn.Parameter(torch.zeros(1, 1, 1, tokens))
        if config.contrastive_weight:
            self.contrast = ContrastiveHead(
                width, config.contrastive_width, config.initial_temperature
            )
            # A sum over pairs of a batch is no sum over tokens: Trainer must not rescale it.
            self.accepts_loss_kwargs = False

    @property
    def language_model(self) -> Self:
        """The model itself: it is its language model with an image side."""
        return self

    @property
    def vision_model(self) -> VisionTower:
        """The image encoder, by the name that it has in other systems."""
        return self.vit

    def cast_language_model(self, dtype: torch.dtype) -> None:
        """Hold a frozen language model in 16 bits; adapters and the image side stay as they are."""
        for part in (self.model, self.output):
            cast_but_adapters(part, dtype)

    def clamp_logit_scale_(self) -> None:
        """Keep the contrastive temperature at 0.01 or above."""
        if self.config.contrastive_weight:
            with torch.no_grad():
                self.contrast.logit_scale.clamp_(max=MAX_LOGIT_SCALE)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        pixel_values: Pixels | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        spans: VisualSpans | Tensor | None = None,
        logits_to_keep: int = 0,
        return_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        group: ProcessGroup | None = None,
        **unused: Any,
    ) -> XComposer2Output:
        """Loss, and logits where they are wanted.

        Args:
            input_ids: [B, L].
            pixel_values: images of the batch, [n, 3, S, S]; with tiles a list of [3, h S, w S].
                None, or none: a batch of text.
            attention_mask: [B, L], 0 at pads.
            labels: [B, L], -100 at placeholders, what the user said, and pads.
            spans: the placeholders' rows; by default found in ``input_ids``.
            group: ranks whose batches count as one in the contrastive loss.

        All else as in :class:`~mmkern.models.internlm2.InternLM2ForCausalLM`.

        Raises:
            ValueError: sizes that do not fit; naming the sample, another number of placeholders
                than its images become, and on a CPU spans that are not the placeholders, labels at
                them, and ids outside the vocabulary.
        """
        features = None
        if input_ids is not None and inputs_embeds is None:
            if past_key_values is not None and past_key_values.get_seq_length() > 0:
                inputs_embeds = self.model.tok_embeddings(input_ids)  # what was generated is text
            else:
                if labels is not None:
                    self._check_labels(input_ids, labels)
                inputs_embeds, features, spans = self._inputs(input_ids, pixel_values, spans)
        if inputs_embeds is None:
            raise ValueError("XComposer2.forward: give input_ids or inputs_embeds")
        spans = VisualSpans.from_mask(spans) if isinstance(spans, Tensor) else spans
        wants_language = labels is not None and self.config.language_weight > 0
        found = super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels if wants_language else None,
            use_cache=use_cache if labels is None else False,
            spans=spans,
            logits_to_keep=logits_to_keep,
            return_logits=labels is None if return_logits is None else return_logits,
            num_items_in_batch=num_items_in_batch,
        )
        output = XComposer2Output(
            loss_language=found.loss,
            logits=found.logits,
            past_key_values=found.past_key_values,
            image_features=features,
        )
        if labels is None:
            return output
        losses = [] if found.loss is None else [self.config.language_weight * found.loss]
        if self.config.contrastive_weight and (features is not None or group is not None):
            assert spans is not None  # of _inputs
            output.loss_contrastive = self._contrast(
                found.hidden_states[0], inputs_embeds, attention_mask, labels, spans, group
            )
            losses.append(self.config.contrastive_weight * output.loss_contrastive)
        if features is None:
            losses.append(self._nothing(image_side_only=found.loss is not None))
        output.loss = torch.stack(losses).sum()
        return output

    def image_features(self, pixel_values: Pixels) -> Tensor:
        """Images to what the language model reads, [rows, W], one image behind the other."""
        if self.config.hd_num:
            newline, separator = self.plora_sub_GN, self.plora_glb_GN
            tokens = tiled_tokens(self.vit, list(pixel_values), separator, newline)
        else:
            tokens = self.vit(pixel_values).flatten(0, 1)
        return self.vision_proj(tokens.to(self.vision_proj[0].weight.dtype))  # type: ignore[arg-type]

    def _counts(self, pixel_values: Pixels | None) -> list[int]:
        """Tokens of each image."""
        if pixel_values is None:
            return []
        for number, image in enumerate(pixel_values):
            if image.dim() != 3 or image.shape[0] != 3 or not image.is_floating_point():
                raise ValueError(
                    f"XComposer2: pixel_values[{number}] must be floating point [3, H, W], got "
                    f"{image.dtype} {list(image.shape)}"
                )
        return [self.config.image_tokens(*image.shape[1:]) for image in pixel_values]

    def _inputs(
        self, input_ids: Tensor, pixel_values: Pixels | None, spans: VisualSpans | Tensor | None
    ) -> tuple[Tensor, Tensor | None, VisualSpans]:
        """Embeddings, the images' features, spans; all is checked before anything is computed."""
        spans = self._placeholders(input_ids, spans)
        check_images(spans, self._counts(pixel_values))
        given = pixel_values is not None and len(pixel_values) > 0
        features = self.image_features(pixel_values) if given else None  # type: ignore[arg-type]
        spans = spans.to(input_ids.device)
        return self.embed(input_ids, features, spans), features, spans

    def _placeholders(self, input_ids: Tensor, spans: VisualSpans | Tensor | None) -> VisualSpans:
        """Spans of the image token; on a CPU they and the other ids are checked."""
        token, vocabulary = self.config.image_token_index, self.config.vocab_size
        visual = input_ids == token
        given = visual if spans is None else spans
        found = VisualSpans.from_mask(given) if isinstance(given, Tensor) else given
        if input_ids.device.type != "cpu" or torch.compiler.is_compiling():
            return found
        if found.shape != tuple(visual.shape) or not torch.equal(found.to_mask(), visual):
            raise ValueError(
                f"XComposer2: spans must be the places of the image token {token} in input_ids"
            )
        ids = input_ids.masked_fill(visual, 0)
        low, high = (int(bound) for bound in ids.aminmax()) if ids.numel() else (0, 0)
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"XComposer2: input_ids must lie in [0, {vocabulary}) or be the image token "
                f"{token}, got {low} to {high}"
            )
        return found

    def embed(
        self,
        input_ids: Tensor,
        features: Tensor | None,
        spans: VisualSpans | Tensor | None = None,
    ) -> Tensor:
        """Embeddings [B, L, W] of the ids, with the images' features [rows, W] in their places.

        Args:
            spans: the placeholders' rows; by default found in the ids.

        Raises:
            ValueError: as many placeholders as rows are needed.
        """
        visual = input_ids == self.config.image_token_index
        if not isinstance(spans, VisualSpans):
            spans = VisualSpans.from_mask(visual if spans is None else spans)
        rows = 0 if features is None else len(features)
        if spans.runs is not None and len(spans.rows) != rows:
            raise ValueError(
                f"XComposer2: input_ids have {len(spans.rows)} image tokens, the features {rows} "
                "rows"
            )
        embeddings = self.model.tok_embeddings(input_ids.masked_fill(visual, 0))
        if features is None:
            return embeddings
        flat = embeddings.reshape(-1, embeddings.shape[-1])
        places = spans.rows[:rows].to(flat.device, torch.int64)
        return flat.index_copy(0, places, features.to(flat.dtype)).view_as(embeddings)

    def _check_labels(self, input_ids: Tensor, labels: Tensor) -> None:
        if input_ids.device.type != "cpu" or torch.compiler.is_compiling():
            return
        if labels.shape == input_ids.shape:
            wrong = ((input_ids == self.config.image_token_index) & (labels != -100)).sum(1)
            if bool(wrong.any()):
                i = int(wrong.nonzero()[0])
                raise ValueError(
                    f"XComposer2: sample {i} has labels at {int(wrong[i])} image tokens, expected "
                    "-100"
                )

    def _nothing(self, image_side_only: bool) -> Tensor:
        """0, on which parameters that the batch does not use depend: other ranks wait for them."""
        trained = [
            p.flatten()[:0].sum().float()
            for name, p in self.named_parameters()
            if p.requires_grad and not (image_side_only and name.startswith(("model.", "output.")))
        ]
        nothing = self.output.weight.new_zeros((), dtype=torch.float32)
        return torch.stack([nothing, *trained]).sum()

    def _contrast(
        self,
        hidden: Tensor,
        embeddings: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        spans: VisualSpans,
        group: ProcessGroup | None,
    ) -> Tensor:
        """InfoNCE of images against their captions, both as the language model's mean states.

        An image's rows stand before its caption, so their states do not know it. The caption is
        read once more, by itself.
        """
        if embeddings.device.type == "cpu":
            images = runs_by_sample(spans)
            if wrong := [i for i, lengths in enumerate(images) if len(lengths) != 1]:
                raise ValueError(
                    f"XComposer2: the contrastive loss needs one image a sample, sample {wrong[0]} "
                    f"has {len(images[wrong[0]])}"
                )
        visual = spans.to_mask()
        kept = ~visual if attention_mask is None else (attention_mask != 0) & ~visual
        language = (p for n, p in self.model.named_parameters() if "Plora_" not in n)
        with torch.set_grad_enabled(any(p.requires_grad for p in language)):
            alone = self.model(embeddings, kept.long())
        return self.contrast(mean_rows(hidden, visual), mean_rows(alone, labels != -100), group)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        pixel_values: Pixels | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        spans: VisualSpans | Tensor | None = None,
        **options: Any,
    ) -> Any:
        """transformers' ``generate``: prompts, padded on the left, and what follows them.

        Say ``max_new_tokens``: ``max_length`` counts the image tokens.
        """
        if input_ids is None:
            raise ValueError("XComposer2.generate: input_ids must be given")
        visual = input_ids == self.config.image_token_index
        embeddings, features, _ = self._inputs(input_ids, pixel_values, spans)
        # A mask, so that transformers repeats it with the prompt for every beam.
        inputs: dict[str, Any] = {} if features is None else {"spans": visual}
        inputs["attention_mask"] = (
            torch.ones_like(input_ids) if attention_mask is None else attention_mask
        )
        # Penalties read the prompt: the placeholder is not for their eyes.
        shown = input_ids.masked_fill(visual, self.config.pad_token_id or 0)
        output = super().generate(shown, inputs_embeds=embeddings, **inputs, **options)
        sequences = output if isinstance(output, Tensor) else output.sequences
        copies = sequences.shape[0] // max(len(input_ids), 1)
        sequences[:, : input_ids.shape[1]] = input_ids.repeat_interleave(copies, 0)
        return output

    @classmethod
    def from_released(cls, source: State | str | Path, config: XComposer2Config) -> Self:
        """The model of a released checkpoint: a state dict, a file, or a folder of its files.

        Raises ValueError with the missing, unexpected and misshapen keys.
        """
        mapped = from_released(source)
        with torch.device("meta"):
            model = cls(config)
        check(f"{cls.__name__}.from_released", mapped, model.state_dict())
        model.load_state_dict(mapped, assign=True)
        return model.eval()

    def to_released(self) -> State:
        """The weights under the released keys; copies."""
        return to_released(self.state_dict())

    @classmethod
    def from_pretrained(cls, *args: Any, strict: bool = True, **kwargs: Any) -> Any:
        """A folder that ``save_pretrained`` wrote; ``strict=False`` fills up what it lacks."""
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if strict:
            tied = {"output.weight"} if model.config.tie_word_embeddings else set()
            missing = set(info["missing_keys"]) - tied
            raise_for_keys(f"{cls.__name__}.from_pretrained", missing, info["unexpected_keys"])
        return (model, info) if with_info else model


def _published(image_size: int, fields: dict[str, Any], overrides: dict[str, Any]) -> Any:
    vision = {"image_size": image_size, "num_hidden_layers": 24}
    rope = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 1.0}
    common = {"vision_config": vision, "rope_parameters": rope}
    return XComposer2ForConditionalGeneration(XComposer2Config(**{**common, **fields, **overrides}))


def xcomposer2_vl_7b(**overrides: Any) -> XComposer2ForConditionalGeneration:
    """490 pixels, 1225 tokens an image; random weights, ``overrides``: configuration fields."""
    return _published(490, {}, overrides)


def xcomposer2_7b(**overrides: Any) -> XComposer2ForConditionalGeneration:
    """For composition: 224 pixels, 256 tokens an image; as :func:`xcomposer2_vl_7b`."""
    return _published(224, {}, overrides)


def xcomposer2_4khd_7b(**overrides: Any) -> XComposer2ForConditionalGeneration:
    """Up to 55 tiles of 336 pixels, 8737 tokens; wqkv's adapter is the released r = 8, s = 2."""
    fields = {
        "hd_num": 55,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "plora_rank_pattern": {"attention.wqkv": 8},
        "plora_alpha_pattern": {"attention.wqkv": 16},
    }
    return _published(336, fields, overrides)
