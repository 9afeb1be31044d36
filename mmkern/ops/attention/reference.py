"""Attention under row intervals in plain PyTorch: the truth the kernels are held to.

Dropout is a pure function of the seed and of a weight's place: sample b, head h, row i, key j.
Words are unsigned 32-bit, arithmetic is modulo 2^32:

    k0, k1, _, _ = Philox4x32-10(counter = (i, h, b, 0), key = (seed low, seed high))
    x = k0 ^ ((j >> 1) * 0x9e3779b9)
    x = (x ^ (x >> 16)) * 0x7feb352d
    x = ((x ^ (x >> 15)) + k1) * 0x846ca68b
    x = x ^ (x >> 16)
    kept iff (x >> 16 if j is odd, else x & 0xffff) >= t,    t = round(65536 dropout_p)

Kept weights are divided by the share that is kept, 1 - t / 65536.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

WEIGHTS = 1 << 24  # most weights of a band of samples
_WORD = 0xFFFFFFFF


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Tensor | None,
    kv_row: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v over the keys that each row may attend to.

    Args:
        q: [B, H, Lq, E].
        k, v: [Bk, H, Lk, E]; Bk = B without `kv_row`.
        intervals: int32 [1 or B, Lq, 4] as in RowIntervals; None allows every key.
        kv_row: int32 or int64 [B], the row of k and v that a sample reads.
        seed: int64 [1], None without dropout.

    Returns:
        out [B, H, Lq, E], a view of [B, Lq, H, E] in memory, and the log-sum-exp [B, H, Lq] of the
        scaled scores in fp32 (fp64 for fp64 inputs). Rows without a key: 0 and -inf.
    """
    batch, heads, queries, width = q.shape
    out = q.new_empty(batch, queries, heads, width).transpose(1, 2)
    lse = q.new_empty(batch, heads, queries, dtype=_accumulator(q))
    for band in _bands(q, k):
        rows, keys, values = _operands(q, k, v, kv_row, band)
        allowed, seen = _allowed(intervals, k.shape[2], band)
        scores = _scores(rows, keys, allowed, scale)
        lse[band] = _log_sum_exp(scores)
        weights = _weights(scores, lse[band]) * _factor(seed, band, scores, dropout_p)
        out[band] = (weights @ _only(values, seen)).to(q.dtype)
    return out, lse


