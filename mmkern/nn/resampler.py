"""The perceiver resampler: any number of visual tokens to a fixed number of latents.

Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning" (arXiv 2204.14198, section
3.1 and appendix A.1.1). State-dict keys are OpenFlamingo's.

Every layer reads the same media behind a LayerNorm of its own. The mean and variance do not depend
on the layer, so media are normalised once; scale γ and shift β go into the layer's projection:
``LN(x) Wᵀ = x̂ (W diag γ)ᵀ + W β``, x̂ = (x − mean) / std. Of L layers that saves L − 1 passes over
the media and the L normalised copies that backward would keep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmkern.nn.qformer_layers import ACTIVATIONS
from mmkern.ops import attention

__all__ = ["PerceiverResampler", "feed_forward", "heads"]


class _Activation(nn.Module):
    """A module only for its place in the keys."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.function = ACTIVATIONS[name]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def feed_forward(width: int, mult: int = 4, activation: str = "gelu") -> nn.Sequential:
    """LayerNorm, width to mult·width, activation, and back; no biases. Keys ``0``, ``1``, ``3``."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, mult * width, bias=False),
        _Activation(activation),
        nn.Linear(mult * width, width, bias=False),
    )


def heads(x: Tensor, count: int) -> Tensor:
    """[B, L, H·E] to a view [B, H, L, E]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


class PerceiverAttention(nn.Module):
    """Latents attend to media and to themselves.

    ``O = softmax(Q [K_m | K_l]ᵀ / √E) [V_m | V_l]``, Q, K_l, V_l from LN(latents), K_m, V_m from
    media that are normalised already.
    """

    def __init__(self, width: int, count: int, head_width: int) -> None:
        super().__init__()
        inner = count * head_width
        self.heads = count
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        """Normalised media [B, M, D] without scale and shift, latents [B, n, D] to [B, n, D]."""
        norm, weight = self.norm_media, self.to_kv.weight
        x = self.norm_latents(latents)
        # Folded in the weights' own precision; autocast rounds what comes out, once.
        seen = F.linear(media, weight * norm.weight, (weight * norm.bias).sum(1))
        keys, values = torch.cat([seen, self.to_kv(x)], 1).chunk(2, -1)
        query = heads(self.to_q(x), self.heads)
        out = attention(query, heads(keys, self.heads), heads(values, self.heads))
        return self.to_out(out.transpose(1, 2).flatten(2))


class PerceiverResampler(nn.Module):
    """``latents`` learned queries read visual tokens, in `depth` layers of attention and MLP.

    Args:
        width: of the visual tokens and of what comes out.
        depth: layers.
        latents: how many rows come out.
        heads, head_width: of the attention.
        mult: inner width of the feed-forward network, times `width`.
        activation: "gelu"; "relu" is IDEFICS's.
        frames: most frames of a video, each with a learned embedding; None: no such table.
        media: most pictures of a sample, each with a learned embedding; None: no such table.

    Latents and embeddings are N(0, 1) at the start, the linear layers have torch's initialisation,
    as OpenFlamingo has them.

    Raises:
        ValueError: sizes below 1, an unknown activation.
    """

    def __init__(
        self,
        width: int,
        *,
        depth: int = 6,
        latents: int = 64,
        heads: int = 8,
        head_width: int = 64,
        mult: int = 4,
        activation: str = "gelu",
        frames: int | None = None,
        media: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"width": width, "depth": depth, "latents": latents, "heads": heads}
        sizes |= {"head_width": head_width, "mult": mult}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"PerceiverResampler: {name} must be at least 1, got {value}")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"PerceiverResampler: activation must be one of {sorted(ACTIVATIONS)}, got "
                f"{activation!r}"
            )
        self.latents = nn.Parameter(torch.empty(latents, width))
        self.frame_embs = None if frames is None else nn.Parameter(torch.empty(frames, width))
        self.media_time_embs = None if media is None else nn.Parameter(torch.empty(media, 1, width))
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(width, heads, head_width),
                    feed_forward(width, mult, activation),
                ]
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in (self.latents, self.frame_embs, self.media_time_embs):
            if parameter is not None:
                nn.init.normal_(parameter)

    def forward(self, media: Tensor, places: Tensor | None = None) -> Tensor:
        """Visual tokens to latents.

        Args:
            media: [M, V, D], or [M, F, V, D] for F frames each.
            places: int64 [M], the place of each picture in its sample, from 0; read only where
                there are ``media_time_embs``.

        Returns:
            [M, n, D].

        Raises:
            ValueError: another shape, more frames than embeddings, or no `places` where they are
                needed.
        """
        width = self.latents.shape[1]
        if media.dim() not in (3, 4) or media.shape[-1] != width:
            raise ValueError(
                f"PerceiverResampler: media must be [M, V, {width}] or [M, F, V, {width}], got "
                f"{list(media.shape)}"
            )
        if self.frame_embs is not None:
            media = media[:, None] if media.dim() == 3 else media
            if media.shape[1] > len(self.frame_embs):
                raise ValueError(
                    f"PerceiverResampler: media may have at most {len(self.frame_embs)} frames, "
                    f"got {media.shape[1]}"
                )
            media = media + self.frame_embs[: media.shape[1], None]
        media = media.flatten(1, -2)
        if self.media_time_embs is not None:
            if places is None or places.shape != media.shape[:1]:
                got = None if places is None else list(places.shape)
                raise ValueError(
                    f"PerceiverResampler: places must be [{media.shape[0]}], got {got}"
                )
            media = media + self.media_time_embs[places]
        media = F.layer_norm(media, (width,), eps=self.norm.eps)
        x = self.latents.expand(media.shape[0], -1, -1)
        layer: Any
        for layer in self.layers:
            attend, network = layer
            x = x + attend(media, x)
            x = x + network(x)
        return self.norm(x)
