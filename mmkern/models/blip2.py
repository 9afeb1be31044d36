"""BLIP-2, stage 1: a Q-Former learns to read a frozen image encoder, with three losses.

Li et al., "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large
Language Models" (arXiv 2301.12597), section 3.2. State-dict keys are those of transformers'
``Blip2ForImageTextRetrieval``; what it has no counterpart of, the head of the generation loss and
the temperature, is ``cls.predictions.*`` and ``temp``, as in LAVIS without ``Qformer.``.
Checkpoints of LAVIS: :mod:`mmkern.models.blip2_checkpoints`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from transformers.utils import ModelOutput

from mmkern.layout import RowIntervals
from mmkern.models import blip2_checkpoints as checkpoints
from mmkern.models.blip2_base import Blip2Config, ClipVisionConfig, ClipVisionModel, vision_tower
from mmkern.models.blip2_ranks import Ranks
from mmkern.models.blip2_retrieval import Blip2Retrieval
from mmkern.nn.qformer import KeysValues
from mmkern.nn.qformer_layers import ACTIVATIONS, Linear
from mmkern.ops import linear_cross_entropy, query_info_nce

__all__ = [
    "Blip2Config",
    "Blip2ForPretraining",
    "Blip2PretrainingOutput",
    "ClipVisionConfig",
    "ClipVisionModel",
    "blip2_vit_g",
    "blip2_vit_l",
    "vision_tower",
]

SMOOTHING = 0.1  # of the contrastive and the generation loss
TEMPERATURES = (0.001, 0.5)  # what `clamp_logit_scale_` holds τ in, BLIP's range


@dataclass
class Blip2PretrainingOutput(ModelOutput):
    """What :meth:`Blip2ForPretraining.forward` returns.

    ``loss`` is the sum of the other three. Features are of unit norm: [B, Q, D] of the images and
    [B, D] of the texts. ``itm_logits`` [3B, 2] belong to the pairs, then to each text with a
    negative image, then to each image with a negative text; class 1 is a match. The negatives are
    int64 [B], indices in the batch of all ranks, -1 where there is none.
    """

    loss: Tensor | None = None
    loss_itc: Tensor | None = None
    loss_itm: Tensor | None = None
    loss_itg: Tensor | None = None
    image_features: Tensor | None = None
    text_features: Tensor | None = None
    itm_logits: Tensor | None = None
    negative_images: Tensor | None = None
    negative_texts: Tensor | None = None


class Transform(nn.Module):
    """``LayerNorm(activation(dense(x)))``."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.dense = Linear(width, width, config.initializer_range)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(self.activation(self.dense(x)))


class Predictions(nn.Module):
    """BERT's head for words. Its last matrix is the table of word embeddings: see ``bias``."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.transform = Transform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)


class Head(nn.Module):
    """A module of its own only for the keys, ``cls.predictions.*``."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.predictions = Predictions(config)


