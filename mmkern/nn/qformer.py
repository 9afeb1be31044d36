"""The Q-Former: a BERT whose learned queries read an image by cross-attention.

Li et al., "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large
Language Models" (arXiv 2301.12597), section 3.1 and figure 2. Which row may attend to which is a
:class:`~mmkern.layout.RowIntervals`; this module knows no loss and no fixed pass. State-dict keys
are those of transformers' ``Blip2QFormerModel`` or, with its own embeddings, of
``InstructBlipQFormerModel``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmkern.layout import RowIntervals
from mmkern.nn.qformer_layers import ACTIVATIONS, Encoder, Layer, TextEmbeddings

__all__ = ["KeysValues", "QFormer", "TextEmbeddings"]

#: Keys and values [Bi, H, Lk, E] of every layer that has cross-attention, in order.
KeysValues = list[tuple[Tensor, Tensor]]


class QFormer(nn.Module):
    """Queries and text in one transformer; only queries see the image.

    Sizes are named as in transformers' ``Blip2QFormerConfig``. The defaults are BLIP-2's: BERT-base
    with cross-attention in layers 0, 2, ..., 10 to an image encoder of width 1408.

    Args:
        hidden_size: D. ``num_attention_heads`` must divide it.
        hidden_act: "gelu" (exact), "gelu_new" or "relu".
        hidden_dropout_prob, attention_probs_dropout_prob: active in training; the second is applied
            inside :func:`mmkern.ops.attention`.
        cross_attention_frequency: every n-th layer, from layer 0, has cross-attention.
        encoder_hidden_size: width of the image's tokens.
        use_qformer_text_input: whether there are feed-forward networks for text rows (stage 1,
            InstructBLIP). Without them, text raises ValueError (stage 2).
        vocab_size: given, the module holds its own :class:`TextEmbeddings` and takes token ids
            (InstructBLIP's keys, ``embeddings.*``). Without it, it takes text embeddings.
        initializer_range: weights are drawn N(0, this), biases 0.

    A model that has a stage-1 checkpoint loads it; one that starts from BERT copies the text
    networks' weights to the queries' (:meth:`copy_text_to_queries`).
    """

    def __init__(
        self,
        *,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        layer_norm_eps: float = 1e-12,
        cross_attention_frequency: int = 2,
        encoder_hidden_size: int = 1408,
        use_qformer_text_input: bool = False,
        vocab_size: int | None = None,
        max_position_embeddings: int = 512,
        pad_token_id: int | None = 0,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        if num_attention_heads < 1 or hidden_size % num_attention_heads:
            raise ValueError(
                f"QFormer: num_attention_heads must divide hidden_size {hidden_size}, got "
                f"{num_attention_heads}"
            )
        if hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"QFormer: hidden_act must be one of {', '.join(ACTIVATIONS)}, got {hidden_act!r}"
            )
        if num_hidden_layers < 1 or cross_attention_frequency < 1:
            raise ValueError(
                "QFormer: num_hidden_layers and cross_attention_frequency must be at least 1, got "
                f"{num_hidden_layers} and {cross_attention_frequency}"
            )
        if vocab_size is not None and not use_qformer_text_input:
            raise ValueError("QFormer: vocab_size needs use_qformer_text_input=True")
        self.hidden_size, self.encoder_hidden_size = hidden_size, encoder_hidden_size
        self.heads = num_attention_heads
        self.use_qformer_text_input = use_qformer_text_input
        if vocab_size is None:
            self.layernorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        else:
            self.embeddings = TextEmbeddings(
                vocab_size,
                hidden_size,
                max_position_embeddings,
                pad_token_id=pad_token_id,
                initializer_range=initializer_range,
                layer_norm_eps=layer_norm_eps,
            )
        self.dropout = nn.Dropout(hidden_dropout_prob)
        self.encoder = Encoder(
            [
                Layer(
                    hidden_size,
                    num_attention_heads,
                    intermediate_size,
                    None if i % cross_attention_frequency else encoder_hidden_size,
                    use_qformer_text_input,
                    hidden_act,
                    layer_norm_eps,
                    hidden_dropout_prob,
                    attention_probs_dropout_prob,
                    initializer_range,
                )
                for i in range(num_hidden_layers)
            ]
        )
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Any] = partial(
            checkpoint, use_reentrant=False
        )

    @property
    def cross_layers(self) -> list[int]:
        """Indices of the layers with cross-attention."""
        return [i for i, layer in enumerate(self.encoder.layer) if hasattr(layer, "crossattention")]

    def image_keys_values(self, image: Tensor) -> KeysValues:
        """Keys and values of all layers from image tokens [Bi, Lk, encoder_hidden_size].

        One matrix product for all layers, once per distinct image; pass the result to
        :meth:`forward` as ``image``, as often as wanted. No dropout precedes it, so sharing it is
        exact in training too.
        """
        if image.dim() != 3 or image.shape[2] != self.encoder_hidden_size:
            raise ValueError(
                f"QFormer: image must be [images, tokens, {self.encoder_hidden_size}], got "
                f"{list(image.shape)}"
            )
        layers: list[nn.Module] = []
        for i in self.cross_layers:
            source = self.encoder.layer[i].get_submodule("crossattention.attention")
            layers += [source.get_submodule("key"), source.get_submodule("value")]
        # [2·layers·D, encoder_hidden_size]
        weight = torch.cat([layer.get_parameter("weight") for layer in layers])
        bias = torch.cat([layer.get_parameter("bias") for layer in layers])
        parts = F.linear(image.to(weight.dtype), weight, bias)
        parts = parts.unflatten(-1, (len(layers), self.heads, -1)).permute(2, 0, 3, 1, 4)
        every = parts.unbind(0)  # 2·layers views [Bi, H, Lk, E]
        return list(zip(every[::2], every[1::2], strict=True))

    def forward(
        self,
        query_embeds: Tensor | None = None,
        text: Tensor | None = None,
        mask: RowIntervals | None = None,
        image: Tensor | KeysValues | None = None,
        image_mask: RowIntervals | None = None,
        kv_row: Tensor | None = None,
        *,
        text_rows: Tensor | int | None = None,
    ) -> Tensor:
        """Hidden states of the sequence [queries | text].

        Args:
            query_embeds: [B, Q, D], or [1, Q, D] for all samples. None: text alone, and no
                cross-attention.
            text: embeddings [B, T, D] before the norm (:class:`TextEmbeddings`) or, where the
                module has its own table, token ids [B, T].
            mask: which rows of the Q + T see which keys of the Q + T; None: all see all.
            image: tokens [B, Lk, encoder_hidden_size], or what :meth:`image_keys_values` gave.
                Needed where there are queries.
            image_mask: which of the Lk image tokens each of the Q rows sees; None: all.
            kv_row: int [B], the image each sample reads; without it sample b reads image b, and a
                lone image serves all.
            text_rows: which text rows are wanted, as their number from the first or as int64
                indices [n]; None: all. The last layer does not compute the others. Gradients are
                those of computing and discarding them; with 0 those of the last text network are 0.

        Returns:
            [B, Q + T, D], or [B, Q + n, D] with ``text_rows``.

        Raises:
            ValueError: nothing given, text without a text branch, queries without an image, or
                sizes that do not fit each other. TypeError: ids where embeddings are taken.
        """
        x, queries = self._embed(query_embeds, text, mask, image, kv_row)
        keys_values: KeysValues = []
        if queries:
            assert image is not None
            keys_values = self.image_keys_values(image) if isinstance(image, Tensor) else image
            images, _, tokens, _ = keys_values[0][0].shape
            if kv_row is None and images == 1 and x.shape[0] > 1:
                kv_row = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)
            if len(keys_values) != len(self.cross_layers):
                raise ValueError(
                    f"QFormer: image must hold keys and values of {len(self.cross_layers)} layers, "
                    f"got {len(keys_values)}"
                )
            _check_mask("image_mask", image_mask, x.shape[0], queries, tokens)
            if kv_row is None and images != x.shape[0]:
                raise ValueError(
                    f"QFormer: image has {images} images for {x.shape[0]} samples; give kv_row"
                )
        _check_mask("mask", mask, x.shape[0], x.shape[1], x.shape[1])
        remaining = iter(keys_values)
        last = len(self.encoder.layer) - 1
        for i, layer in enumerate(self.encoder.layer):
            own = next(remaining) if queries and hasattr(layer, "crossattention") else None
            rows = text_rows if i == last and x.shape[1] > queries else None
            arguments = (x, queries, mask, own, image_mask, kv_row, rows)
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, *arguments)
            else:
                x = layer(*arguments)
        return x

    def _embed(
        self,
        query_embeds: Tensor | None,
        text: Tensor | None,
        mask: RowIntervals | None,
        image: Tensor | KeysValues | None,
        kv_row: Tensor | None,
    ) -> tuple[Tensor, int]:
        """[B, Q + T, D] after norm and dropout, and Q."""
        if query_embeds is None and text is None:
            raise ValueError("QFormer: give query_embeds, text or both")
        if query_embeds is not None and image is None:
            raise ValueError("QFormer: query_embeds need image (tokens, or keys and values)")
        norm = self.embeddings.layernorm if hasattr(self, "embeddings") else self.layernorm
        parts = []
        if text is not None:
            text = self._text(text)
            parts.append(norm(text.to(norm.weight.dtype)))
        if query_embeds is not None:
            if query_embeds.dim() != 3 or query_embeds.shape[2] != self.hidden_size:
                raise ValueError(
                    f"QFormer: query_embeds must be [B or 1, Q, {self.hidden_size}], got "
                    f"{list(query_embeds.shape)}"
                )
            if text is not None:
                batch = text.shape[0]
            elif kv_row is not None:
                batch = kv_row.shape[0]
            elif query_embeds.shape[0] > 1:
                batch = query_embeds.shape[0]
            else:
                assert image is not None
                batch = (image if isinstance(image, Tensor) else image[0][0]).shape[0]
                batch = max(batch, mask.batch if mask is not None else 1)
            if query_embeds.shape[0] not in (1, batch):
                raise ValueError(
                    f"QFormer: query_embeds has {query_embeds.shape[0]} samples, expected 1 or "
                    f"{batch}"
                )
            if kv_row is not None and tuple(kv_row.shape) != (batch,):
                raise ValueError(
                    f"QFormer: kv_row must be [{batch}], one image a sample, got "
                    f"{list(kv_row.shape)}"
                )
            # One norm for all samples where they share the queries.
            rows = norm(query_embeds.to(norm.weight.dtype)).expand(batch, -1, -1)
            parts.insert(0, rows)
        queries = 0 if query_embeds is None else query_embeds.shape[1]
        return self.dropout(torch.cat(parts, 1) if len(parts) > 1 else parts[0]), queries

    def _text(self, text: Tensor) -> Tensor:
        if not self.use_qformer_text_input:
            raise ValueError("QFormer: text needs a text branch (use_qformer_text_input=True)")
        if not text.is_floating_point():
            if not hasattr(self, "embeddings"):
                raise TypeError(
                    "QFormer: text must be embeddings [B, T, D]; token ids need a vocab_size"
                )
            return self.embeddings(text)
        if text.dim() != 3 or text.shape[2] != self.hidden_size:
            raise ValueError(
                f"QFormer: text must be [B, T, {self.hidden_size}], got {list(text.shape)}"
            )
        return text

    @torch.no_grad()
    def copy_text_to_queries(self) -> None:
        """Start the queries' feed-forward networks at the text's, as stage 1 does after BERT's
        weights were loaded."""
        if not self.use_qformer_text_input:
            raise ValueError("QFormer.copy_text_to_queries: there is no text branch to copy")
        for layer in self.encoder.layer:
            for part in ("intermediate", "output"):
                text = layer.get_submodule(part)
                layer.get_submodule(f"{part}_query").load_state_dict(text.state_dict())


def _check_mask(name: str, mask: RowIntervals | None, batch: int, queries: int, keys: int) -> None:
    if mask is None:
        return
    if mask.batch not in (1, batch) or mask.queries != queries or mask.keys != keys:
        raise ValueError(
            f"QFormer: {name} must cover {queries} rows and {keys} keys for 1 or {batch} samples, "
            f"got {mask.queries} rows and {mask.keys} keys for {mask.batch}"
        )
