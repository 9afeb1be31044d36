"""The sigmoid loss against the dense formula, open_clip's class and chunked PyTorch."""

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
# (scale, bias): SigLIP's initial values; for "trained", a bias midway between the two cosines.
SCALARS = {"random": (10.0, -10.0), "trained": (100.0, -27.5)}


def inputs(case: Case) -> tuple[Tensor, ...]:
    return *features(case), *(scalar(value, case) for value in SCALARS[case.distribution])


def _band(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, start: int) -> Tensor:
    logits = scale * peers.accumulated(image @ text.T) + bias
    signs = -torch.ones_like(logits)
    signs.diagonal(start)[: image.shape[0]] = 1
    return -F.logsigmoid(signs * logits).sum()


def dense(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The formula, logits kept."""
    return _band(image, text, scale, bias, 0) / image.shape[0]


def chunked(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Plain PyTorch in linear memory: bands of rows, recomputed in the backward."""
    total = torch.zeros((), device=image.device)
    for start in range(0, image.shape[0], ROWS):
        band = image[start : start + ROWS]
        total = total + checkpoint(
            _band, band, text, scale, bias, start, use_reentrant=False, preserve_rng_state=False
        )
    return total / image.shape[0]


SUITE = Suite(
    op="sigmoid_contrastive",
    module=__name__,
    cases=partial(contrastive_cases, largest=0),
    variants={
        OURS: Variant(lambda: ops.sigmoid_contrastive),
        "reference": Variant(partial(on_reference, "sigmoid_contrastive", ("fwd", "fwd_bwd"))),
        "dense": Variant(lambda: dense, kept=dense_bytes),
        "open_clip": Variant(partial(peers.open_clip, "SigLipLoss"), kept=dense_bytes),
        "chunked": Variant(lambda: chunked),
        "compiled": Variant(partial(peers.compiled, dense), kept=dense_bytes, compiles=True),
    },
    inputs=inputs,
    names=("image", "text", "scale", "bias"),
    exact=chunked,
    small=few_rows,
)


def test_sigmoid_contrastive(case: Case, bench: Bench) -> None:
    """Time, memory and error of every variant at one case."""
    bench(SUITE, case)
