"""Flamingo's loss: a frozen head of which two rows are trained.

Where head and table of embeddings are one, the rows of ``<|endofchunk|>`` and ``<image>`` are
trained in the head too. A gradient of the whole [V, H] matrix for two rows of it would be computed
and thrown away. With V₀ the lower of their ids, the first V₀ rows go through
:func:`mmkern.ops.linear_cross_entropy` as they lie there, and the few others join in the sum:
``log Σ_j e^{s_j} = log(e^{a} + e^{b})``, a and b the log-sum-exps of the two parts, a = ℓ + s_y
from the loss ℓ of the first part at a label y.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mmkern.models.language import LanguageLoss
from mmkern.ops import linear_cross_entropy

__all__ = ["FlamingoLoss", "SpecialTokens"]


class SpecialTokens(NamedTuple):
    """Ids of the tokens that Flamingo adds; the order of ``special_embeddings``."""

    end_of_chunk: int
    image: int

    def check(self, vocabulary: int) -> None:
        """Raise ValueError unless they are two ids of the vocabulary, behind the first."""
        if self.end_of_chunk == self.image or min(self) < 1 or max(self) >= vocabulary:
            raise ValueError(
                f"Flamingo: end_of_chunk_token_id and image_token_id must be two ids from 1 to "
                f"{vocabulary - 1} (the language model has {vocabulary}), got {self.end_of_chunk} "
                f"and {self.image}"
            )


class FlamingoLoss(LanguageLoss):
    """The loss of a :class:`~mmkern.models.flamingo.Flamingo`, by samples' weights if given."""

    def __init__(self, model: Any) -> None:
        super().__init__("Flamingo")
        self.model = model

    def __call__(
        self,
        model: Any,
        embeddings: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        return_logits: bool | None,
        num_items_in_batch: Any,
        options: dict[str, Any],
    ) -> tuple[Tensor | None, Any]:
        """As ``LanguageLoss``; `num_items_in_batch` are the samples' weights [B], or None."""
        if labels is None or not return_logits:
            return super().__call__(
                model, embeddings, attention_mask, labels, False, num_items_in_batch, options
            )
        _, output = super().__call__(model, embeddings, attention_mask, None, None, None, options)
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        logits = output.logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
        )
        return _reduce(losses.view_as(targets), targets, num_items_in_batch), output

    def from_hidden(self, hidden: Tensor, head: Any, targets: Tensor, items: Any) -> Tensor:
        """From what the head would see; `items` are the weights."""
        special = self.model.special
        if not self.model.tied:
            losses = linear_cross_entropy(
                hidden, head.weight, targets, bias=head.bias, reduction="none"
            )
            return _reduce(losses, targets, items)
        return _reduce(
            _losses(hidden, head, targets, special, self.model.special_embeddings), targets, items
        )


def _losses(
    hidden: Tensor, head: Any, targets: Tensor, special: SpecialTokens, rows: Tensor
) -> Tensor:
    """Loss of each position, 0 where ignored."""
    first = min(special)
    weight, bias = head.weight, head.bias
    place = torch.tensor([token - first for token in special], device=weight.device)
    last = weight[first:].index_copy(0, place, rows.to(weight.dtype))
    tail = F.linear(hidden, last.to(hidden.dtype), None if bias is None else bias[first:])
    tail = tail.to(torch.promote_types(tail.dtype, torch.float32))  # [B, T, few]
    in_tail = targets >= first
    # Any label of the first part serves to read its log-sum-exp.
    labels = targets.masked_fill(in_tail, 0)
    known = linear_cross_entropy(
        hidden,
        weight[:first],
        labels,
        bias=None if bias is None else bias[:first],
        reduction="none",
    )
    named = labels.clamp(min=0)
    score = (hidden.to(known.dtype) * weight[named].to(known.dtype)).sum(-1)
    if bias is not None:
        score = score + bias[named]
    total = torch.logaddexp(known, tail.logsumexp(-1) - score)  # less the score of the label
    own = tail.gather(-1, (targets - first).clamp(min=0)[..., None])[..., 0]
    return (total + torch.where(in_tail, score - own, 0.0)).masked_fill(targets == -100, 0.0)


def _reduce(losses: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    if weights is not None:
        return (losses.sum(1) * weights).sum()
    return losses.sum() / (targets != -100).sum().clamp(min=1)
