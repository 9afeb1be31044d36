"""ops.sigmoid_contrastive on every backend, against the dense formula in fp64."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkern import ops
from tests.conftest import INTERPRETED
from tests.testing import AWKWARD, assert_within_budget, awkward, unit_features

package = importlib.import_module("mmkern.ops.sigmoid_contrastive")
# The interpreter has no bf16, and its launchers take no fp64.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


def dense(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The formula of the paper's Algorithm 1, with the N x N matrix."""
    logits = scale * image @ text.T + bias
    signs = -torch.ones_like(logits)
    signs.fill_diagonal_(1)
    # -log σ(x) as log(1 + e^-x): logsigmoid in torch is this.
    return -F.logsigmoid(signs * logits).sum() / image.shape[0]


def value_and_gradients(function, inputs, upstream=1.0, dtype=None):  # type: ignore[no-untyped-def]
    """[loss, d image, d text, d scale, d bias], inputs cast to `dtype` for the computation."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss * upstream, leaves)]


def inputs(rows, width, dtype=torch.float32, device="cpu", extra=0, scale=10.0, bias=-10.0):  # type: ignore[no-untyped-def]
    """Unit features, scale and bias; SigLIP starts from 10 and -10."""
    return (
        unit_features(rows, width, dtype, device),
        unit_features(rows + extra, width, dtype, device, seed=1),
        torch.tensor(scale, device=device),
        torch.tensor(bias, device=device),
    )


def check(arguments, upstream=1.0):  # type: ignore[no-untyped-def]
    """Loss and gradients within the budget: fp32 arithmetic on the same rounded inputs."""
    ours = value_and_gradients(ops.sigmoid_contrastive, arguments, upstream)
    exact = value_and_gradients(dense, arguments, upstream, torch.float64)
    plain = value_and_gradients(dense, arguments, upstream, torch.float32)
    # The scale's gradient is a sum of products that cancel, of weights held in the features' dtype.
    terms = (exact[1] * arguments[0]).abs().sum().item() / arguments[2].item()
    terms *= torch.finfo(arguments[0].dtype).eps / torch.finfo(ours[3].dtype).eps
    sizes = (None, None, None, terms, None)
    for got, same, true, size in zip(ours, plain, exact, sizes, strict=True):
        assert_within_budget(got, same.to(got.dtype), true, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "extra", "width"),
    [(1, 0, 1), (2, 0, 1), (63, 0, 48), (65, 2, 96), (127, 0, 384), (129, 130, 100), (200, 0, 640)],
)
def test_sizes(backend: str, device: str, dtype: torch.dtype, rows: int, extra: int, width: int):
    """A tile edge, padding or width handled wrongly changes somebody's loss or gradients."""
    check(inputs(rows, width, dtype, device, extra), upstream=1.7)


@pytest.mark.skipif(INTERPRETED, reason="thousands of interpreted programs")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_large_sizes(backend: str, device: str, dtype: torch.dtype):
    """Sums carried across tiles and bands must be those of the whole matrix."""
    check(inputs(2500, 72, dtype, device, scale=50.0, bias=-5.0))


def test_saturated_logits(backend: str, device: str):
    """Logits to ±200: exp overflows, and log(1 + exp x) must become x, not inf."""
    image, text, *_ = inputs(90, 32, device=device)
    arguments = (3 * image, 3 * text, torch.tensor(60.0, device=device))
    arguments = (*arguments, torch.tensor(1.0, device=device))
    results = value_and_gradients(ops.sigmoid_contrastive, arguments)
    exact = value_and_gradients(dense, arguments, dtype=torch.float64)
    rounding = 4 * torch.finfo(torch.float32).eps * 540  # of a sigmoid at |logit| 540
    for got, true in zip(results, exact, strict=True):
        assert (got.double() - true).abs().max() <= rounding * true.abs().max()


@pytest.mark.parametrize("kind", AWKWARD)
def test_strides(backend: str, device: str, kind: str):
    """A slice of a larger tensor must give what its contiguous copy gives, to the bit."""
    arguments = inputs(67, 40, device=device)
    expected = value_and_gradients(ops.sigmoid_contrastive, arguments)
    leaves = [awkward(kind, x).requires_grad_() for x in arguments[:2]]
    loss = ops.sigmoid_contrastive(*leaves, *arguments[2:])
    got = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    for result, true in zip(got, expected, strict=False):
        torch.testing.assert_close(result, true, atol=0, rtol=0)


@pytest.mark.parametrize("offset", [0, 60])
def test_rows_of_a_larger_batch(backend: str, device: str, offset: int):
    """A rank's rows against everybody's texts: the positive sits at `offset`, not at 0."""
    rows = 33
    image, text = unit_features(rows, 24, device=device), unit_features(95, 24, device=device)
    scale, bias = torch.tensor(10.0, device=device), torch.tensor(-2.0, device=device)
    logits = 10 * image.double() @ text.double().T - 2
    positive = logits.diagonal(offset)[:rows].clone()
    logits.diagonal(offset)[:rows] = -torch.inf
    weight = logits.sigmoid()
    expected = (
        torch.logaddexp(logits, torch.zeros_like(logits)).sum(1),
        positive,
        weight.sum(1),
        weight @ text.double(),
        weight.T @ image.double(),
    )
    for mask in ([True, True], [True, False], [False, True]):
        got = package._fwd_bwd(image, text, scale, bias, offset, mask)
        for wanted, result, true in zip([True] * 3 + mask, got, expected, strict=True):
            if wanted:
                torch.testing.assert_close(result.double(), true, atol=1e-5, rtol=1e-5)
            else:
                assert result.numel() == 0
    for result, true in zip(package._fwd(image, text, scale, bias, offset), expected, strict=False):
        torch.testing.assert_close(result.double(), true, atol=1e-5, rtol=1e-5)


