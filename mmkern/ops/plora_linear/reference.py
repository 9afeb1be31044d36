"""A linear layer with low-rank adapters on visual rows in plain PyTorch: the truth the kernels are
held to.

Dropout is a pure function of the seed, the row m of the batch and the feature k, all words unsigned
and of 32 bits:

    w = Philox4x32-10(counter = (m, 32 (k // 256) + k % 32, 0, 0), key = (seed low, seed high))
    g = (k // 32) % 8,    draw = w[g // 2] >> 16 if g is odd, else w[g // 2] & 0xffff
    kept iff draw >= threshold = round(65536 dropout_p)

so one call of Philox serves 8 features, 32 apart. The division by the share that is kept,
1 - threshold / 65536, is part of the scale s_i that is given here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_WORD = 0xFFFFFFFF


def plora_linear_fwd(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    a: Tensor,
    b: list[Tensor],
    rows: Tensor,
    scaling: list[float],
    threshold: int,
    seed: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """y_i = x W_iᵀ + bias_i, and on visual rows + s_i dropout(x) A_iᵀ B_iᵀ.

    Args:
        x: [..., K].
        weights: [N_i, K] each.
        biases: [N_i] or None, each.
        a: [R, K], the A_i below each other, R = Σ r_i.
        b: [N_i, r_i] each.
        rows: int32 [V], the visual rows, ascending; -1 at the end where there are fewer.
        scaling: s_i.
        threshold: dropout of the adapters' input, as above; 0 for none.
        seed: int64 [1]; None without dropout.

    Returns:
        y_i [..., N_i], and h [V, R] for the backward of the same backend, which alone knows its
        order (here: as `rows`).
    """
    ys = [F.linear(x, w, bias) for w, bias in zip(weights, biases, strict=True)]
    h = x.new_zeros(rows.shape[0], a.shape[0])
    visual = rows[rows >= 0].long()
    if visual.shape[0] == 0:
        return ys, h
    own = h[: visual.shape[0]]
    own.copy_(_dropped(x.reshape(-1, x.shape[-1])[visual], visual, threshold, seed) @ a.T)
    for y, h_i, b_i, s in zip(ys, own.split(_ranks(b), 1), b, scaling, strict=True):
        y.view(-1, y.shape[-1]).index_add_(0, visual, h_i @ b_i.T, alpha=s)
    return ys, h


def plora_linear_bwd(
    a: Tensor,
    dy: list[Tensor],
    x: Tensor | None,
    weights: list[Tensor],
    b: list[Tensor],
    h: Tensor | None,
    rows: Tensor,
    scaling: list[float],
    threshold: int,
    seed: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, list[Tensor]]:
    """Gradients of x, weights, biases, a and b.

    With G_i = s_i dY_i B_i on visual rows and G = [G_1 G_2 ...]:
    dX = Σ dY_i W_i, and on visual rows + dropout(G A); dA = Gᵀ dropout(x); dB_i = s_i dY_iᵀ H_i;
    dW_i = dY_iᵀ X; dbias_i = Σ_rows dY_i.

    Args:
        dy: [..., N_i] each.
        x: as in the forward; None where neither weights nor a are wanted.
        weights: as in the forward; empty where x's gradient is not wanted.
        h: the forward's; None where b's gradient is not wanted.
        output_mask: whether the gradients of x, weights, biases, a and b are wanted; the others
            are returned empty.
    """
    want_x, want_weight, want_bias, want_a, want_b = output_mask
    flat = [grad.reshape(-1, grad.shape[-1]) for grad in dy]
    visual = rows[rows >= 0].long()
    seen = [grad[visual] for grad in flat]
    g = torch.cat([grad @ b_i * s for grad, b_i, s in zip(seen, b, scaling, strict=True)], 1)

    dx = a.new_empty(0)
    if want_x:
        dx = flat[0] @ weights[0]
        for grad, weight in zip(flat[1:], weights[1:], strict=True):
            dx += grad @ weight
        dx.index_add_(0, visual, _dropped(g @ a, visual, threshold, seed))
        dx = dx.view(*dy[0].shape[:-1], a.shape[1])
    da, db, d_weight = a.new_empty(0), [a.new_empty(0) for _ in b], [a.new_empty(0) for _ in b]
    if x is not None:
        flat_x = x.reshape(-1, x.shape[-1])
        if want_weight:
            d_weight = [grad.T @ flat_x for grad in flat]
        if want_a:
            da = g.T @ _dropped(flat_x[visual], visual, threshold, seed)
    if want_b and h is not None:
        parts = zip(seen, h[: visual.shape[0]].split(_ranks(b), 1), scaling, strict=True)
        db = [grad.T @ h_i * s for grad, h_i, s in parts]
    d_bias = [grad.sum(0) if want_bias else a.new_empty(0) for grad in flat]
    return dx, d_weight, d_bias, da, db


def kept(rows: Tensor, features: int, threshold: int, seed: Tensor) -> Tensor:
    """bool [rows, features]: what dropout leaves, as specified above."""
    k = torch.arange(features, device=rows.device)
    m, place = torch.broadcast_tensors(rows.long()[:, None], 32 * (k // 256) + k % 32)
    words = torch.stack(_philox(m, place, seed), 2)  # [rows, features, 4]
    group = k // 32 % 8
    index = (group // 2).view(1, -1, 1).expand(rows.shape[0], -1, 1)
    word = words.gather(2, index).squeeze(2)
    return torch.where(group % 2 == 1, word >> 16, word & 0xFFFF) >= threshold


def _ranks(b: list[Tensor]) -> list[int]:
    return [b_i.shape[1] for b_i in b]


def _dropped(values: Tensor, rows: Tensor, threshold: int, seed: Tensor | None) -> Tensor:
    """`values` [rows, features], zero where dropout takes them."""
    if seed is None:
        return values
    return torch.where(kept(rows, values.shape[1], threshold, seed), values, 0)


def _philox(c0: Tensor, c1: Tensor, seed: Tensor) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") of (c0, c1,
    0, 0), in int64, whose products wrap to the 64 bits that are wanted."""
    c2 = c3 = torch.zeros_like(c0)
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, high1 = (p0 >> 32) & _WORD, (p1 >> 32) & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, p1 & _WORD, high0 ^ c3 ^ key1, p0 & _WORD
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]
