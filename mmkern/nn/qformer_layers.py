"""The Q-Former's sublayers: BERT's, with cross-attention for the queries.

Devlin et al., "BERT" (arXiv 1810.04805); the second feed-forward network and the cross-attention
are BLIP-2's (arXiv 2301.12597, figure 2). State-dict keys are transformers'.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmkern.layout import RowIntervals
from mmkern.ops import attention

__all__ = ["ACTIVATIONS", "Embedding", "Encoder", "Layer", "Linear", "TextEmbeddings"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class Linear(nn.Linear):
    """A linear layer with BERT's initialisation: weight N(0, std), bias 0."""

    def __init__(self, inputs: int, outputs: int, std: float = 0.02) -> None:
        self.std = std
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """A table with BERT's initialisation: N(0, std), the padding row 0."""

    def __init__(self, rows: int, width: int, padding: int | None = None, std: float = 0.02):
        self.std = std
        super().__init__(rows, width, padding_idx=padding)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        self._fill_padding_idx_with_zero()


class TextEmbeddings(nn.Module):
    """Word plus position embeddings, without the norm that queries and text share.

    Positions count from 0 in every call, so two texts in one sequence are two calls.

    Args:
        vocab_size, hidden_size, max_position_embeddings, pad_token_id, initializer_range: as in
            transformers' ``Blip2QFormerConfig``.
        layer_norm_eps: given, the module also holds the shared norm, as InstructBLIP's keys have it
            (``layernorm``); it is not applied here.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        max_position_embeddings: int = 512,
        *,
        pad_token_id: int | None = 0,
        initializer_range: float = 0.02,
        layer_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        std = initializer_range
        self.word_embeddings = Embedding(vocab_size, hidden_size, pad_token_id, std)
        self.position_embeddings = Embedding(max_position_embeddings, hidden_size, std=std)
        if layer_norm_eps is not None:
            self.layernorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Integer ids [B, T] to [B, T, D].

        Raises ValueError for another shape or dtype and for more columns than positions; on a CPU
        also for ids outside the vocabulary.
        """
        positions = self.position_embeddings.weight
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ValueError(
                "TextEmbeddings: input_ids must be integers [batch, length], got "
                f"{input_ids.dtype} {list(input_ids.shape)}"
            )
        if input_ids.shape[1] > positions.shape[0]:
            raise ValueError(
                f"TextEmbeddings: input_ids may have at most {positions.shape[0]} columns (the "
                f"positions), got {input_ids.shape[1]}"
            )
        vocabulary = self.word_embeddings.num_embeddings
        on_host = input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host and input_ids.numel():
            low, high = (int(bound) for bound in input_ids.aminmax())
            if low < 0 or high >= vocabulary:
                raise ValueError(
                    f"TextEmbeddings: input_ids must lie in [0, {vocabulary}), got {low} to {high}"
                )
        return self.word_embeddings(input_ids) + positions[: input_ids.shape[1]]


class Projections(nn.Module):
    """The query, key and value layers of an attention."""

    def __init__(self, width: int, source: int, std: float) -> None:
        super().__init__()
        self.query = Linear(width, width, std)
        self.key = Linear(source, width, std)
        self.value = Linear(source, width, std)


class Intermediate(nn.Module):
    """The first half of a feed-forward network."""

    def __init__(self, width: int, inner: int, activation: str, std: float) -> None:
        super().__init__()
        self.dense = Linear(width, inner, std)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dense(x))


class Output(nn.Module):
    """``LayerNorm(residual + dropout(dense(x)))``, the end of every sublayer."""

    def __init__(self, inputs: int, width: int, eps: float, dropout: float, std: float) -> None:
        super().__init__()
        self.dense = Linear(inputs, width, std)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(x)))


class Attention(nn.Module):
    """Self-attention, or cross-attention to `source` wide tokens, with its output sublayer."""

    def __init__(
        self,
        width: int,
        source: int,
        heads: int,
        eps: float,
        dropout: float,
        attention_dropout: float,
        std: float,
    ) -> None:
        super().__init__()
        self.heads, self.attention_dropout = heads, attention_dropout
        self.attention = Projections(width, source, std)
        self.output = Output(width, width, eps, dropout, std)

    def split(self, x: Tensor) -> Tensor:
        """[B, L, D] to a view [B, H, L, E]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: RowIntervals | None,
        kv_row: Tensor | None = None,
    ) -> Tensor:
        """``x`` [B, Lq, D] attends to ``keys``, ``values`` [Bk, H, Lk, E]."""
        dropout = self.attention_dropout if self.training else 0.0
        query = self.split(self.attention.query(x))
        out = attention(query, keys, values, mask, kv_row=kv_row, dropout_p=dropout)
        return self.output(out.transpose(1, 2).flatten(2), x)


class Layer(nn.Module):
    """Shared self-attention; then for query rows cross-attention (in some layers) and their own
    feed-forward network, for text rows another one."""

    def __init__(
        self,
        width: int,
        heads: int,
        inner: int,
        image_width: int | None,
        text: bool,
        activation: str,
        eps: float,
        dropout: float,
        attention_dropout: float,
        std: float,
    ) -> None:
        super().__init__()
        rest = (heads, eps, dropout, attention_dropout, std)
        self.attention = Attention(width, width, *rest)
        if image_width is not None:
            self.crossattention = Attention(width, image_width, *rest)
        if text:
            self.intermediate = Intermediate(width, inner, activation, std)
            self.output = Output(inner, width, eps, dropout, std)
        self.intermediate_query = Intermediate(width, inner, activation, std)
        self.output_query = Output(inner, width, eps, dropout, std)

    def forward(
        self,
        x: Tensor,
        queries: int,
        mask: RowIntervals | None,
        image: tuple[Tensor, Tensor] | None,
        image_mask: RowIntervals | None,
        kv_row: Tensor | None,
        text_rows: Tensor | int | None = None,
    ) -> Tensor:
        """[B, Q + T, D] to the same, or to the query rows and the text rows in ``text_rows``."""
        own = self.attention
        keys, values = own.split(own.attention.key(x)), own.split(own.attention.value(x))
        if text_rows is not None:
            x, mask = _select(x, queries, mask, text_rows)
        x = own(x, keys, values, mask)
        parts = []
        if queries:
            rows = x[:, :queries]
            if image is not None:
                rows = self.crossattention(rows, *image, image_mask, kv_row)
            parts.append(self.output_query(self.intermediate_query(rows), rows))
        if x.shape[1] > queries:
            rows = x[:, queries:]
            parts.append(self.output(self.intermediate(rows), rows))
        elif text_rows is not None and torch.is_grad_enabled():
            # Rows that were computed and thrown away would leave gradients of 0. Without this they
            # would be None, which DistributedDataParallel refuses.
            unused = [*self.intermediate.parameters(), *self.output.parameters()]
            parts[0] = parts[0] + 0 * torch.stack([p.sum() for p in unused]).sum().to(x.dtype)
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _select(
    x: Tensor, queries: int, mask: RowIntervals | None, text_rows: Tensor | int
) -> tuple[Tensor, RowIntervals | None]:
    """The query rows and some text rows of a sequence and of its mask."""
    if isinstance(text_rows, int):
        stop = queries + text_rows
        return x[:, :stop], mask and RowIntervals(mask.intervals[:, :stop], mask.keys)
    rows = torch.cat([torch.arange(queries, device=x.device), queries + text_rows])
    if mask is not None:
        mask = RowIntervals(mask.intervals.index_select(1, rows), mask.keys)
    return x.index_select(1, rows), mask


class Encoder(nn.Module):
    """The layers; a module of its own only for the keys."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)
