"""BLIP-2's scores of images and texts: contrast, and matching for the best of them.

Li et al. (arXiv 2301.12597), sections 3.2 and 4.4. The parts and their keys are those of
transformers' ``Blip2ForImageTextRetrieval``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmkern.layout import RowIntervals
from mmkern.models.blip2_base import Blip2Base, Blip2Config
from mmkern.nn.qformer import KeysValues
from mmkern.nn.qformer_layers import TextEmbeddings

__all__ = ["Blip2Retrieval"]


class Blip2Retrieval(Blip2Base):
    """The Q-Former with its text branch, two projections and the head of the matching loss.

    Score a gallery in three steps (no gradients wanted)::

        image = torch.cat([model.encode_image(pixels) for pixels in batches])
        scores = model.itc_scores(model.image_features(image), model.text_features(ids, mask))
        image_to_text, text_to_image = model.rerank(scores, image, ids, mask, k=128)
    """

    _keep_in_fp32_modules_strict = (
        *Blip2Base._keep_in_fp32_modules_strict,
        "word_embeddings",
        "position_embeddings",
        "vision_projection",
        "text_projection",
        "itm_head",
    )

    def __init__(self, config: Blip2Config) -> None:
        super().__init__(config)
        qformer: Any = config.qformer_config
        qformer.use_qformer_text_input = True
        self.build_image_side(config, use_qformer_text_input=True)
        self.embeddings = TextEmbeddings(
            qformer.vocab_size,
            qformer.hidden_size,
            qformer.max_position_embeddings,
            pad_token_id=qformer.pad_token_id,
            initializer_range=qformer.initializer_range,
        )
        self.vision_projection = nn.Linear(qformer.hidden_size, config.image_text_hidden_size)
        self.text_projection = nn.Linear(qformer.hidden_size, config.image_text_hidden_size)
        self.itm_head = nn.Linear(qformer.hidden_size, 2)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def image_features(self, image: Tensor | KeysValues) -> Tensor:
        """:meth:`encode_image`'s tokens to the queries' features, [N, Q, D] of unit norm."""
        hidden = self.qformer(self.query_tokens, image=image)
        return F.normalize(self.vision_projection(hidden), dim=-1)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Ids [M, T] to the first row's features, [M, D] of unit norm."""
        input_ids, lengths = self._text(input_ids, attention_mask)
        mask = RowIntervals.bidirectional(0, input_ids.shape[1], lengths)
        hidden = self.qformer(None, self.embeddings(input_ids), mask, text_rows=1)
        return F.normalize(self.text_projection(hidden[:, 0]), dim=-1)

    @staticmethod
    def itc_scores(image_features: Tensor, text_features: Tensor) -> Tensor:
        """[N, Q, D] and [M, D] to [N, M], the best query's cosine, 1,024 texts at a time."""
        rows = image_features.flatten(0, 1)
        parts = [
            (rows @ part.T).unflatten(0, image_features.shape[:2]).amax(1)
            for part in text_features.split(1024)
        ]
        return torch.cat(parts, 1)

    def itm_logits(
        self,
        image: Tensor | KeysValues,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        kv_row: Tensor | None = None,
    ) -> Tensor:
        """How well text r fits its image: [R, 2], class 1 is a match.

        Args:
            image: :meth:`encode_image`'s tokens of one image for all texts, of one for each, or of
                any number with ``kv_row``; or their keys and values.
            input_ids, attention_mask: [R, T].
            kv_row: int [R], the image of each text.
        """
        input_ids, lengths = self._text(input_ids, attention_mask)
        hidden = self._match(image, self.embeddings(input_ids), lengths, kv_row)
        return self.itm_head(hidden.mean(1))

    @torch.no_grad()
    def rerank(
        self,
        scores: Tensor,
        image: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        k: int = 128,
        contrast_weight: float = 1.0,
        batch_size: int = 128,
    ) -> tuple[Tensor, Tensor]:
        """Score again, by matching, the k best texts of each image and images of each text.

        A pair's final score is its match logit plus ``contrast_weight`` times its contrastive score
        (1: LAVIS's evaluation); pairs outside the k best get -inf. A pair that is among the best of
        both sides is computed once, and an image's keys and values once for all its texts.

        Args:
            scores: [N, M] from :meth:`itc_scores`.
            image: tokens [N, L, W] from :meth:`encode_image`, on any device.
            input_ids, attention_mask: [M, T].
            k: texts of an image, and images of a text, to compute.
            contrast_weight: of the cosine. Negatives are drawn by ``exp(cosine / τ)``, so matching
                learns how much likelier a pair is than contrast alone has it: the weight 1/τ adds
                the two up to the likelihood of the pair (noise-contrastive estimation).
            batch_size: texts in a pass.

        Returns:
            (image_to_text [N, M], text_to_image [N, M]): rank texts by the first along a row,
            images by the second along a column.

        Raises ValueError when ``scores`` is not [N, M] or ``k`` is below 1.
        """
        if scores.shape != (len(image), len(input_ids)):
            raise ValueError(
                f"rerank: scores must be [{len(image)}, {len(input_ids)}], images and texts, got "
                f"{list(scores.shape)}"
            )
        if k < 1:
            raise ValueError(f"rerank: k must be at least 1, got {k}")
        images, texts = scores.shape
        best = [torch.zeros_like(scores, dtype=torch.bool) for _ in range(2)]
        best[0].scatter_(1, scores.topk(min(k, texts), 1).indices, True)
        best[1].scatter_(0, scores.topk(min(k, images), 0).indices, True)
        device = self.temp.device
        final = contrast_weight * scores
        for i in range(images):
            wanted = (best[0][i] | best[1][i]).nonzero()[:, 0]
            if not len(wanted):
                continue
            keys_values = self.qformer.image_keys_values(image[i : i + 1].to(device))
            for part in wanted.split(batch_size):
                part = part.to(input_ids.device)
                mask = None if attention_mask is None else attention_mask[part].to(device)
                logits = self.itm_logits(keys_values, input_ids[part].to(device), mask)
                final[i, part.to(final.device)] += logits[:, 1].to(final)
        image_to_text, text_to_image = (final.masked_fill(~chosen, -torch.inf) for chosen in best)
        return image_to_text, text_to_image

    def _match(
        self, image: Tensor | KeysValues, words: Tensor, lengths: Tensor, kv_row: Tensor | None
    ) -> Tensor:
        """The query rows [R, Q, D] of one bidirectional pass over texts' embeddings [R, T, D]."""
        mask = RowIntervals.bidirectional(self.query_tokens.shape[1], words.shape[1], lengths)
        return self.qformer(self.query_tokens, words, mask, image, kv_row=kv_row, text_rows=0)

    def _text(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ids and their lengths; on a CPU, where looking is free, columns of padding are cut."""
        rows, columns = input_ids.shape if input_ids.dim() == 2 else (-1, -1)
        if columns < 1:
            raise ValueError(
                f"{type(self).__name__}: input_ids must be [batch, length], length at least 1, got "
                f"{list(input_ids.shape)}"
            )
        if attention_mask is None:
            lengths = torch.full((rows,), columns, device=input_ids.device)
            return input_ids, lengths
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"{type(self).__name__}: attention_mask must be {list(input_ids.shape)}, got "
                f"{list(attention_mask.shape)}"
            )
        filled = attention_mask != 0
        lengths = filled.sum(1)
        if input_ids.device.type == "cpu" and rows and not torch.compiler.is_compiling():
            gap = (filled[:, 1:] & ~filled[:, :-1]).any(1) | ~filled[:, 0]
            if gap.any():
                raise ValueError(
                    f"{type(self).__name__}: attention_mask must be ones, at least one, and then "
                    f"zeros; row {int(gap.int().argmax())} is not"
                )
            input_ids = input_ids[:, : int(lengths.max())]
        return input_ids, lengths