class Blip2ForPretraining(Blip2Retrieval):
    """The image encoder, frozen, and a Q-Former trained by contrast, matching and generation.

    Texts begin with the tokenizer's first token ([CLS]) and end with its last ([SEP]), padded on
    the right. With Z the image's Q queries and t the text's first row, projected and of unit norm:

    - contrast (ITC): ``S_ij = max_q Z_iq·t_j / τ``, cross-entropy in both directions with smoothing
      0.1, by :func:`mmkern.ops.query_info_nce`, over the batches of all ranks.
    - matching (ITM): each pair, each text with a hard negative image and each image with a hard
      negative text, drawn by their similarities; two classes from the mean of the query rows.
    - generation (ITG): the text, its first token replaced by [DEC], word by word after the queries;
      cross-entropy with smoothing 0.1 over the tokens that are no padding.

    The same sums as in LAVIS's ``Blip2Qformer``, in two passes of the Q-Former instead of four:
    contrast and generation share [queries | text | text again], and all passes share the image's
    keys and values, computed once per image. ``config.lavis_gradients`` gives LAVIS's gradients
    (see :class:`Blip2Config`); by default gradients are those of the global loss.
    """

    _keep_in_fp32_modules_strict = (
        *Blip2Retrieval._keep_in_fp32_modules_strict,
        "cls.predictions",
        "temp",
    )

    def __init__(self, config: Blip2Config) -> None:
        super().__init__(config)
        self.cls = Head(config.qformer_config)
        self.temp = nn.Parameter(torch.tensor(float(config.initial_temperature)))
        self.post_init()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "temp"):
            nn.init.constant_(self.temp, self.config.initial_temperature)

    @staticmethod
    def may_miss(key: str) -> bool:
        """transformers' retrieval model has neither the generation head nor a temperature."""
        return key == "temp" or key.startswith("cls.predictions.")

    # ---- stage 1

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
        group: ProcessGroup | None = None,
        negatives_seed: int | Tensor | None = None,
        **unused: Any,
    ) -> Blip2PretrainingOutput:
        """The three losses of a batch of pairs.

        Args:
            pixel_values: [B, 3, S, S].
            input_ids: [B, T], T up to the number of positions.
            attention_mask: [B, T], 1 for tokens and 0 for the padding on their right; None: no
                padding.
            image_ids: integers [B]; pairs with equal ids are positives of each other, and no
                negatives.
            group: the batch is that of all its ranks, which may differ in B and T.
            negatives_seed: for the draw of negatives, equal on all ranks. None: drawn from torch's
                generator of the device (of the group's first rank).

        A text or an image without a negative (a batch of one, equal ids) has none in the matching
        loss: a batch of one trains on its positive pair alone.

        Raises:
            ValueError: numbers of images, texts and ids that differ; text longer than the
                positions; an attention mask of another shape or (looked at on a CPU) with padding
                before a token or a text without one. TypeError: image_ids that are no integers.
        """
        if len(pixel_values) != len(input_ids):
            raise ValueError(
                f"Blip2ForPretraining: pixel_values has {len(pixel_values)} samples and input_ids "
                f"{len(input_ids)}"
            )
        self._check_image_ids(image_ids, len(input_ids))
        texts = self._text(input_ids, attention_mask)
        raw = self.image_tokens(pixel_values)
        return self.losses(raw, *texts, image_ids, group, negatives_seed)

    def losses(
        self,
        raw: Tensor,
        input_ids: Tensor,
        lengths: Tensor,
        image_ids: Tensor | None = None,
        group: ProcessGroup | None = None,
        negatives_seed: int | Tensor | None = None,
    ) -> Blip2PretrainingOutput:
        """:meth:`forward` from the encoder's tokens [B, L, W] before its last norm (of a frozen
        encoder they may be computed ahead) and the texts' lengths [B]; nothing is checked."""
        keys_values = self.qformer.image_keys_values(self.norm_image(raw))
        # One look into the table, whose gradient is as large as the table: words, then [DEC] words.
        decoded = input_ids.clone()
        decoded[:, 0] = self.config.dec_token_id
        words, decoded = self.embeddings(torch.cat([input_ids, decoded])).chunk(2)
        image_rows, text_rows, generated = self._contrast_and_generation(
            keys_values, words, decoded, lengths
        )
        image = F.normalize(self.vision_projection(image_rows), dim=-1)
        text = F.normalize(self.text_projection(text_rows), dim=-1)
        contrast = query_info_nce(
            image,
            text,
            1 / self.temp,
            label_smoothing=SMOOTHING,
            ids=image_ids,
            detach_columns=self.config.lavis_gradients,
            negatives_seed=self._seed(negatives_seed, group),
            group=group,
        )
        ranks = Ranks(group, input_ids)
        loss_itm, logits = self._matching(
            raw,
            keys_values,
            input_ids,
            words,
            lengths,
            contrast.negative_images,
            contrast.negative_texts,
            ranks,
        )
        loss_itg = self._generation(generated, input_ids, lengths, ranks)
        return Blip2PretrainingOutput(
            loss=contrast.loss + loss_itm + loss_itg,
            loss_itc=contrast.loss,
            loss_itm=loss_itm,
            loss_itg=loss_itg,
            image_features=image,
            text_features=text,
            itm_logits=logits,
            negative_images=contrast.negative_images,
            negative_texts=contrast.negative_texts,
        )

    def _contrast_and_generation(
        self, keys_values: KeysValues, words: Tensor, decoded: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One pass [queries | text | text again]: query rows, first text rows, generating rows."""
        text = torch.cat([words, decoded], 1)
        slots, queries = words.shape[1], self.query_tokens.shape[1]
        mask = RowIntervals.stage1(queries, slots, lengths)
        # Of the last layer: the text's first row, and the rows that have a next token.
        wanted = torch.arange(slots - 1, 2 * slots - 1, device=words.device)
        wanted[0] = 0
        hidden = self.qformer(self.query_tokens, text, mask, keys_values, text_rows=wanted)
        return hidden[:, :queries], hidden[:, queries], hidden[:, queries + 1 :]

    def _matching(
        self,
        raw: Tensor,
        keys_values: KeysValues,
        input_ids: Tensor,
        words: Tensor,
        lengths: Tensor,
        negative_images: Tensor | None,
        negative_texts: Tensor | None,
        ranks: Ranks,
    ) -> tuple[Tensor, Tensor]:
        """Loss and logits [3B, 2] of (image, text), (negative image, text), (image, negative)."""
        assert negative_images is not None and negative_texts is not None  # a seed was given
        batch = len(input_ids)
        images, texts = negative_images.clamp(min=0), negative_texts.clamp(min=0)
        own = torch.arange(batch, device=input_ids.device)
        if ranks.world == 1:
            rows = torch.cat([own, own, texts])
            words, lengths = words[rows], lengths[rows]
            kv_row = torch.cat([own, images, own])
        else:
            # The encoder's tokens travel, not the norm's: its gradient is then local.
            others = self.norm_image(ranks.fetch(raw, images))
            keys_values = [
                (torch.cat([k, k2]), torch.cat([v, v2]))
                for (k, v), (k2, v2) in zip(
                    keys_values, self.qformer.image_keys_values(others), strict=True
                )
            ]
            kv_row = torch.cat([own, own + batch, own])
            short = ranks.columns - input_ids.shape[1]
            rows = torch.cat([F.pad(input_ids, (0, short)), lengths[:, None]], 1)
            rows = ranks.fetch(rows, texts)
            words = F.pad(words, (0, 0, 0, short))
            words = torch.cat([words, words, self.embeddings(rows[:, :-1])])
            lengths = torch.cat([lengths, lengths, rows[:, -1]])
        hidden = self._match(keys_values, words, lengths, kv_row)
        missing = torch.cat([negative_images, negative_texts]) < 0
        labels = torch.cat([torch.ones_like(own), torch.where(missing, -100, 0)])
        logits = self.itm_head(hidden.mean(1))
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(wide, labels, reduction="sum")
        return ranks.mean(total, (labels >= 0).sum()), logits

    def _generation(
        self, hidden: Tensor, input_ids: Tensor, lengths: Tensor, ranks: Ranks
    ) -> Tensor:
        """Cross-entropy of each token of the text after the ones before it."""
        place = torch.arange(1, input_ids.shape[1], device=input_ids.device)
        labels = torch.where(place < lengths[:, None], input_ids[:, 1:], -100)
        head, words = self.cls.predictions, self.embeddings.word_embeddings.weight
        total = linear_cross_entropy(
            head.transform(hidden).to(words.dtype),  # under autocast, the operator casts both
            words,
            labels,
            bias=head.bias,
            label_smoothing=SMOOTHING,
            reduction="sum",
        )
        if self.config.lavis_gradients:  # each rank's own mean
            ranks = Ranks(None, input_ids)
        return ranks.mean(total, (labels >= 0).sum())

    def _seed(self, given: int | Tensor | None, group: ProcessGroup | None) -> int | Tensor:
        if given is not None:
            return given
        seed = torch.randint(2**31, (1,), device=self.temp.device)
        if group is not None and dist.get_world_size(group) > 1:
            dist.broadcast(seed, group=group, group_src=0)
        return seed

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        """Hold τ in [0.001, 0.5], as BLIP does; the trainer calls it after each step. (LAVIS leaves
        it free; at or below 0 the loss would turn around.)"""
        self.temp.clamp_(*TEMPERATURES)

    @staticmethod
    def _check_image_ids(image_ids: Tensor | None, batch: int) -> None:
        if image_ids is None:
            return
        if not isinstance(image_ids, Tensor) or image_ids.is_floating_point():
            raise TypeError(
                "Blip2ForPretraining: image_ids must be an integer tensor, got "
                f"{getattr(image_ids, 'dtype', type(image_ids).__name__)}"
            )
        if tuple(image_ids.shape) != (batch,):
            raise ValueError(
                f"Blip2ForPretraining: image_ids must be [{batch}], one for each pair, got "
                f"{list(image_ids.shape)}"
            )

    # ---- checkpoints

    @classmethod
    def from_lavis(
        cls, state: dict[str, Tensor] | str | Path, config: Blip2Config, **options: Any
    ) -> Self:
        """The model of a stage-1 checkpoint of LAVIS, in eval mode.

        ``state`` is a state dict or a ``.pth`` file. LAVIS saves no frozen weights: give the image
        encoder's own file as ``vision=`` (see :func:`mmkern.models.blip2_checkpoints.from_lavis`).

        Raises ValueError with the missing, unexpected and misshapen keys.
        """
        mapped = checkpoints.from_lavis(state, **options)
        with torch.device("meta"):
            model = cls(config)
        checkpoints.check("Blip2ForPretraining.from_lavis", mapped, model.state_dict())
        model.to_empty(device="cpu").load_state_dict(mapped)
        return model.eval()

    def to_lavis(self) -> dict[str, Tensor]:
        """The weights under the keys of LAVIS's ``Blip2Qformer``; copies, in the model's dtype."""
        return checkpoints.to_lavis(self.state_dict())


def _stage1(vision: Any, overrides: dict[str, Any]) -> Blip2ForPretraining:
    fields: dict[str, Any] = {
        "vision_config": vision,
        "qformer_config": {"vocab_size": 30523, "use_qformer_text_input": True},
        "vision_norm_eps": 1e-5,
    }
    return Blip2ForPretraining(Blip2Config(**{**fields, **overrides}))


def blip2_vit_g(**overrides: Any) -> Blip2ForPretraining:
    """Stage 1 on EVA ViT-g at 224 pixels, random weights; ``overrides`` are Blip2Config fields."""
    return _stage1({"initializer_range": 0.02}, overrides)


def blip2_vit_l(**overrides: Any) -> Blip2ForPretraining:
    """Stage 1 on CLIP's ViT-L/14 without its last block, random weights; ``overrides`` are
    Blip2Config fields."""
    return _stage1(ClipVisionConfig(), overrides)
