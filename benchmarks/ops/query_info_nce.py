"""BLIP-2's image-text contrast against one GEMM and a maximum, LAVIS's form, chunked PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import peers
from benchmarks.case import MODES, OURS, Case, Plan, Suite, Variant, few_rows, scalar
from benchmarks.harness import Bench
from benchmarks.reference import on_reference
from mmkern import ops

SMOOTHING = 0.1
PRODUCTS = 1 << 22  # query-text products in a chunk
SIZES = {"cpu": (16, 64, 256, 1680, 8192), "cuda": (256, 1680, 8192, 32_768)}


def cases(plan: Plan) -> Iterator[Case]:
    """BLIP-2's 32 queries of width 256, from a batch on one device to more than the paper's."""
    sizes = plan.sizes or ((16, 256) if plan.short else SIZES[plan.device])
    for dtype in ("float32", "bfloat16"):
        for n in sizes:
            for mode in MODES if n == 1680 else ("fwd+bwd",):
                yield Case({"N": n, "Q": 32, "D": 256}, dtype, mode, device=plan.device)


def inputs(case: Case) -> tuple[Tensor, ...]:
    """Unit vectors; an image's queries are close to each other, as trained ones are."""
    n, count, width = case["N"], case["Q"], case["D"]
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(n, 1, width, generator=generator), dim=2)
    queries = torch.randn(n, count, width, generator=generator) / width**0.5
    queries = F.normalize(image + queries, dim=2)
    text = F.normalize(0.5 * image[:, 0] + torch.randn(n, width, generator=generator) / 16, dim=1)
    dtype = getattr(torch, case.dtype)
    queries, text = (x.to(case.device, dtype).requires_grad_() for x in (queries, text))
    return queries, text, scalar(1 / 0.07, case)


def ours(queries: Tensor, text: Tensor, scale: Tensor, seed: int | None = None) -> Tensor:
    result = ops.query_info_nce(
        queries, text, scale, label_smoothing=SMOOTHING, negatives_seed=seed
    )
    return result.loss


def similarities(queries: Tensor, text: Tensor) -> Tensor:
    """One GEMM, then the maximum: [images, texts]."""
    images, count, _ = queries.shape
    products = queries.flatten(0, 1) @ text.T
    return peers.accumulated(products.view(images, count, -1).max(1).values)


def _loss(rows: Tensor, columns: Tensor) -> Tensor:
    labels = torch.arange(rows.shape[0], device=rows.device)
    loss = partial(F.cross_entropy, target=labels, label_smoothing=SMOOTHING)
    return (loss(rows) + loss(columns)) / 2


def dense(queries: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The best plain form: one GEMM whose [N, Q, N] products are kept."""
    logits = scale * similarities(queries, text)
    return _loss(logits, logits.T)


def dense_negatives(queries: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The same, and negatives drawn by torch.multinomial, both directions at once."""
    logits = scale * similarities(queries, text)
    with torch.no_grad():
        masked = logits.clone().fill_diagonal_(-torch.inf)
        torch.multinomial(masked.softmax(1), 1)
        torch.multinomial(masked.T.softmax(1), 1)
    return _loss(logits, logits.T)


def lavis(queries: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """BLIP-2's own form: a broadcast matmul for each direction."""
    q2t = torch.matmul(queries.unsqueeze(1), text.unsqueeze(-1)).squeeze(-1)
    t2q = torch.matmul(text.unsqueeze(1).unsqueeze(1), queries.permute(0, 2, 1)).squeeze(-2)
    rows, columns = (peers.accumulated(x.max(-1).values) * scale for x in (q2t, t2q))
    return _loss(rows, columns)


def _chunk(queries: Tensor, text: Tensor, scale: Tensor, start: int) -> tuple[Tensor, ...]:
    logits = scale * similarities(queries, text)
    positive = logits.diagonal(start)[: queries.shape[0]]
    rest = 2 * (1 - SMOOTHING) * positive.sum() + 2 * SMOOTHING * logits.sum() / text.shape[0]
    return logits.logsumexp(1).sum() - rest, logits.logsumexp(0)


def chunked(queries: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Plain PyTorch in linear memory: bands of images, recomputed in the backward."""
    total, columns = torch.zeros((), device=text.device), []
    n, count, _ = queries.shape
    step = max(1, PRODUCTS // (count * n))
    for start in range(0, n, step):
        losses, column = checkpoint(
            _chunk,
            *(queries[start : start + step], text, scale, start),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        total = total + losses
        columns.append(column)
    return (total + torch.stack(columns).logsumexp(0).sum()) / (2 * n)


def products_bytes(case: Case) -> float:
    """What a loss takes that keeps [N, Q, N] products: them, their gradient, one copy in fp32."""
    size = getattr(torch, case.dtype).itemsize
    return (2.0 * size + 4) * case["N"] ** 2 * case["Q"]


SUITE = Suite(
    op="query_info_nce",
    module=__name__,
    cases=cases,
    variants={
        OURS: Variant(lambda: ours),
        "mmkern, negatives": Variant(lambda: partial(ours, seed=0)),
        "reference": Variant(partial(on_reference, "query_info_nce", ("fwd", "loss", "bwd"), ours)),
        "dense": Variant(lambda: dense, kept=products_bytes),
        "dense, negatives": Variant(lambda: dense_negatives, kept=products_bytes),
        "lavis": Variant(lambda: lavis, kept=products_bytes),
        "chunked": Variant(lambda: chunked),
        "compiled": Variant(partial(peers.compiled, dense), kept=products_bytes, compiles=True),
    },
    inputs=inputs,
    names=("queries", "text", "scale"),
    exact=chunked,
    small=few_rows,
)


def test_query_info_nce(case: Case, bench: Bench) -> None:
    """Time, memory and error of every variant at one case."""
    bench(SUITE, case)
