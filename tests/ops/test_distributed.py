"""group=: the contrastive losses over 1 to 4 gloo ranks equal one process on the joint batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmkern import ops
from tests.testing import run_ranks, unit_features

WIDTH = 12
OPTIONS: dict[str, dict[str, Any]] = {
    "info_nce": {},
    "info_nce smoothed": {"label_smoothing": 0.1},
    "sigmoid": {},
}
# Rows of each rank: (images, texts); more texts than images are further negatives.
SHARDS = {
    "one rank": [(6, 6)],
    "equal": [(4, 4), (4, 4)],
    "unequal": [(5, 5), (1, 1), (3, 3)],
    "extra texts": [(3, 5), (2, 2), (4, 4), (1, 6)],
}


class Towers(nn.Module):
    """Two linear encoders, a scale and a bias, as a contrastive model under DDP has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(WIDTH, 8).double(), nn.Linear(WIDTH, 8).double()
        self.scale = nn.Parameter(torch.tensor(7.0, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor([-3.0], dtype=torch.float64))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Multiplied by one: the loss then sees outputs of forward, as DDP requires.
        return self.image(image), self.text(text), self.scale * 1, self.bias * 1


def loss_of(name: str, outputs: tuple[Tensor, ...], group: Any) -> Tensor:
    image, text, scale, bias = outputs
    if name == "sigmoid":
        return ops.sigmoid_contrastive(image, text, scale, bias, group=group)
    # The bias shifts every logit alike: its gradient is exactly 0, and DDP wants one.
    return ops.info_nce(image, text, scale, group=group, **OPTIONS[name]) + 0 * bias.sum()


def batch(shards: list[tuple[int, int]]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    images = unit_features(sum(n for n, _ in shards), WIDTH, torch.float64)
    texts = unit_features(sum(m for _, m in shards), WIDTH, torch.float64, seed=1)
    return (
        images,
        list(images.split([n for n, _ in shards])),
        list(texts.split([m for _, m in shards])),
    )


def train_one_step(rank: int, world: int, shards: list[tuple[int, int]]) -> Any:
    """For each loss: its value and the DDP-averaged gradients of one rank."""
    _, images, texts = batch(shards)
    results = {}
    for name in OPTIONS:
        model = nn.parallel.DistributedDataParallel(Towers())
        loss = loss_of(name, model(images[rank], texts[rank]), dist.group.WORLD)
        (3 * loss).backward()
        results[name] = loss.detach(), [p.grad for p in model.parameters()]
    return results


@pytest.mark.parametrize("shards", SHARDS.values(), ids=SHARDS.keys())
def test_equals_one_process(shards: list[tuple[int, int]]):
    """Encoders at 1/W or W times the gradient, or a scale at W times it, train another model."""
    image, _, texts = batch(shards)
    labelled = [t[:n] for t, (n, _) in zip(texts, shards, strict=True)]
    further = [t[n:] for t, (n, _) in zip(texts, shards, strict=True)]
    results = run_ranks(len(shards), train_one_step, shards)
    for name in OPTIONS:
        model = Towers()
        loss = loss_of(name, model(image, torch.cat(labelled + further)), None)
        (3 * loss).backward()
        expected = [p.grad for p in model.parameters()]
        for rank in results:
            rank_loss, gradients = rank[name]
            torch.testing.assert_close(rank_loss, loss.detach(), rtol=1e-12, atol=0)
            for got, true in zip(gradients, expected, strict=True):
                torch.testing.assert_close(got, true, rtol=1e-9, atol=1e-12)


def halves(rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    image, text = unit_features(6, WIDTH, dtype), unit_features(6, WIDTH, dtype, seed=1)
    return image[3 * rank :][:3], text[3 * rank :][:3]


def on_two_ranks(rank: int, world: int) -> dict[str, Any]:
    """What the tests below look at, in one start of two processes."""
    results: dict[str, Any] = {}
    group = dist.group.WORLD
    results["no gradient"] = ops.info_nce(*halves(rank, torch.float32), 10.0, group=group)
    try:
        ops.info_nce(torch.zeros(3 * rank, WIDTH), torch.zeros(3 * rank, WIDTH), 10.0, group=group)
    except ValueError as error:
        results["empty"] = str(error)
    for dtype in (torch.bfloat16, torch.float16):
        leaves = [x.requires_grad_() for x in halves(rank, dtype)]
        loss = ops.info_nce(*leaves, 10.0, group=group)
        results[str(dtype)] = loss.detach(), torch.autograd.grad(loss, leaves)
    return results


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_ranks(2, on_two_ranks)


def test_no_gradient_wanted(two_ranks: list[dict[str, Any]]):
    """Validation under a group takes the path without autograd: the same global loss."""
    expected = ops.info_nce(unit_features(6, WIDTH), unit_features(6, WIDTH, seed=1), 10.0)
    for rank in two_ranks:
        torch.testing.assert_close(rank["no gradient"], expected)


def test_empty_rank_raises_everywhere(two_ranks: list[dict[str, Any]]):
    """If only the empty rank raised, the others would hang in their next collective."""
    for rank in two_ranks:
        assert rank["empty"] == "info_nce: image needs at least one row, got 0 on rank 0"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(two_ranks: list[dict[str, Any]], dtype: torch.dtype):
    """16-bit features are gathered in 16 bit, their gradients summed in fp32."""
    leaves = [unit_features(6, WIDTH, dtype, seed=seed).requires_grad_() for seed in (0, 1)]
    loss = ops.info_nce(*leaves, 10.0)
    expected = torch.autograd.grad(loss, leaves)
    for rank, results in enumerate(two_ranks):
        got, gradients = results[str(dtype)]
        torch.testing.assert_close(got, loss.detach())
        for ours, true in zip(gradients, expected, strict=True):
            # DDP's average divides by two what one rank returns doubled.
            torch.testing.assert_close(ours / 2, true[3 * rank :][:3])
