"""Gated cross-attention from text to pictures, put in front of a language model's layers.

Alayrac et al., "Flamingo" (arXiv 2204.14198, section 3.2, figure 4). State-dict keys are
OpenFlamingo's.

``x ← x + tanh(g₁)·Attn(LN(x), media)``, then ``x ← x + tanh(g₂)·FF(x)``. Both gates are 0 at the
start, where the block passes x on unchanged, to the bit. A text row attends to the latents of its
own picture only (or of all up to it) by :meth:`mmkern.layout.RowIntervals.media`: no mask tensor,
and tiles of other pictures are skipped. A row before the first picture has no key: its attention
is 0 and changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmkern.layout import RowIntervals
from mmkern.nn.resampler import feed_forward, heads
from mmkern.ops import attention

__all__ = ["GatedCrossAttentionBlock", "MediaCrossAttention", "image_of_token"]


def image_of_token(ids: Tensor, token: int) -> Tensor:
    """int64 [B, T]: the picture, counted from 1, that each position belongs to; 0 before the first.

    A picture's segment begins with its token: ``t_i = Σ_{j ≤ i} [ids_j = token]``.
    """
    return (ids == token).cumsum(1)


class MediaCrossAttention(nn.Module):
    """Multi-head cross-attention of text [B, T, D] to media [B, L, C]; linear layers without bias.

    Args:
        width: D.
        media_width: C.
        heads, head_width: of the attention.
    """

    def __init__(self, width: int, media_width: int, heads: int = 8, head_width: int = 64) -> None:
        super().__init__()
        inner = heads * head_width
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(media_width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def keys_values(self, media: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, N·n, E] of media [M, n, C].

        Args:
            media: latents of M pictures.
            index: int64 [B, N], which of them is the n-th of a sample; negative where there is
                none (what stands there is never attended to). Several samples may show one picture:
                it is projected once.
        """
        found = self.to_kv(media)
        if index is not None:
            if not len(found):  # no picture at all
                found = found.new_zeros(*index.shape, *found.shape[1:]) + found.sum()
            else:
                found = found[index.clamp(min=0)]  # [B, N, n, 2·H·E]
            found = found.flatten(1, 2)
        keys, values = found.chunk(2, -1)
        return heads(keys, self.heads), heads(values, self.heads)

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: RowIntervals | None = None,
        kv_row: Tensor | None = None,
    ) -> Tensor:
        """``x`` [B, T, D] attends to ``keys``, ``values`` [Bk, H, L, E]; [B, T, D]."""
        query = heads(self.to_q(self.norm(x)), self.heads)
        out = attention(query, keys, values, mask, kv_row=kv_row)
        return self.to_out(out.transpose(1, 2).flatten(2))


class GatedCrossAttentionBlock(nn.Module):
    """Cross-attention to media and a feed-forward network, each behind a tanh gate.

    Args:
        width: of the language model's hidden states.
        media_width: of the latents.
        heads, head_width: of the cross-attention.
        mult: inner width of the feed-forward network, times `width`.
    """

    def __init__(
        self,
        width: int,
        media_width: int,
        *,
        heads: int = 8,
        head_width: int = 64,
        mult: int = 4,
    ) -> None:
        super().__init__()
        self.attn = MediaCrossAttention(width, media_width, heads, head_width)
        self.attn_gate = nn.Parameter(torch.empty(1))
        self.ff = feed_forward(width, mult)
        self.ff_gate = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gates 0: the language model is what it was."""
        nn.init.zeros_(self.attn_gate)
        nn.init.zeros_(self.ff_gate)

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: RowIntervals | None = None,
        kv_row: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] to the same shape and dtype.

        Args:
            x: hidden states in front of a decoder layer.
            keys, values: of ``self.attn.keys_values``.
            mask: T rows, L keys (``RowIntervals.media``); None: every row sees every key.
            kv_row: int64 [B], which row of keys and values each sample reads.
        """
        # Outside autocast: the residual stream keeps the language model's dtype.
        x = _gated(x, self.attn(x, keys, values, mask, kv_row), self.attn_gate)
        return _gated(x, self.ff(x), self.ff_gate)


def _gated(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """``x + tanh(gate)·branch`` in one pass, in x's dtype."""
    return torch.addcmul(x, branch.to(x.dtype), gate.tanh().to(x.dtype))
