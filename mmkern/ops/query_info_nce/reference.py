"""The image-text contrast of BLIP-2 in plain PyTorch, a band of images at a time: the truth."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS = 1 << 22  # query-text products held at once

_MULTIPLIER, _WEYL, _WORD = 0xD256D193, 0x9E3779B9, 0xFFFFFFFF


def query_info_nce_fwd(
    queries: Tensor,
    text: Tensor,
    scale: Tensor,
    ids: Tensor,
    offset: int,
    keep: bool,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics of S_ij = scale · max_q <queries_iq, text_j> by rows and by columns, and draws.

    Args:
        queries: [B, Q, D], Q <= 256.
        text: [M, D], M >= offset + B.
        scale: one element.
        ids: [M] int64; i and j are a positive pair where ids[offset + i] == ids[j].
        offset: text that belongs to the first image; also its index among all images.
        keep: return dots and best, for the backward.
        seed: int64, one element; wanted where negatives are to be drawn.

    Returns:
        stats [7, B + M], of each row, then of each column over the B rows: the largest negative m
        and Σ exp(S - m) over the negatives (-inf and 0 where there is none); the same two of the
        positives; their sum; their number; the sum of all logits.
        keys [B + M], draws [B + M]: Gumbel-max over the negatives. A draw is the index of a text
        for a row, of an image (offset included) for a column, and its key ln E - S is the least;
        +inf and -1 where there is none. Empty without a seed.
        dots [B, M]: max_q <queries_iq, text_j>; best [B, M] uint8: the first q that attains it.
        Empty unless kept.
        fp32, or fp64 for fp64 inputs. NaN, and +inf as in a dense softmax, give NaN.
    """
    dtype = _accumulator(queries)
    images, texts = queries.shape[0], text.shape[0]
    columns, factor = text.to(dtype), scale.to(dtype).view(())
    stats = queries.new_zeros((7, images + texts), dtype=dtype)
    stats[0:4:2] = -torch.inf
    drawn = images + texts if seed is not None else 0
    keys = stats.new_full((drawn,), torch.inf)
    draws = torch.full((drawn,), -1, dtype=torch.int64, device=queries.device)
    dots = stats.new_empty((images, texts) if keep else (0,))
    best = torch.empty((images, texts) if keep else (0,), dtype=torch.uint8, device=queries.device)
    j = torch.arange(texts, device=queries.device)
    for start, stop in _bands(queries, texts):
        band, winners = _similarity(queries[start:stop].to(dtype), columns)
        if keep:
            dots[start:stop], best[start:stop] = band, winners
        logits = band * factor
        positive = ids[offset + start : offset + stop, None] == ids
        negatives = logits.masked_fill(positive, -torch.inf)
        positives = logits.masked_fill(~positive, -torch.inf)
        chosen = logits.masked_fill(~positive, 0)
        for dim, part in ((1, stats[:, start:stop]), (0, stats[:, images:])):
            _merge(part[:2], negatives, dim)
            _merge(part[2:4], positives, dim)
            part[4:] += torch.stack([chosen.sum(dim), positive.sum(dim).to(dtype), logits.sum(dim)])
        if seed is None:
            continue
        i = torch.arange(offset + start, offset + stop, device=queries.device)
        noise = _exponential(_philox(i[:, None], j, seed), dtype)
        noise = (noise.log() - logits).masked_fill(positive | logits.isnan(), torch.inf)
        least, index = noise[0].min(1)
        keys[start:stop], draws[start:stop] = least, index.masked_fill(least == torch.inf, -1)
        least, index = noise[1].min(0)
        nearer = least < keys[images:]
        keys[images:] = torch.where(nearer, least, keys[images:])
        draws[images:] = torch.where(nearer, i[index], draws[images:])
    return stats, keys, draws, dots, best


def query_info_nce_loss(stats: Tensor, label_smoothing: float, texts: int) -> Tensor:
    """Sum of the losses of all rows and columns that `stats` [7, n] describes, 0-d.

    LSE over all as (LSE over positives) + log(1 + exp(negatives - positives)): with one positive
    its logit cancels exactly, and the loss keeps its digits where it is far below 1.

    Args:
        texts: number of texts, over which smoothing spreads.
    """
    top_negative, negatives, top_positive, positives, total, number, every = stats.unbind()
    mean = total / number
    margin = (top_negative - top_positive) + (negatives / positives).log()
    losses = F.softplus(margin, threshold=80) + ((top_positive - mean) + positives.log())
    if label_smoothing:
        losses = losses + label_smoothing * (mean - every / texts)
    return losses.sum()


