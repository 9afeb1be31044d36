"""Stage 1 of BLIP-2 as its reference implementation has it: separate passes, dense masks.

Written from the facts of the paper and LAVIS's shapes, in functions of a dictionary of parameters
under our keys: what the model's fused form is held to, and timed against.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Parameters = dict[str, Tensor]
Cache = dict[str, tuple[Tensor, Tensor]]  # keys and values of self-attention, by layer


class Sizes(NamedTuple):
    layers: int
    heads: int
    every: int = 2
    eps: float = 1e-12
    dropout: float = 0.0


class Losses(NamedTuple):
    itc: Tensor
    itm: Tensor
    itg: Tensor

    @property
    def total(self) -> Tensor:
        return self.itc + self.itm + self.itg


def linear(p: Parameters, name: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def norm(p: Parameters, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)


def heads(x: Tensor, sizes: Sizes) -> Tensor:
    """[B, L, D] to [B, H, L, E]."""
    return x.view(*x.shape[:2], sizes.heads, -1).transpose(1, 2)


def attend(
    p: Parameters,
    name: str,
    x: Tensor,
    source: Tensor,
    mask: Tensor | None,
    sizes: Sizes,
    cache: Cache | None = None,
) -> Tensor:
    """One attention sublayer; mask bool [B, Lq, Lk]. Keys and values go to an empty cache, and are
    put behind those of a full one."""
    q, k, v = (
        heads(linear(p, f"{name}.attention.{part}", rows), sizes)
        for part, rows in (("query", x), ("key", source), ("value", source))
    )
    if cache is not None and name in cache:
        k, v = (torch.cat([old, new], 2) for old, new in zip(cache[name], (k, v), strict=True))
    elif cache is not None:
        cache[name] = k, v
    dense = None if mask is None else mask[:, None]
    out = F.scaled_dot_product_attention(q, k, v, dense, dropout_p=sizes.dropout)
    out = linear(p, f"{name}.output.dense", out.transpose(1, 2).flatten(2))
    out = F.dropout(out, sizes.dropout)
    return norm(p, f"{name}.output.LayerNorm", x + out, sizes.eps)


def feed_forward(p: Parameters, layer: str, kind: str, x: Tensor, sizes: Sizes) -> Tensor:
    out = F.gelu(linear(p, f"{layer}.intermediate{kind}.dense", x))
    out = F.dropout(linear(p, f"{layer}.output{kind}.dense", out), sizes.dropout)
    return norm(p, f"{layer}.output{kind}.LayerNorm", x + out, sizes.eps)


def qformer(
    p: Parameters,
    sizes: Sizes,
    batch: int,
    *,
    queries: bool,
    input_ids: Tensor | None = None,
    mask: Tensor | None = None,
    image: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """One pass; mask bool [B, rows, keys], image [B, L, W]."""
    parts = []
    if queries:
        parts.append(p["query_tokens"].expand(batch, -1, -1))
    if input_ids is not None:
        words = F.embedding(input_ids, p["embeddings.word_embeddings.weight"])
        place = torch.arange(input_ids.shape[1])
        parts.append(words + F.embedding(place, p["embeddings.position_embeddings.weight"]))
    x = norm(p, "qformer.layernorm", torch.cat(parts, 1), sizes.eps)
    x = F.dropout(x, sizes.dropout)
    count = p["query_tokens"].shape[1] if queries else 0
    for i in range(sizes.layers):
        layer = f"qformer.encoder.layer.{i}"
        x = attend(p, f"{layer}.attention", x, x, mask, sizes, cache)
        rows, text = x[:, :count], x[:, count:]
        outputs = []
        if count:
            if i % sizes.every == 0:
                assert image is not None
                rows = attend(p, f"{layer}.crossattention", rows, image, None, sizes)
            outputs.append(feed_forward(p, layer, "_query", rows, sizes))
        if text.shape[1]:
            outputs.append(feed_forward(p, layer, "", text, sizes))
        x = torch.cat(outputs, 1)
    return x


def stage1(
    p: Parameters,
    sizes: Sizes,
    image: Tensor,
    input_ids: Tensor,
    lengths: Tensor,
    negative_images: Tensor | None = None,
    negative_texts: Tensor | None = None,
    *,
    dec: int,
    ids: Tensor | None = None,
    detach_columns: bool = False,
    cached: bool = False,
) -> Losses:
    """The three losses of a batch [B, L, W], [B, T] in one process.

    Args:
        negative_images, negative_texts: int64 [B], -1 for none (its row is left out); drawn here
            where not given.
        cached: generation reads the keys and values of contrast's query pass, as in LAVIS, instead
            of passing the queries again.
    """
    batch, slots = input_ids.shape
    filled = torch.arange(slots) < lengths[:, None]  # [B, T]
    count = p["query_tokens"].shape[1]

    # Contrast: queries and text apart.
    cache: Cache | None = {} if cached else None
    z = qformer(p, sizes, batch, queries=True, image=image, cache=cache)
    t = qformer(
        p,
        sizes,
        batch,
        queries=False,
        input_ids=input_ids,
        mask=filled[:, None].expand(-1, slots, -1),
    )[:, 0]
    z = F.normalize(linear(p, "vision_projection", z), dim=-1)
    t = F.normalize(linear(p, "text_projection", t), dim=-1)
    z_all, t_all = (z.detach(), t.detach()) if detach_columns else (z, t)
    i2t = (z.flatten(0, 1) @ t_all.T).view(batch, count, -1).amax(1) / p["temp"]
    t2i = (t @ z_all.flatten(0, 1).T).view(-1, batch, count).amax(2) / p["temp"]
    same = torch.eye(batch, dtype=torch.bool) if ids is None else ids[:, None] == ids
    positive = same.to(i2t.dtype)
    targets = 0.9 * positive / positive.sum(1, keepdim=True) + 0.1 / batch
    itc = (F.cross_entropy(i2t, targets) + F.cross_entropy(t2i, targets)) / 2

    if negative_images is None or negative_texts is None:
        negative_images, negative_texts = (
            torch.multinomial(s.detach().float().masked_fill(same, -1e4).softmax(1), 1)[:, 0]
            for s in (t2i, i2t)
        )

    # Matching: three rows a pair, everything sees everything.
    has_image, has_text = negative_images >= 0, negative_texts >= 0
    texts = torch.cat([input_ids, input_ids[has_image], input_ids[negative_texts[has_text]]])
    fill = torch.cat([filled, filled[has_image], filled[negative_texts[has_text]]])
    images = torch.cat([image, image[negative_images[has_image]], image[has_text]])
    keys = torch.cat([torch.ones(len(texts), count, dtype=torch.bool), fill], 1)
    mask = keys[:, None].expand(-1, count + slots, -1)
    hidden = qformer(p, sizes, len(texts), queries=True, input_ids=texts, mask=mask, image=images)[
        :, :count
    ]
    logits = linear(p, "itm_head", hidden).mean(1)
    labels = (torch.arange(len(texts)) < batch).long()
    itm = F.cross_entropy(logits, labels)

    # Generation: the text sees the queries and itself up to the row.
    decoded = input_ids.clone()
    decoded[:, 0] = dec
    causal = torch.ones(slots, slots, dtype=torch.bool).tril() & filled[:, None]
    rows = torch.cat([torch.ones(batch, slots, count, dtype=torch.bool), causal], 2)
    if cached:
        hidden = qformer(p, sizes, batch, queries=False, input_ids=decoded, mask=rows, cache=cache)
    else:
        top = torch.cat([torch.ones(count, count), torch.zeros(count, slots)], 1).bool()
        mask = torch.cat([top.expand(batch, -1, -1), rows], 1)
        hidden = qformer(p, sizes, batch, queries=True, input_ids=decoded, mask=mask, image=image)[
            :, count:
        ]
    head = "cls.predictions.transform"
    hidden = norm(p, f"{head}.LayerNorm", F.gelu(linear(p, f"{head}.dense", hidden)), sizes.eps)
    words = F.linear(hidden, p["embeddings.word_embeddings.weight"], p["cls.predictions.bias"])
    labels = decoded.masked_fill(~filled, -100)[:, 1:]
    itg = words.sum() * 0
    if (labels >= 0).any():
        itg = F.cross_entropy(words[:, :-1].flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    return Losses(itc, itm, itg)
