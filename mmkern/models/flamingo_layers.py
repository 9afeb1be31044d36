"""Gated cross-attention in front of the layers of a transformers language model, as it is.

No code of the language model is edited and no module wrapped, so its state-dict keys, its hooks and
what it records stay: the class of a decoder layer is exchanged, on the instance, for a subclass
that first calls its block (as FSDP2 does). ``__call__`` and not a hook, because the layers of
transformers checkpoint themselves inside ``__call__``: what runs before it is not run again in
backward, when another batch may be under way. The block is checkpointed by itself, its inputs as
arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmkern.layout import RowIntervals
from mmkern.nn.gated_cross_attention import GatedCrossAttentionBlock

__all__ = ["Media", "MediaAttention", "decoder_layers"]

KeysValues = tuple[Tensor, Tensor]


@dataclass
class Media:
    """The pictures of a batch, as the blocks read them.

    Attributes:
        latents: [M, n, C], of all pictures.
        index: int64 [B, N], which of them is the n-th of a sample; -1 where there is none.
        image_of_token: int64 [B, T], see :func:`mmkern.nn.gated_cross_attention.image_of_token`.
            Positions after T belong to the last picture.
        all_previous: text sees all pictures up to its own.
        rows: int64 [R], the sample that each row of the language model's batch belongs to; None:
            rows are samples, or (R = B·copies) copies of a sample side by side, as beams are.
        cached: keys and values by block, kept for the steps of generation; None: not kept.
    """

    latents: Tensor
    index: Tensor
    image_of_token: Tensor
    all_previous: bool = False
    rows: Tensor | None = None
    cached: dict[int, KeysValues] | None = None

    def mask(self, start: int, length: int, batch: int) -> tuple[RowIntervals, Tensor | None]:
        """Of `length` positions from `start` on in a batch of that many rows; and ``kv_row``."""
        samples, known = self.image_of_token.shape
        place = torch.arange(start, start + length, device=self.image_of_token.device)
        images = self.image_of_token[:, place.clamp(max=known - 1)]
        rows = self.rows
        if rows is None and batch != samples:
            every = torch.arange(samples, device=images.device)
            rows = every.repeat_interleave(batch // samples)
        if rows is not None:
            images = images[rows]
        mask = RowIntervals.media(
            images,
            self.latents.shape[1],
            self.index.shape[1],
            all_previous=self.all_previous,
        )
        return mask, rows


@dataclass
class _State:
    """What a call of the language model leaves for its layers; shared by all of them."""

    media: Media | None = None
    mask: RowIntervals | None = None
    kv_row: Tensor | None = None


class _Conditioned:
    """Mixed into a decoder layer's class: the block first, then the layer."""

    def __call__(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
        condition = self.__dict__["_condition"]
        return super().__call__(condition(hidden_states), *arguments, **options)  # type: ignore[misc]


@dataclass
class _Condition:
    """Calls one block with the media of the moment."""

    number: int
    block: GatedCrossAttentionBlock
    owner: MediaAttention

    def __call__(self, x: Tensor) -> Tensor:
        state, owner = self.owner.state, self.owner
        if state.media is None:
            return x
        assert state.mask is not None
        if owner.gradient_checkpointing and owner.training and torch.is_grad_enabled():
            return owner._gradient_checkpointing_func(
                partial(_run, self.block),
                x,
                state.media.latents,
                state.media.index,
                state.mask,
                state.kv_row,
            )
        media, cached = state.media, state.media.cached
        if cached is None:
            found = self.block.attn.keys_values(media.latents, media.index)
        else:
            if self.number not in cached:
                cached[self.number] = self.block.attn.keys_values(media.latents, media.index)
            found = cached[self.number]
        return self.block(x, *found, state.mask, state.kv_row)


def _run(
    block: GatedCrossAttentionBlock,
    x: Tensor,
    latents: Tensor,
    index: Tensor,
    mask: RowIntervals,
    kv_row: Tensor | None,
) -> Tensor:
    return block(x, *block.attn.keys_values(latents, index), mask, kv_row)


class MediaAttention(nn.ModuleList):
    """The blocks of a language model: every n-th of its layers has one in front of it.

    Args:
        language_model: a causal one of transformers; its layers are changed from now on, but act as
            before outside :meth:`reading`.
        every: n; the layers n − 1, 2n − 1, ... (from 0) get a block.
        options: of :class:`~mmkern.nn.gated_cross_attention.GatedCrossAttentionBlock`.

    Raises:
        ValueError: `every` below 1 or above the number of layers, or layers that are conditioned
            already.
    """

    def __init__(self, language_model: Any, every: int, **options: Any) -> None:
        _, layers = decoder_layers(language_model)
        if not 1 <= every <= len(layers):
            raise ValueError(
                f"MediaAttention: every must be 1 to the {len(layers)} layers, got {every}"
            )
        chosen: list[Any] = list(layers)[every - 1 :: every]
        super().__init__(GatedCrossAttentionBlock(**options) for _ in chosen)
        # Set by transformers' gradient_checkpointing_enable.
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Any = partial(checkpoint, use_reentrant=False)
        self.state = _State()
        blocks: list[Any] = list(self)
        for number, (layer, block) in enumerate(zip(chosen, blocks, strict=True)):
            if isinstance(layer, _Conditioned):
                raise ValueError(
                    "MediaAttention: this language model's layers have blocks already; give "
                    "another copy of it"
                )
            kind = type(layer)
            name = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
            layer.__class__ = type(kind.__name__, (_Conditioned, kind), name)
            # Not a submodule of the layer: the blocks are in this list.
            layer.__dict__["_condition"] = _Condition(number, block, self)
        language_model.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, model: nn.Module, arguments: tuple[Any, ...], options: Any) -> None:
        """Which positions this call computes, and what they may see."""
        media = self.state.media
        if media is None:
            return
        given = options.get("inputs_embeds")
        if given is None:
            given = options["input_ids"] if "input_ids" in options else arguments[0]
        cache = options.get("past_key_values")
        start = 0 if cache is None else int(cache.get_seq_length())
        self.state.mask, self.state.kv_row = media.mask(start, given.shape[1], given.shape[0])

    @contextmanager
    def reading(self, media: Media) -> Iterator[None]:
        """Within it, every call of the language model reads these media.

        Raises:
            RuntimeError: within another one.
        """
        if self.state.media is not None:
            raise RuntimeError("MediaAttention: the language model reads other media already")
        self.state.media = media
        try:
            yield
        finally:
            self.state.media = self.state.mask = self.state.kv_row = None


def decoder_layers(language_model: Any) -> tuple[str, nn.ModuleList]:
    """The list of a language model's decoder layers and its name, such as ``model.layers``.

    It is the outermost ``ModuleList`` as long as the configuration says the model is deep.

    Raises:
        ValueError: there is none, or more than one.
    """
    depth = language_model.config.get_text_config(decoder=True).num_hidden_layers
    found = [
        (name, module)
        for name, module in language_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    least = min((name.count(".") for name, _ in found), default=0)
    found = [(name, module) for name, module in found if name.count(".") == least]
    if len(found) != 1:
        raise ValueError(
            f"{type(language_model).__name__}: expected one list of {depth} decoder layers, found "
            f"{[name for name, _ in found]}"
        )
    return found[0]
