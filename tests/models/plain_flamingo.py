"""Flamingo written anew, in einsums and dense masks, over a state dict: the tests' reference.

CLIP's tower, resampler, gated blocks and a Llama, each from its paper's formulas; one sample at a
time, no padding, nothing of mmkern.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    patch: int
    vision_layers: int
    vision_heads: int
    resampler_layers: int
    heads: int  # of resampler and blocks
    layers: int
    text_heads: int
    kv_heads: int
    every: int
    image: int
    end: int
    theta: float = 10000.0
    all_previous: bool = False
    ln_post: bool = False
    tied: bool = True


def norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def split(x: Tensor, heads: int) -> Tensor:
    return x.view(len(x), heads, -1)  # [L, H, E]


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """[Lq, H, E], [Lk, H, E] to [Lq, H·E]; rows that may see nothing are 0."""
    scores = torch.einsum("ihe,jhe->hij", q, k) / q.shape[-1] ** 0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("hij,jhe->ihe", weights, v).flatten(1)


def tower(state: State, sizes: Sizes, picture: Tensor) -> Tensor:
    """[3, S, S] to the patches [L, W]."""
    name = "vision_model."
    p = sizes.patch
    grid = picture.unfold(1, p, p).unfold(2, p, p)  # [3, G, G, p, p]
    x = torch.einsum("cijab,wcab->ijw", grid, state[f"{name}conv1.weight"]).flatten(0, 1)
    x = torch.cat([state[f"{name}class_embedding"][None], x])
    x = norm(state, f"{name}ln_pre", x + state[f"{name}positional_embedding"])
    for i in range(sizes.vision_layers):
        block = f"{name}transformer.resblocks.{i}."
        weight, bias = (state[f"{block}attn.in_proj_{part}"] for part in ("weight", "bias"))
        qkv = norm(state, f"{block}ln_1", x) @ weight.T + bias
        mixed = attend(*(split(part, sizes.vision_heads) for part in qkv.chunk(3, -1)))
        out = f"{block}attn.out_proj."
        x = x + mixed @ state[f"{out}weight"].T + state[f"{out}bias"]
        inner = norm(state, f"{block}ln_2", x) @ state[f"{block}mlp.c_fc.weight"].T
        inner = F.gelu(inner + state[f"{block}mlp.c_fc.bias"])
        x = x + inner @ state[f"{block}mlp.c_proj.weight"].T + state[f"{block}mlp.c_proj.bias"]
    return norm(state, f"{name}ln_post", x)[1:] if sizes.ln_post else x[1:]


def network(state: State, name: str, x: Tensor) -> Tensor:
    inner = F.gelu(norm(state, f"{name}.0", x) @ state[f"{name}.1.weight"].T)
    return inner @ state[f"{name}.3.weight"].T


def resample(state: State, sizes: Sizes, media: Tensor) -> Tensor:
    x = state["perceiver.latents"]
    for i in range(sizes.resampler_layers):
        name = f"perceiver.layers.{i}.0"
        latents = norm(state, f"{name}.norm_latents", x)
        seen = torch.cat([norm(state, f"{name}.norm_media", media), latents])
        k, v = (seen @ state[f"{name}.to_kv.weight"].T).chunk(2, -1)
        parts = (latents @ state[f"{name}.to_q.weight"].T, k, v)
        mixed = attend(*(split(part, sizes.heads) for part in parts))
        x = x + mixed @ state[f"{name}.to_out.weight"].T
        x = x + network(state, f"perceiver.layers.{i}.1", x)
    return norm(state, "perceiver.norm", x)


def gated(state: State, sizes: Sizes, j: int, x: Tensor, media: Tensor, ids: Tensor) -> Tensor:
    """Text [T, D], media [N, n, C]."""
    name = f"gated_cross_attn_layers.{j}."
    own = (ids == sizes.image).cumsum(0)[:, None]
    owner = torch.arange(1, len(media) + 1).repeat_interleave(media.shape[1])[None]
    allowed = owner <= own if sizes.all_previous else owner == own
    q = norm(state, f"{name}attn.norm", x) @ state[f"{name}attn.to_q.weight"].T
    k, v = (media.flatten(0, 1) @ state[f"{name}attn.to_kv.weight"].T).chunk(2, -1)
    mixed = attend(*(split(part, sizes.heads) for part in (q, k, v)), allowed)
    x = x + state[f"{name}attn_gate"].tanh() * (mixed @ state[f"{name}attn.to_out.weight"].T)
    return x + state[f"{name}ff_gate"].tanh() * network(state, f"{name}ff", x)


def rms(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    # transformers normalises in fp32, whatever the dtype
    y = x.float()
    return weight * (y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def rotate(x: Tensor, theta: float) -> Tensor:
    """Llama's rotary embedding of [T, H, E]."""
    half = x.shape[-1] // 2
    # transformers computes angles, sines and cosines in fp32
    rate = 1.0 / theta ** (torch.arange(0, 2 * half, 2).float() / (2 * half))
    angle = torch.arange(len(x)).float()[:, None, None] * rate
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def logits(state: State, sizes: Sizes, pictures: Tensor, ids: Tensor) -> Tensor:
    """Pictures [N, 3, S, S] and ids [T] of one sample to logits [T, V]."""
    media = [resample(state, sizes, tower(state, sizes, picture)) for picture in pictures]
    name = "language_model.model."
    table = state[f"{name}embed_tokens.weight"]
    special = torch.tensor([sizes.end, sizes.image])
    rows = table.index_copy(0, special, state["special_embeddings"])
    x = rows[ids]
    causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    for i in range(sizes.layers):
        if (i + 1) % sizes.every == 0 and len(media):
            x = gated(state, sizes, (i + 1) // sizes.every - 1, x, torch.stack(media), ids)
        layer = f"{name}layers.{i}."
        y = rms(x, state[f"{layer}input_layernorm.weight"])
        q, k, v = (y @ state[f"{layer}self_attn.{part}_proj.weight"].T for part in "qkv")
        q, k = split(q, sizes.text_heads), split(k, sizes.kv_heads)
        q, k, v = rotate(q, sizes.theta), rotate(k, sizes.theta), split(v, sizes.kv_heads)
        copies = sizes.text_heads // sizes.kv_heads
        k, v = (part.repeat_interleave(copies, 1) for part in (k, v))
        x = x + attend(q, k, v, causal) @ state[f"{layer}self_attn.o_proj.weight"].T
        y = rms(x, state[f"{layer}post_attention_layernorm.weight"])
        gate, up = (y @ state[f"{layer}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ state[f"{layer}mlp.down_proj.weight"].T
    x = rms(x, state[f"{name}norm.weight"])
    return x @ (rows if sizes.tied else state["language_model.lm_head.weight"]).T


def loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Sum over the labelled positions; row t predicts label t + 1."""
    return F.cross_entropy(scores[:-1], labels[1:], ignore_index=-100, reduction="sum")