def test_nan_reaches_the_loss(backend: str, device: str):
    """A NaN swallowed by a maximum would let a diverged run look healthy."""
    image, text, scale, bias = inputs(70, 16, device=device)
    image[66, 3] = math.nan
    loss, d_image, *_ = value_and_gradients(ops.sigmoid_contrastive, (image, text, scale, bias))
    assert loss.isnan() and d_image.isnan().any()
    assert ops.sigmoid_contrastive(image, text, scale, bias).isnan()


@pytest.mark.parametrize(
    "trained", [("image",), ("text",), ("scale",), ("bias",), ("text", "bias")]
)
def test_frozen_inputs(backend: str, device: str, trained: tuple[str, ...]):
    """Whatever is frozen, the other gradients stay what they were."""
    names = ("image", "text", "scale", "bias")
    arguments = inputs(50, 16, device=device)
    gradients = value_and_gradients(ops.sigmoid_contrastive, arguments, 2.0)[1:]
    leaves = [x.clone().requires_grad_(n in trained) for n, x in zip(names, arguments, strict=True)]
    (2 * ops.sigmoid_contrastive(*leaves)).backward()
    for name, leaf, expected in zip(names, leaves, gradients, strict=True):
        if name in trained:
            torch.testing.assert_close(leaf.grad, expected, atol=1e-6, rtol=1e-5)
        else:
            assert leaf.grad is None


def test_forward_alone_is_the_same(backend: str, device: str):
    """Validation loss (no gradient, another kernel) must be the training loss."""
    arguments = inputs(150, 48, device=device)
    expected = value_and_gradients(ops.sigmoid_contrastive, arguments)[0]
    torch.testing.assert_close(ops.sigmoid_contrastive(*arguments), expected, atol=0, rtol=1e-6)
    again = value_and_gradients(ops.sigmoid_contrastive, arguments)
    for a, b in zip(value_and_gradients(ops.sigmoid_contrastive, arguments), again, strict=True):
        assert torch.equal(a, b)


def test_gradcheck(backend: str, device: str):
    """Analytic against numeric derivatives in fp64."""
    if backend == "triton":
        pytest.skip("the kernels have no fp64")
    arguments = inputs(5, 6, torch.float64, device, extra=2, bias=-1.0)
    leaves = [x.double().requires_grad_() for x in arguments]
    assert torch.autograd.gradcheck(ops.sigmoid_contrastive, leaves)


def test_second_derivative_raises():
    """A silent zero second derivative would corrupt gradient penalties."""
    arguments = [x.requires_grad_() for x in inputs(4, 4)]
    loss = ops.sigmoid_contrastive(*arguments)
    with pytest.raises(NotImplementedError, match="sigmoid_contrastive: the second derivative"):
        torch.autograd.grad(loss, arguments, create_graph=True)


def test_bad_arguments():
    """A wrong argument is named before anything runs (the shared checks: see test_info_nce)."""
    with pytest.raises(ValueError, match="sigmoid_contrastive: image needs at least one row"):
        ops.sigmoid_contrastive(torch.ones(0, 4), torch.ones(0, 4), 10.0, -10.0)
    with pytest.raises(TypeError, match="sigmoid_contrastive: logit_bias must be a number"):
        ops.sigmoid_contrastive(torch.ones(2, 4), torch.ones(2, 4), 10.0, None)  # type: ignore[arg-type]


@pytest.mark.skipif(INTERPRETED, reason="about the operator, not the kernel")
def test_operator():
    """opcheck, fullgraph compile and the FLOP formula (6 N² D): what torch asks of an operator."""
    from torch.utils.flop_counter import FlopCounterMode

    arguments = inputs(5, 6, extra=2)
    torch.library.opcheck(package._fwd, (*arguments, 1))
    for mask in ([True, True], [True, False], [False, False]):
        torch.library.opcheck(package._fwd_bwd, (*arguments, 1, mask))
    compiled = torch.compile(ops.sigmoid_contrastive, fullgraph=True, backend="aot_eager")
    expected = value_and_gradients(ops.sigmoid_contrastive, arguments)
    for a, b in zip(value_and_gradients(compiled, arguments), expected, strict=True):
        torch.testing.assert_close(a, b)
    arguments = [x.requires_grad_() for x in inputs(10, 8)]
    with FlopCounterMode(display=False) as counter:
        ops.sigmoid_contrastive(*arguments).backward()
    assert counter.get_total_flops() == 6 * 10 * 10 * 8