def attention_bwd(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    intervals: Tensor | None,
    kv_row: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each in its input's dtype and order of memory.

    With P the softmax and D dropout's factors: dV = (P D)ᵀ dO, dP = (dO Vᵀ) D,
    dS = P (dP - delta), delta = Σ_j P dP; dQ = scale dS K, dK = scale dSᵀ Q.

    Args:
        grad: [B, H, Lq, E], any strides.
        out, lse: of the forward. delta = Σ_e dO O up to the rounding of `out`, for kernels that
            need it before they have seen all keys; here it comes from P.
        intervals, kv_row, seed, dropout_p, scale: those of the forward.

    Returns:
        dq like q; dk and dv like k and v, summed over the samples that read a row (0 where none).
    """
    dq = torch.empty_like(q)
    wide = _accumulator(q)
    dk = torch.zeros_like(k, dtype=wide)
    dv = torch.zeros_like(v, dtype=wide)
    for band in _bands(q, k):
        rows, keys, values = _operands(q, k, v, kv_row, band)
        upstream = grad[band].to(wide)
        allowed, seen = _allowed(intervals, k.shape[2], band)
        scores = _scores(rows, keys, allowed, scale)
        weights = _weights(scores, lse[band])
        factor = _factor(seed, band, scores, dropout_p)
        d_values = (weights * factor).mT @ upstream
        d_weights = upstream @ _only(values, seen).mT * factor
        product = weights * d_weights
        d_scores = (product - weights * product.sum(-1, keepdim=True)) * scale
        dq[band] = (d_scores @ _only(keys, seen)).to(q.dtype)
        d_keys = d_scores.mT @ rows
        for place, b in enumerate(range(band.start, band.stop)):
            row = b if kv_row is None else kv_row[b].long()
            dk[row] += d_keys[place]
            dv[row] += d_values[place]
    return dq, torch.empty_like(k).copy_(dk), torch.empty_like(v).copy_(dv)


def keep(
    seed: Tensor,
    samples: range,
    heads: int,
    queries: int,
    keys: int,
    dropout_p: float,
) -> Tensor:
    """bool [samples, heads, queries, keys]: the weights that dropout leaves, as specified above."""
    device = seed.device
    b = torch.arange(samples.start, samples.stop, device=device).view(-1, 1, 1)
    h = torch.arange(heads, device=device).view(1, -1, 1)
    i = torch.arange(queries, device=device).view(1, 1, -1)
    k0, k1 = _philox(torch.broadcast_tensors(i, h, b), seed)
    j = torch.arange(keys, device=device)
    x = k0[..., None] ^ (((j >> 1) * 0x9E3779B9) & _WORD)
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = (((x ^ (x >> 15)) + k1[..., None]) * 0x846CA68B) & _WORD
    x = x ^ (x >> 16)
    return torch.where(j % 2 == 1, x >> 16, x & 0xFFFF) >= threshold(dropout_p)


def threshold(dropout_p: float) -> int:
    """Of 65,536, how many values of a draw drop its weight."""
    return round(dropout_p * 65536)


def _philox(counter: tuple[Tensor, ...], seed: Tensor) -> tuple[Tensor, Tensor]:
    """The first two words of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy
    as 1, 2, 3"), in int64, whose products wrap to the 64 bits that are wanted."""
    c0, c1, c2 = counter
    c3 = torch.zeros_like(c0)
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, high1 = (p0 >> 32) & _WORD, (p1 >> 32) & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, p1 & _WORD, high0 ^ c3 ^ key1, p0 & _WORD
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return c0, c1


def _accumulator(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _bands(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Samples a few at a time, so that memory stays linear in B."""
    step = max(1, WEIGHTS // max(1, q.shape[1] * q.shape[2] * k.shape[2]))
    for start in range(0, q.shape[0], step):
        yield slice(start, min(start + step, q.shape[0]))


def _operands(
    q: Tensor, k: Tensor, v: Tensor, kv_row: Tensor | None, band: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """A band's q, k and v in the accumulator's dtype."""
    wide = _accumulator(q)
    if kv_row is None:
        return q[band].to(wide), k[band].to(wide), v[band].to(wide)
    row = kv_row[band].long()
    return q[band].to(wide), k[row].to(wide), v[row].to(wide)


def _allowed(
    intervals: Tensor | None, keys: int, band: slice
) -> tuple[Tensor | None, Tensor | None]:
    """A band's mask [1 or band, 1, Lq, Lk], and the keys that any row sees [.., 1, Lk, 1]."""
    if intervals is None:
        return None, None
    rows = intervals if intervals.shape[0] == 1 else intervals[band]
    a0, a1, b0, b1 = rows[:, None, :, :, None].unbind(3)  # [1 or band, 1, Lq, 1] each
    key = torch.arange(keys, device=rows.device)
    allowed = ((a0 <= key) & (key < a1)) | ((b0 <= key) & (key < b1))
    return allowed, allowed.any(2)[..., None]


def _only(values: Tensor, seen: Tensor | None) -> Tensor:
    """0 for the keys that nobody sees: 0 · NaN would be NaN."""
    return values if seen is None else torch.where(seen, values, 0.0)


def _scores(q: Tensor, k: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    scores = (q @ k.mT) * scale
    return scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)


def _log_sum_exp(scores: Tensor) -> Tensor:
    """As torch.logsumexp, but +inf gives NaN, as a softmax does, and no key at all -inf."""
    if scores.shape[-1] == 0:
        return scores.new_full(scores.shape[:-1], -torch.inf)
    top = scores.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    return top.squeeze(-1) + (scores - top).exp().sum(-1).log()


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """The softmax; a row without a key is 0, not exp(-inf - -inf)."""
    return (scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None]).exp()


def _factor(seed: Tensor | None, band: slice, scores: Tensor, dropout_p: float) -> Tensor | float:
    """What dropout multiplies the weights by."""
    dropped = threshold(dropout_p)
    if seed is None or dropped == 0:
        return 1.0
    if dropped == 65536:
        return 0.0
    _, heads, queries, keys = scores.shape
    kept = keep(seed, range(band.start, band.stop), heads, queries, keys, dropout_p)
    return kept.to(scores.dtype) * (65536 / (65536 - dropped))
