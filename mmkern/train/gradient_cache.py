r"""Contrastive training with a batch larger than memory.

Every pair is a negative of every other one, so accumulating gradients over small batches computes
another loss. The gradient cache (Gao et al. 2021, arXiv 2101.06983) computes the same one: with
features f = e(x; θ) and loss L(f),

.. math:: \frac{\partial L}{\partial \theta}
          = \sum_{\text{chunks } c} \Big\langle \frac{\partial L}{\partial f_c},
            \frac{\partial f_c}{\partial \theta} \Big\rangle

so that the encoders' activations are needed for one chunk at a time only. Cost: one more forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

Chunk = TypeVar("Chunk")
Features = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def cached_step(
    encode: Callable[[Chunk], Features],
    loss: Callable[..., Tensor],
    chunks: Iterable[Chunk],
    *,
    model: nn.Module | None = None,
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    scaler: GradScaler | None = None,
) -> Tensor:
    """Forward and backward of ``loss(encode(all chunks))``, holding one chunk's graph at a time.

    Adds to ``.grad`` what ``loss(...).backward()`` on the whole batch would add (fp32: to 1e-6).
    The chunks are encoded without a graph, the loss and its gradient are computed once on the
    detached features, then each chunk is encoded again, under the random state that it had (CPU and
    device), and its gradient is sent into the encoders.

        def encode(chunk):
            return image_tower(chunk["image"]), text_tower(chunk["text"]), log_scale.exp()

        cached_step(encode, mmkern.ops.info_nce, batch_in_chunks)
        optimizer.step()

    Args:
        encode: chunk -> a tensor, a sequence or a mapping of tensors. Tensors with rows are put
            together along dimension 0. A 0-d tensor (a logit scale) belongs to all chunks: the
            loss gets that of the first, and its gradient is injected once, in the last.
        loss: called once, as ``loss(f)``, ``loss(*f)`` or ``loss(**f)`` by what `encode` returns.
            Returns a 0-d tensor. May call collectives.
        chunks: what `encode` takes; sizes may differ.
        model: its buffers (running statistics of batch normalisation) change once a chunk, not
            twice. Batch normalisation itself sees a chunk, not the batch: there the result
            differs from the whole batch's.
        no_sync: entered for all chunks but the last; pass the ``no_sync`` of
            ``DistributedDataParallel``. `encode` must then call the wrapped module, once, and
            get everything that needs a gradient, the logit scale included, from its output: a
            parameter used outside makes the wrapper see it twice.
        autocast: entered around `encode` and `loss`, never around a backward.
        scaler: scales the loss; the gradients come out scaled, for ``scaler.step``.

    Returns:
        The loss, detached and unscaled.

    Raises:
        ValueError: no chunk, features without rows or without a gradient, a loss that is not 0-d.
    """
    chunks = list(chunks)
    if not chunks:
        raise ValueError("cached_step: chunks must hold at least one chunk, got none")
    buffers = [(b, b.clone()) for b in model.buffers()] if model is not None else []

    states, parts = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_random_state())
            with autocast():
                features = encode(chunk)
            parts.append(_tensors(features))
        for buffer, before in buffers:
            buffer.copy_(before)
    by_output = list(zip(*parts, strict=True))
    leaves = [_join(part).requires_grad_() for part in by_output]
    with torch.enable_grad(), autocast():
        value = _call(loss, features, leaves)
    if value.dim() != 0 or not value.requires_grad:
        raise ValueError(
            "cached_step: loss must return a 0-d tensor that depends on the features, got shape "
            f"{tuple(value.shape)}, requires_grad={value.requires_grad}"
        )
    (value if scaler is None else scaler.scale(value)).backward()
    gradients = [_split(leaf, part) for leaf, part in zip(leaves, by_output, strict=True)]

    after, last = _random_state(), len(chunks) - 1
    for index, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
        _restore(state)
        with no_sync() if index < last else nullcontext(), torch.enable_grad():
            with autocast():
                outputs = _tensors(encode(chunk))
            _surrogate(outputs, [g[index] for g in gradients], last=index == last).backward()
    _restore(after)
    return value.detach()


def split_batch(batch: Mapping[str, Any], rows: int) -> list[dict[str, Any]]:
    """Cut every tensor of a batch into chunks of `rows` along dimension 0; the last may be smaller.

    0-d tensors and everything that is not a tensor go into each chunk.

    Raises:
        ValueError: `rows` below 1, no tensor with rows, or tensors that differ in their rows.
    """
    if rows < 1:
        raise ValueError(f"split_batch: rows must be at least 1, got {rows}")
    tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.dim()}
    counts = {key: value.shape[0] for key, value in tensors.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"split_batch: tensors must have one number of rows, got {counts}")
    count = next(iter(counts.values()))
    return [
        {**batch, **{key: value[start : start + rows] for key, value in tensors.items()}}
        for start in range(0, count, rows)
    ]


def _tensors(features: Features) -> list[Tensor]:
    if isinstance(features, Tensor):
        return [features]
    values = list(features.values() if isinstance(features, Mapping) else features)
    for value in values:
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"cached_step: encode must return tensors, got one {kind}")
    return values


def _join(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts[0].dim() else parts[0].clone()


def _call(loss: Callable[..., Tensor], features: Features, leaves: Sequence[Tensor]) -> Tensor:
    if isinstance(features, Mapping):
        return loss(**dict(zip(features, leaves, strict=True)))
    return loss(*leaves)


def _split(leaf: Tensor, parts: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The gradient's rows, chunk by chunk. None where the loss did not use the features."""
    if leaf.grad is None or leaf.dim() == 0:
        return [leaf.grad] * len(parts)
    return leaf.grad.split([part.shape[0] for part in parts])


def _surrogate(outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], last: bool) -> Tensor:
    """⟨f, ∂L/∂f⟩, whose gradient is the chunk's; in fp32, as 16 bits would overflow in the sum."""
    terms = []
    for output, gradient in zip(outputs, gradients, strict=True):
        if gradient is None or not output.requires_grad or (output.dim() == 0 and not last):
            continue
        dtype = torch.promote_types(output.dtype, torch.float32)
        terms.append((output.to(dtype) * gradient.to(dtype)).sum())
    if not terms:
        raise ValueError("cached_step: encode returned nothing that needs a gradient")
    return torch.stack(terms).sum()


def _random_state() -> tuple[Tensor, list[Tensor]]:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), devices


def _restore(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