def query_info_nce_bwd(
    queries: Tensor,
    text: Tensor,
    scale: Tensor,
    ids: Tensor,
    offset: int,
    stats: Tensor,
    grad: Tensor,
    world: int,
    label_smoothing: float,
    detach_columns: bool,
    output_mask: list[bool],
    dots: Tensor | None = None,
    best: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the loss, times the number of ranks.

    R_ij = softmax_j(S)_ij - P_ij, C_ij = softmax_i(S)_ij - P_ij with the targets
    P_ij = (1 - ε) positive_ij / Σ_k positive_ik + ε / M; G = R + C.

    Args:
        stats: [7, B + M] as returned by the forward, the columns' over all images.
        grad: one element, the gradient of the loss.
        world: number of ranks; c = grad · world / 2 M.
        label_smoothing: ε.
        detach_columns: weights of the queries' gradient are R, those of the texts' C; else both G.
        output_mask: which of the first two results are wanted; the other is returned empty.
        dots, best: as returned by the forward; without them they are computed again.

    Returns:
        d_queries [B, Q, D] in the queries' dtype: c · scale · Σ_j G_ij text_j over the texts whose
        best query it is. d_text [M, D]: c · scale · Σ_i G_ij queries_i,best(i,j). d_scale, 0-d:
        c · Σ_ij G_ij dots_ij. The last two in fp32 (fp64 for fp64 inputs).
    """
    dtype = stats.dtype
    images, texts = queries.shape[0], text.shape[0]
    columns, s = text.to(dtype), scale.to(dtype).view(())
    constant = grad.to(dtype).view(()) * (world / (2 * texts))
    factor = constant * s
    want_queries, want_text = output_mask
    d_queries = torch.empty_like(queries if want_queries else queries[:0, 0, 0])
    d_text = stats.new_zeros(text.shape if want_text else (0,))
    d_scale = stats.new_zeros(())
    for start, stop in _bands(queries, texts):
        rows = queries[start:stop].to(dtype)
        if dots is None or best is None:
            band, winners = _similarity(rows, columns)
        else:
            band, winners = dots[start:stop], best[start:stop]
        positive = ids[offset + start : offset + stop, None] == ids
        logits = band * s
        row, column = (
            _weights(logits, positive, part, label_smoothing, texts)
            for part in (stats[:, start:stop, None], stats[:, None, images:])
        )
        d_scale += ((row + column) * band).sum()
        if not detach_columns:
            row = column = row + column
        where = winners.long()[:, None]
        spread = rows.new_zeros(stop - start, rows.shape[1], texts)  # [band, Q, M]
        if want_queries:
            weight = spread.scatter(1, where, row[:, None])
            d_queries[start:stop] = (weight @ columns * factor).to(queries.dtype)
        if want_text:
            weight = spread.scatter(1, where, column[:, None])
            d_text += weight.flatten(0, 1).T @ rows.flatten(0, 1)
    return d_queries, d_text.mul_(factor), d_scale.mul_(constant)


def _weights(
    logits: Tensor, positive: Tensor, stats: Tensor, smoothing: float, texts: int
) -> Tensor:
    """softmax - P of one direction.

    That of a positive is (e - P) - e · miss, with e its softmax among the positives and miss the
    probability of all negatives: with one positive e is 1, and nothing cancels.
    """
    top_negative, negatives, top_positive, positives, _, number, _ = stats.unbind()
    top = torch.maximum(top_negative, top_positive)
    negatives = negatives * (top_negative - top).exp()
    total = negatives + positives * (top_positive - top).exp()
    e = (logits - top_positive).exp() / positives
    of_positive = (e - ((1 - smoothing) / number + smoothing / texts)) - e * (negatives / total)
    of_negative = (logits - top).exp() / total - smoothing / texts
    return torch.where(positive, of_positive, of_negative)


def _similarity(queries: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """max_q <queries_iq, text_j> and the first q that attains it, as bytes."""
    images, count, width = queries.shape
    products = queries.reshape(images * count, width) @ text.T
    dots, best = products.view(images, count, -1).max(1)
    return dots, best.to(torch.uint8)


def _bands(queries: Tensor, texts: int) -> list[tuple[int, int]]:
    images = queries.shape[0]
    step = max(1, LOGITS // (queries.shape[1] * texts))
    return [(start, min(start + step, images)) for start in range(0, images, step)]


def _philox(i: Tensor, j: Tensor, seed: Tensor) -> Tensor:
    """Philox2x32-10 (Salmon et al. 2011) of the counter (i, j): two words of 32 bits, in int64.

    The key is the exclusive or of the seed's halves.
    """
    key = (seed.view(()) ^ (seed.view(()) >> 32)) & _WORD
    left, right = torch.broadcast_tensors(i & _WORD, j & _WORD)
    for _ in range(10):
        product = left * _MULTIPLIER  # wraps; the shift below drops the sign's copies
        left, right = ((product >> 32) & _WORD) ^ key ^ right, product & _WORD
        key = (key + _WEYL) & _WORD
    return torch.stack([left, right])


def _exponential(words: Tensor, dtype: torch.dtype) -> Tensor:
    """-log(1 - V) for V = (word + 1/2) 2^-32: finite, and finest where the smallest lie."""
    uniform = (words.to(dtype) + 0.5) * 2.0**-32
    return -torch.log1p(-uniform.clamp(max=1 - 2.0**-24))


def _merge(state: Tensor, logits: Tensor, dim: int) -> None:
    """Take logits into a running maximum m and sum of exp(logit - m), both in `state`."""
    top = torch.maximum(state[0], logits.amax(dim))
    safe = torch.where(top == -torch.inf, 0.0, top)  # no logit yet: exp(-inf), not NaN
    state[1] *= (state[0] - safe).exp()
    state[1] += (logits - safe.unsqueeze(dim)).exp().sum(dim)
    state[0] = top


def _accumulator(queries: Tensor) -> torch.dtype:
    return torch.float64 if queries.dtype == torch.float64 else torch.float32
