"""What multimodal systems need around a language model of transformers.

An image takes a fixed number of positions, held in ``input_ids`` by a placeholder id; its features
replace the placeholders' embeddings by index. The loss costs what its labelled rows cost.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from mmkern.ops import linear_cross_entropy

__all__ = [
    "GenerationOutput",
    "LanguageLoss",
    "check_placeholders",
    "insert_images",
    "place_images",
    "positions",
]


@dataclass
class GenerationOutput(ModelOutput):
    """What the ``forward`` of a model with a language model returns.

    ``loss`` is a scalar, None without labels. ``logits`` [B, T, V] (the decoder's T for a T5) and
    ``language_model_outputs``, all that transformers' model returned, are None unless asked for.
    ``image_features`` [B, Q, H] are what stands in the placeholders' positions, None without
    images.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    image_features: Tensor | None = None
    language_model_outputs: Any = None


def check_placeholders(where: str, ids: Tensor, token: int, expected: int) -> None:
    """Raise ValueError, naming the sample, unless each row of ids holds `token` `expected` times.

    Looks at the ids, so call it on a CPU: elsewhere it would wait for the device. Collators call it
    before a batch leaves.
    """
    found = (ids == token).sum(1)
    wrong = (found != expected).nonzero().flatten()
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(
            f"{where}: sample {i} has {int(found[i])} image tokens (id {token}) in input_ids, "
            f"expected {expected}"
        )


def insert_images(embeddings: Tensor, ids: Tensor, token: int, features: Tensor) -> Tensor:
    """Put features [B, Q, H] where ids [B, T] hold `token`, Q times a row, into [B, T, H].

    By index: no mask of the size of the embeddings, no wait for the device. A row with another
    number of placeholders must have been refused before (:func:`check_placeholders`).
    """
    batch, length, width = embeddings.shape
    place = (ids == token).int().argsort(dim=1, descending=True, stable=True)
    place = place[:, : features.shape[1]]
    rows = (place + torch.arange(batch, device=ids.device)[:, None] * length).flatten()
    flat = embeddings.reshape(-1, width)
    return flat.index_copy(0, rows, features.reshape(-1, width)).view_as(embeddings)


def place_images(embeddings: Tensor, ids: Tensor, token: int, features: Tensor) -> Tensor:
    """The same for any number of images a row: features [N, Q, H] in the order of their places.

    The batch must hold `token` N·Q times; who calls it checks that.
    """
    count, width = features.shape[0] * features.shape[1], embeddings.shape[-1]
    rows = (ids == token).flatten().int().argsort(descending=True, stable=True)[:count]
    flat = embeddings.reshape(-1, width)
    return flat.index_copy(0, rows, features.reshape(-1, width)).view_as(embeddings)


def positions(attention_mask: Tensor) -> Tensor:
    """int64 [B, T]: how many attended tokens stand before each, so that pads take no place."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


class LanguageLoss:
    """The loss of a transformers language model that costs what its labelled rows cost.

    The model runs as it is, but its head is shown a row or none; the hidden states that the head
    would have seen go to :func:`mmkern.ops.linear_cross_entropy` with its weight. Whatever a model
    does before its head (OPT's output projection, a T5's scaling) is thus included.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        # The head that was seen to be all there is between hidden states and logits.
        self._linear_head: nn.Module | None = None

    def __call__(
        self,
        model: Any,
        embeddings: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        return_logits: bool | None,
        num_items_in_batch: Tensor | int | None,
        options: dict[str, Any],
    ) -> tuple[Tensor | None, Any]:
        """The loss, None without labels; and the language model's output, None without logits.

        The loss is the mean over labelled positions, or their sum divided by
        ``num_items_in_batch``; 0 with zero gradients where there are none.
        """
        options = {"inputs_embeds": embeddings, "attention_mask": attention_mask, **options}
        if model.config.is_encoder_decoder:
            if labels is not None and options.get("decoder_input_ids") is None:
                shifted = model.prepare_decoder_input_ids_from_labels(labels=labels)
                options["decoder_input_ids"] = shifted
            targets = labels
        else:
            known = inspect.signature(model.forward).parameters
            if attention_mask is not None and "position_ids" in known:
                options.setdefault("position_ids", positions(attention_mask))
            # Row t predicts token t + 1.
            targets = None if labels is None else F.pad(labels[:, 1:], (0, 1), value=-100)
        if targets is None:
            return None, model(**options)
        options.setdefault("use_cache", False)
        if return_logits:
            output = model(**options)
            return _cross_entropy(output.logits, targets, num_items_in_batch), output
        head = model.get_output_embeddings()
        with _head_input(head, rows=int(head is not self._linear_head)) as seen:
            logits = model(**options).logits
        self._check(model, head, seen, logits)
        return self.from_hidden(seen[0], head, targets, num_items_in_batch), None

    def from_hidden(self, hidden: Tensor, head: Any, targets: Tensor, items: Any) -> Tensor:
        """The loss from what the head would see; `items` is ``num_items_in_batch``."""
        reduction = "mean" if items is None else "sum"
        loss = linear_cross_entropy(
            hidden, head.weight, targets, bias=head.bias, reduction=reduction
        )
        return _per_item(loss, items)

    def _check(self, model: Any, head: nn.Module, seen: list[Tensor], logits: Tensor) -> None:
        """Refuse a language model whose logits are not a linear map of its last hidden state.

        Soft capping or scaling behind the head would give another loss. Looks at one row of the
        first batch, bit by bit: it is the same product.
        """
        linear = isinstance(head, nn.Linear) and len(seen) == 1
        if linear and head is not self._linear_head and logits.numel():
            with torch.no_grad():
                expected = head(seen[0][:1, :1]).to(logits.dtype)
            linear = bool(((expected == logits) | (expected.isnan() & logits.isnan())).all())
            self._linear_head = head if linear else None
        if not linear:
            raise NotImplementedError(
                f"{self.name}: the logits of {type(model).__name__} are not a "
                "linear map of its last hidden state, which the loss without logits needs; pass "
                "return_logits=True"
            )


@contextmanager
def _head_input(head: nn.Module, rows: int) -> Iterator[list[Tensor]]:
    """Collects what a head is given; the head itself sees `rows` of it, so logits cost nothing."""
    seen: list[Tensor] = []

    def take(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        seen.append(inputs[0])
        return (inputs[0][:1, :rows],)

    handle = head.register_forward_pre_hook(take)
    try:
        yield seen
    finally:
        handle.remove()


def _cross_entropy(logits: Tensor, targets: Tensor, items: Tensor | int | None) -> Tensor:
    """From logits that exist anyway, in fp32 or better."""
    flat = logits.flatten(0, 1)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    total = F.cross_entropy(flat, targets.flatten(), ignore_index=-100, reduction="sum")
    return _per_item(total, (targets != -100).sum() if items is None else items)


def _per_item(loss: Tensor, items: Tensor | int | None) -> Tensor:
    if items is None:
        return loss
    return loss / (items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1))
