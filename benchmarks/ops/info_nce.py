"""InfoNCE against the dense formula, open_clip's class, chunked PyTorch and GPU peers."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import peers
from benchmarks.case import (
    OURS,
    Case,
    Suite,
    Variant,
    contrastive_cases,
    dense_bytes,
    features,
    few_rows,
    scalar,
)
from benchmarks.harness import Bench
from benchmarks.reference import on_reference
from mmkern import ops

ROWS = 1024  # image rows in a chunk


def inputs(case: Case) -> tuple[Tensor, ...]:
    return *features(case), scalar(100.0 if case.distribution == "trained" else 1 / 0.07, case)


def dense(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The formula with one matmul, logits kept."""
    logits = scale * peers.accumulated(image @ text.T)
    labels = torch.arange(image.shape[0], device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def _chunk(image: Tensor, text: Tensor, scale: Tensor, start: int) -> tuple[Tensor, ...]:
    logits = scale * peers.accumulated(image @ text.T)
    positive = logits.diagonal(start)[: image.shape[0]]
    return (logits.logsumexp(1) - 2 * positive).sum(), logits.logsumexp(0)


def chunked(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Plain PyTorch in linear memory: bands of rows, recomputed in the backward."""
    total, columns = torch.zeros((), device=image.device), []
    for start in range(0, image.shape[0], ROWS):
        band = image[start : start + ROWS]
        losses, column = checkpoint(
            _chunk, band, text, scale, start, use_reentrant=False, preserve_rng_state=False
        )
        total = total + losses
        columns.append(column)
    return (total + torch.stack(columns).logsumexp(0).sum()) / (2 * image.shape[0])


SUITE = Suite(
    op="info_nce",
    module=__name__,
    cases=partial(contrastive_cases, largest=65_536),
    variants={
        OURS: Variant(lambda: ops.info_nce),
        "reference": Variant(partial(on_reference, "info_nce", ("fwd", "bwd"))),
        "dense": Variant(lambda: dense, kept=dense_bytes),
        "open_clip": Variant(partial(peers.open_clip, "ClipLoss"), kept=dense_bytes),
        "chunked": Variant(lambda: chunked),
        "compiled": Variant(partial(peers.compiled, dense), kept=dense_bytes, compiles=True),
        "inf-cl": Variant(peers.inf_cl, devices=("cuda",)),
        "cce": Variant(partial(peers.cut_cross_entropy, "cce"), devices=("cuda",)),
        "cce_exact": Variant(partial(peers.cut_cross_entropy, "cce_exact"), devices=("cuda",)),
    },
    inputs=inputs,
    names=("image", "text", "scale"),
    exact=chunked,
    small=few_rows,
)


def test_info_nce(case: Case, bench: Bench) -> None:
    """Time, memory and error of every variant at one case."""
    bench(SUITE, case)
