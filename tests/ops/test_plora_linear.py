"""ops.plora_linear on every backend, against the masked formula in fp64."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from mmkern import ops
from mmkern.layout import VisualSpans
from mmkern.ops.plora_linear import reference
from tests.conftest import INTERPRETED
from tests.testing import AWKWARD, assert_within_budget, awkward

package = importlib.import_module("mmkern.ops.plora_linear")
# The interpreter has no bf16, and its launchers take no fp64.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
NAMES = ("x", "weight", "bias", "lora_a", "lora_b")


def problem(
    shape: tuple[int, ...],
    outputs: int,
    rank: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    """x [shape], and parameters that leave the numbers of x's size; lora_b is not zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, over: float = 1.0) -> Tensor:
        values = torch.randn(size, generator=generator, dtype=torch.float64) / over
        return values.to(device, dtype)

    features = shape[-1]
    return {
        "x": normal(*shape),
        "weight": normal(outputs, features, over=features**0.5),
        "bias": normal(outputs),
        "lora_a": normal(rank, features, over=features**0.5),
        "lora_b": normal(outputs, rank, over=rank**0.5),
    }


def dense(
    x: Tensor, weight: Tensor, bias: Tensor, lora_a: Tensor, lora_b: Tensor,
    mask: Tensor, scaling: float = 1.0, keep: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The formula on every row, with the adapter masked; `keep`: 0 or 1 / share, for dropout."""
    seen = x if keep is None else x * keep.to(x.dtype)
    adapter = F.linear(F.linear(seen, lora_a), lora_b) * scaling
    return F.linear(x, weight, bias) + torch.where(mask[..., None], adapter, 0)


def gradients(function, tensors, upstream, dtype=None, **kwargs):  # type: ignore[no-untyped-def]
    """[y, d x, d weight, ...] with inputs cast to `dtype` for the computation."""
    leaves = {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in tensors.items()}
    y = function(**leaves, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), upstream.to(y.dtype))]


def upstream_of(mask: Tensor, outputs: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    values = torch.randn(*mask.shape, outputs, generator=generator, dtype=torch.float64)
    return values.to(mask.device, dtype)


def check(tensors: dict[str, Tensor], mask: Tensor, scaling: float = 1.0) -> list[Tensor]:
    """Output and gradients within the budget."""
    outputs, dtype = tensors["weight"].shape[0], tensors["x"].dtype
    dy = upstream_of(mask, outputs, dtype)
    spans = VisualSpans.from_mask(mask.cpu()).to(mask.device)
    ours = gradients(ops.plora_linear, tensors, dy, spans=spans, scaling=scaling)
    exact = gradients(dense, tensors, dy, torch.float64, mask=mask, scaling=scaling)
    plain = gradients(dense, tensors, dy, mask=mask, scaling=scaling)
    for got, same, true in zip(ours, plain, exact, strict=True):
        assert_within_budget(got, same, true)
    return ours


def runs_mask(total: int, *runs: tuple[int, int]) -> Tensor:
    mask = torch.zeros(total, dtype=torch.bool)
    for start, stop in runs:
        mask[start:stop] = True
    return mask


MASKS = {
    "one run": runs_mask(300, (70, 200)),
    "two runs": runs_mask(300, (0, 100), (150, 300)),
    "short and long": runs_mask(300, (3, 5), (50, 180), (190, 191), (299, 300)),
    "checkerboard": torch.arange(300) % 2 == 1,
    "all": torch.ones(300, dtype=torch.bool),
    "one row": runs_mask(300, (128, 129)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_masks(backend: str, device: str, dtype: torch.dtype, kind: str):
    """A row taken for text, or text taken for an image, trains another model without complaint."""
    check(problem((300, 40), 48, 8, dtype, device), MASKS[kind].to(device), scaling=1.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 7, 8, 24, 100, 256, 300])
def test_ranks(backend: str, device: str, dtype: torch.dtype, rank: int):
    """The released 4KHD checkpoint mixes rank 8 at scale 2 with rank 256 at scale 1."""
    mask = runs_mask(90, (5, 80)).to(device)
    check(problem((90, 33), 40, rank, dtype, device), mask, scaling=2.0 if rank == 8 else 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "features", "outputs"),
    [(1, 1, 1), (2, 17, 3), (127, 64, 129), (128, 257, 17), (129, 130, 64), (260, 96, 300)],
)
def test_sizes(
    backend: str, device: str, dtype: torch.dtype, rows: int, features: int, outputs: int
):
    """A tile's edge or padding handled wrongly changes somebody's layer."""
    mask = runs_mask(rows, (rows // 4, rows)).to(device)
    check(problem((rows, features), outputs, 5, dtype, device), mask)


def test_batches(backend: str, device: str):
    """Runs are counted through the batch: one may go from a packed sample into the next."""
    tensors = problem((2, 3, 50, 24), 20, 4, device=device)
    spans = VisualSpans.from_lengths([30, 149, 200], [100, 7, 100], (2, 3, 50)).to(device)
    ours = gradients(
        ops.plora_linear, tensors, upstream_of(spans.to_mask(), 20, torch.float32), spans=spans
    )
    flat = tensors | {"x": tensors["x"].view(300, 24)}
    same = check(flat, spans.to_mask().view(300))
    for a, b in zip(ours, same, strict=True):
        torch.testing.assert_close(a.view(b.shape), b, atol=0, rtol=0)


def test_spans_masks_and_none_agree(backend: str, device: str):
    """Who has a mask and who has spans must train the same model."""
    tensors = problem((2, 75, 24), 30, 4, device=device)
    spans = VisualSpans.from_lengths([10, 80], [30, 5], (2, 75)).to(device)
    expected = ops.plora_linear(**tensors, spans=spans)
    assert torch.equal(ops.plora_linear(**tensors, spans=spans.to_mask()), expected)
    flat = tensors | {"x": tensors["x"].view(150, 24)}
    assert torch.equal(ops.plora_linear(**flat, spans=spans).view(2, 75, 30), expected)
    text = ops.plora_linear(**tensors, spans=None)
    assert torch.equal(text, F.linear(tensors["x"], tensors["weight"], tensors["bias"]))
    assert torch.equal(
        text, ops.plora_linear(**tensors, spans=VisualSpans.all_text((2, 75), device))
    )
    assert torch.equal(text[~spans.to_mask()], expected[~spans.to_mask()])


def test_rows_that_the_host_does_not_count(backend: str, device: str):
    """Spans made from a mask on the GPU end in -1, which must be no row, not the last one."""
    if backend == "cpp":
        pytest.skip("on a CPU the number of rows is known")
    tensors = problem((100, 24), 30, 4, device=device)
    mask = runs_mask(100, (10, 40), (60, 63)).to(device)
    known = VisualSpans.from_mask(mask.cpu()).to(device)
    padding = torch.full((67,), -1, dtype=torch.int32, device=device)
    padded = VisualSpans((100,), torch.cat([known.rows, padding]), None)
    assert torch.equal(padded.to_mask(), mask)
    dy = upstream_of(mask, 30, torch.float32)
    expected = gradients(ops.plora_linear, tensors, dy, spans=known)
    got = gradients(ops.plora_linear, tensors, dy, spans=padded)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_visual_row(backend: str, device: str, dtype: torch.dtype):
    """A batch of text must cost and give what the plain layer does; DDP still needs gradients."""
    tensors = problem((2, 40, 24), 30, 4, dtype, device)
    tensors["lora_b"][0, 0] = torch.inf  # upstream multiplies this by 0 in row 0
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    before = torch.get_rng_state()
    spans = VisualSpans.all_text((2, 40), device)
    y = ops.plora_linear(**leaves, spans=spans, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), before)
    plain = F.linear(leaves["x"], leaves["weight"], leaves["bias"])
    assert torch.equal(y, plain)
    dy = upstream_of(spans.to_mask(), 30, dtype)
    got = torch.autograd.grad(y, list(leaves.values()), dy)
    expected = torch.autograd.grad(plain, list(leaves.values())[:3], dy)
    for a, b in zip(got, expected, strict=False):
        torch.testing.assert_close(a, b)
    for gradient, name in zip(got[3:], NAMES[3:], strict=True):
        assert gradient.shape == leaves[name].shape and not gradient.any()


@pytest.mark.parametrize("shape", [(0,), (0, 7), (3, 0)])
def test_empty_batch(backend: str, device: str, shape: tuple[int, ...]):
    """The last batch of a shard can be empty; a crash there loses the run."""
    tensors = problem((*shape, 6), 5, 2, device=device)
    spans = VisualSpans.all_text(shape, device)
    dy = torch.ones(*shape, 5, device=device)
    y, *rest = gradients(ops.plora_linear, tensors, dy, spans=spans)
    assert y.shape == (*shape, 5) and rest[0].shape == (*shape, 6)
    assert not any(gradient.any() for gradient in rest)


@pytest.mark.parametrize("kind", [*AWKWARD, "expanded"])
def test_strides(backend: str, device: str, kind: str):
    """A slice of a larger tensor must give what its contiguous copy gives, and stay as it was."""
    tensors = problem((150, 40), 32, 6, device=device)
    if kind == "expanded":
        tensors["x"] = tensors["x"][:1].expand(150, 40)
        views = tensors
        tensors = tensors | {"x": tensors["x"].contiguous()}
    else:
        matrices = ("x", "weight", "lora_a", "lora_b")
        views = tensors | {name: awkward(kind, tensors[name]) for name in matrices}
    mask = runs_mask(150, (3, 90), (95, 97)).to(device)
    spans = VisualSpans.from_mask(mask.cpu()).to(device)
    dy = upstream_of(mask, 32, torch.float32)
    before = views["x"].clone()
    expected = gradients(ops.plora_linear, tensors, dy, spans=spans)
    dys = {"contiguous": dy, "awkward": awkward(kind, dy)} if kind != "expanded" else {"": dy}
    for upstream in dys.values():
        got = gradients(ops.plora_linear, views, upstream, spans=spans)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert torch.equal(views["x"], before)
    ones = torch.ones((), device=device).expand_as(dy)  # the gradient of y.sum()
    for a, b in zip(
        gradients(ops.plora_linear, views, ones, spans=spans),
        gradients(ops.plora_linear, tensors, ones.contiguous(), spans=spans),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_non_finite_text_stays_in_its_row(
    backend: str, device: str, dtype: torch.dtype, bad: float
):
    """A diverged text row must not reach the adapters through a product with 0."""
    tensors = problem((100, 24), 20, 4, dtype, device)
    mask = runs_mask(100, (10, 80), (85, 87)).to(device)
    spans = VisualSpans.from_mask(mask.cpu()).to(device)
    dy = upstream_of(mask, 20, dtype)
    fine = gradients(ops.plora_linear, tensors, dy, spans=spans)
    tensors["x"][84, 3] = bad
    dy[84, 5] = bad
    y, dx, _, _, da, db = gradients(ops.plora_linear, tensors, dy, spans=spans)
    others = torch.arange(100, device=device) != 84
    assert torch.equal(y[others], fine[0][others]) and torch.equal(dx[others], fine[1][others])
    assert torch.equal(da, fine[4]) and torch.equal(db, fine[5])
    assert not y[84].isfinite().all() and not dx[84].isfinite().all()


def test_large_values_in_half_precision(backend: str, device: str):
    """Sums are fp32: x of 200 in fp16 must not overflow on the way to a result that fits."""
    tensors = problem((80, 64), 20, 4, torch.float16, device)
    tensors["x"] *= 200
    check(tensors, runs_mask(80, (8, 80)).to(device), scaling=0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_shared_input(backend: str, device: str, dtype: torch.dtype, dropout_p: float):
    """Adapters of q, k and v in one call must be those of three calls, each with its rank."""
    sizes = [(20, 3, 1.0), (9, 8, 2.0), (9, 16, 0.5)]
    mask = runs_mask(100, (5, 90), (95, 96)).to(device)
    spans = VisualSpans.from_mask(mask.cpu()).to(device)
    layers = [problem((100, 40), n, r, dtype, device, seed=i) for i, (n, r, _) in enumerate(sizes)]
    layers[1]["bias"] = layers[1]["bias"].clone()
    x = layers[0]["x"]
    scales = [s for *_, s in sizes]
    torch.manual_seed(3)
    seed = package._draw_seed(torch.device(device))
    keep = None
    if dropout_p:
        threshold = round(65536 * dropout_p)
        row = torch.arange(100, device=device)
        keep = reference.kept(row, 40, threshold, seed) / (1 - threshold / 65536)

    def together(wide: torch.dtype | None, function) -> list[Tensor]:  # type: ignore[no-untyped-def]
        leaves = [
            {n: t.detach().to(wide or dtype).requires_grad_() for n, t in layer.items()}
            for layer in layers
        ]
        shared = x.detach().to(wide or dtype).requires_grad_()
        ys = function(shared, leaves)
        dys = [upstream_of(mask, y.shape[1], dtype).to(y.dtype) for y in ys]
        wanted = [shared, *(leaf[n] for leaf in leaves for n in NAMES[1:])]
        return [*(y.detach() for y in ys), *torch.autograd.grad(ys, wanted, dys)]

    def ours(shared: Tensor, leaves: list[dict[str, Tensor]]) -> tuple[Tensor, ...]:
        groups = {n: [leaf[n] for leaf in leaves] for n in NAMES[1:]}
        torch.manual_seed(3)
        return ops.plora_linear(shared, **groups, spans=spans, scaling=scales, dropout_p=dropout_p)

    def apart(shared: Tensor, leaves: list[dict[str, Tensor]]) -> list[Tensor]:
        return [
            dense(**leaf | {"x": shared}, mask=mask, scaling=s, keep=keep)
            for leaf, s in zip(leaves, scales, strict=True)
        ]

    exact, plain = together(torch.float64, apart), together(None, apart)
    for got, same, true in zip(together(None, ours), plain, exact, strict=True):
        assert_within_budget(got, same, true)


@pytest.mark.parametrize("features", [40, 300, 520])
def test_dropout_is_the_specified_mask(backend: str, device: str, features: int):
    """Forward and backward must drop the same features, on every backend the same ones."""
    tensors = problem((150, features), 32, 8, device=device)
    mask = runs_mask(150, (5, 90), (95, 96), (100, 101)).to(device)
    spans = VisualSpans.from_mask(mask.cpu()).to(device)
    torch.manual_seed(3)
    seed = package._draw_seed(torch.device(device))
    keep = reference.kept(torch.arange(150, device=device), features, 16384, seed) / 0.75
    dy = upstream_of(mask, 32, torch.float32)
    torch.manual_seed(3)
    ours = gradients(ops.plora_linear, tensors, dy, spans=spans, dropout_p=0.25)
    exact = gradients(dense, tensors, dy, torch.float64, mask=mask, keep=keep)
    plain = gradients(dense, tensors, dy, mask=mask, keep=keep)
    for got, same, true in zip(ours, plain, exact, strict=True):
        assert_within_budget(got, same, true)


def test_dropout_rate_and_seeds():
    """A biased or repeating mask would be another training recipe."""
    rows, features = torch.arange(700), 1000
    masks = [
        reference.kept(rows, features, round(65536 * 0.05), torch.tensor([seed]))
        for seed in (1, -(2**63) + 1)
    ]
    n = rows.numel() * features
    for mask in masks:
        assert abs(mask.float().mean().item() - 0.95) < 4 * (0.05 * 0.95 / n) ** 0.5 + 1e-5
        for dim in (0, 1):  # neither rows nor columns share a fate
            means = mask.float().mean(dim)
            expected = (0.05 * 0.95 / mask.shape[dim]) ** 0.5
            assert means.std().item() == pytest.approx(expected, rel=0.15)
    agree = (masks[0] == masks[1]).float().mean().item()
    assert abs(agree - (0.95**2 + 0.05**2)) < 4e-3


def test_philox_is_the_published_one():
    """Random123's known answer: a private variant of the generator has unknown quality."""
    zero = torch.zeros(1, 1, dtype=torch.int64)
    words = [int(word) for word in reference._philox(zero, zero, torch.zeros(1, dtype=torch.int64))]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_dropout_under_checkpoint(backend: str, device: str):
    """A recomputed forward with another mask gives gradients of no function at all."""
    tensors = problem((100, 40), 20, 4, device=device)
    spans = VisualSpans.from_lengths([20], [70], (100,)).to(device)
    dy = upstream_of(spans.to_mask(), 20, torch.float32)

    def layer(**leaves: Tensor) -> Tensor:
        return ops.plora_linear(**leaves, spans=spans, dropout_p=0.5)

    def recomputed(**leaves: Tensor) -> Tensor:
        def run(*values: Tensor) -> Tensor:
            return layer(**dict(zip(leaves, values, strict=True)))

        return checkpoint(run, *leaves.values(), use_reentrant=False)

    results = []
    for function in (layer, recomputed, layer):
        torch.manual_seed(5)
        results.append(gradients(function, tensors, dy))
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert not torch.equal(results[0][0], gradients(layer, tensors, dy)[0])  # the next seed


def test_dropout_of_everything(backend: str, device: str):
    """p = 1 is the plain layer, not a division by zero."""
    tensors = problem((90, 24), 20, 4, device=device)
    spans = VisualSpans.from_lengths([10], [70], (90,)).to(device)
    y = ops.plora_linear(**tensors, spans=spans, dropout_p=1.0)
    torch.testing.assert_close(y, F.linear(tensors["x"], tensors["weight"], tensors["bias"]))


@pytest.mark.parametrize(
    "wanted",
    [("lora_a", "lora_b"), ("x",), ("x", "lora_a", "lora_b"), ("lora_b",), ("lora_a",), ("bias",),
     ("weight", "lora_a", "lora_b"), NAMES, ()],
    ids="+".join,
)  # fmt: skip
@pytest.mark.parametrize("visual", [True, False])
def test_frozen_inputs(backend: str, device: str, wanted: tuple[str, ...], visual: bool):
    """What is frozen gets no gradient, and nothing is kept in memory for its sake."""
    tensors = problem((100, 40), 20, 4, device=device)
    rows = runs_mask(100, *([(5, 90)] if visual else [])).to(device)
    spans = VisualSpans.from_mask(rows.cpu()).to(device)
    dy = upstream_of(rows, 20, torch.float32)
    expected = gradients(ops.plora_linear, tensors, dy, spans=spans)[1:]
    leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in tensors.items()}
    saved: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks:
        y = ops.plora_linear(**leaves, spans=spans)
    known = {t.data_ptr() for t in leaves.values()} | {spans.rows.data_ptr()}
    new = [t for t in saved if t.data_ptr() not in known]
    assert [tuple(t.shape) for t in new] == ([(85, 4)] if visual and "lora_b" in wanted else [])
    pointers = [t.data_ptr() for t in saved]
    needs_x = "weight" in wanted or ("lora_a" in wanted and visual)
    assert (leaves["x"].data_ptr() in pointers) == needs_x
    assert (leaves["weight"].data_ptr() in pointers) == ("x" in wanted)
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.backward(dy)
    for (name, leaf), true in zip(leaves.items(), expected, strict=True):
        if name in wanted:
            torch.testing.assert_close(leaf.grad, true)
        else:
            assert leaf.grad is None


def test_adapters_of_another_dtype(backend: str, device: str):
    """Adapters kept in fp32 over a 16-bit model must get gradients in fp32."""
    half = torch.float16 if INTERPRETED else torch.bfloat16
    tensors = problem((100, 40), 20, 4, half, device)
    spans = VisualSpans.from_lengths([5], [80], (100,)).to(device)
    dy = upstream_of(spans.to_mask(), 20, half)
    same = gradients(ops.plora_linear, tensors, dy, spans=spans)
    mixed = tensors | {n: tensors[n].float() for n in ("lora_a", "lora_b")}
    got = gradients(ops.plora_linear, mixed, dy, spans=spans)
    assert [g.dtype for g in got] == [half] * 4 + [torch.float32] * 2
    for a, b in zip(got, same, strict=True):
        assert torch.equal(a.to(half), b)


def test_autocast(backend: str, device: str):
    """Under autocast fp32 parameters run in 16 bit like a matmul; gradients return in fp32."""
    if INTERPRETED:
        pytest.skip("the interpreter has no bf16")
    tensors = problem((100, 40), 20, 4, device=device)
    spans = VisualSpans.from_lengths([5], [80], (100,)).to(device)
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    with torch.autocast(device, dtype=torch.bfloat16):
        y = ops.plora_linear(**leaves, spans=spans)
    half = {n: t.detach().bfloat16() for n, t in leaves.items()}
    assert torch.equal(y, ops.plora_linear(**half, spans=spans))
    found = torch.autograd.grad(y.float().sum(), list(leaves.values()))
    assert all(gradient.dtype == torch.float32 for gradient in found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic(backend: str, device: str, dtype: torch.dtype):
    """Two runs must be bit-equal, or a resumed training run drifts from the first."""
    rows = 200 if INTERPRETED else 1500
    mask = runs_mask(rows, (5, rows // 2), (rows // 2 + 10, rows - 1))
    mask[:5] = torch.tensor([True, False, True, False, False])
    mask, tensors = mask.to(device), problem((rows, 48), 40, 12, dtype, device)
    spans, dy = VisualSpans.from_mask(mask.cpu()).to(device), upstream_of(mask, 40, dtype)
    results = []
    for _ in range(2):
        torch.manual_seed(2)
        results.append(gradients(ops.plora_linear, tensors, dy, spans=spans, dropout_p=0.1))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_poisoned_allocations(backend: str, device: str):
    """Scratch that is read before it is written shows as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        test_masks(backend, device, torch.float32, "short and long")
        test_shared_input(backend, device, torch.float16, 0.3)
    finally:
        torch.use_deterministic_algorithms(False)


def test_gradcheck(backend: str, device: str):
    """Analytic against numeric derivatives in fp64."""
    if backend == "triton":
        pytest.skip("the kernels have no fp64")
    tensors = problem((9, 6), 5, 3, torch.float64, device)
    spans = VisualSpans.from_lengths([1, 7], [4, 1], (9,)).to(device)
    leaves = [t.requires_grad_() for t in tensors.values()]

    def layer(*values: Tensor) -> Tensor:
        torch.manual_seed(0)
        return ops.plora_linear(*values, spans, scaling=1.5, dropout_p=0.3)

    assert torch.autograd.gradcheck(layer, leaves)


def test_second_derivative_raises(backend: str, device: str):
    """A silent zero second derivative would corrupt gradient penalties."""
    tensors = problem((9, 6), 5, 3, device=device)
    x = tensors["x"].requires_grad_()
    y = ops.plora_linear(**tensors, spans=VisualSpans.from_lengths([1], [4], (9,)).to(device))
    with pytest.raises(NotImplementedError, match="plora_linear: the second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_second_backward_with_retain_graph(backend: str, device: str):
    """A kernel that edits saved tensors in place would change the second gradient."""
    tensors = problem((90, 24), 20, 4, device=device)
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    spans = VisualSpans.from_lengths([5], [70], (90,)).to(device)
    y = ops.plora_linear(**leaves, spans=spans, dropout_p=0.2)
    wanted = list(leaves.values())
    first = torch.autograd.grad(y, wanted, torch.ones_like(y), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(y, wanted, torch.ones_like(y)), strict=True):
        assert torch.equal(a, b)


def test_no_host_synchronisation(backend: str, device: str):
    """Upstream waits for the GPU eight times a layer: none is allowed here."""
    if backend != "cuda":
        pytest.skip("about CUDA streams")
    tensors = problem((300, 64), 48, 8, torch.bfloat16, device)
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    mask = MASKS["short and long"].to(device)
    known = VisualSpans.from_mask(MASKS["two runs"]).to(device)
    dy = upstream_of(mask, 48, torch.bfloat16)
    for mode in ("default", "error"):  # the first round compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for spans in (known, VisualSpans.from_mask(mask), None):
                y = ops.plora_linear(**leaves, spans=spans, dropout_p=0.1)
                torch.autograd.grad(y, list(leaves.values()), dy)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph(backend: str, device: str):
    """A captured layer must follow the mask that its buffer holds when it is replayed."""
    if backend != "cuda":
        pytest.skip("about CUDA graphs")
    tensors = problem((300, 64), 48, 8, device=device)
    mask = MASKS["one run"].to(device)
    ops.plora_linear(**tensors, spans=mask)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.plora_linear(**tensors, spans=mask)
    for kind in MASKS:
        mask.copy_(MASKS[kind])
        graph.replay()
        torch.testing.assert_close(y, ops.plora_linear(**tensors, spans=mask))


@pytest.mark.skipif(INTERPRETED, reason="thousands of interpreted programs")
def test_far_offsets(backend: str, device: str):
    """Rows more than 2^31 elements apart: 32-bit address arithmetic reads elsewhere."""
    storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device=device)  # touched sparsely
    tensors = problem((3, 16), 5, 2, torch.bfloat16, device)
    far = torch.as_strided(storage, (3, 16), (2**30, 1))
    far.copy_(tensors["x"])
    spans = VisualSpans.from_lengths([1], [2], (3,)).to(device)
    dy = upstream_of(spans.to_mask(), 5, torch.bfloat16)
    x = far.requires_grad_()
    near = gradients(ops.plora_linear, tensors, dy, spans=spans)
    y = ops.plora_linear(**tensors | {"x": x}, spans=spans)
    assert torch.equal(y, near[0])
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], near[1])


SPANS = VisualSpans.from_lengths([1], [2], (3,))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a Tensor, got list"),
        ({"x": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "x must be one of"),
        ({"x": torch.ones(())}, ValueError, r"x must be \[..., K\], got shape \(\)"),
        ({"x": torch.ones(3, 0)}, ValueError, "x needs at least 1 feature"),
        ({"x": torch.ones(3, 5)}, ValueError, r"weight must be \[N, K\] = \(6, 5\), got \(6, 4\)"),
        ({"x": torch.ones(3, 4).half()}, TypeError, "x is torch.float16 but weight is torch.fl"),
        ({"bias": torch.ones(5)}, ValueError, r"bias must be \[N\] = \(6,\), got \(5,\)"),
        ({"lora_a": torch.ones(2, 5)}, ValueError, r"lora_a must be \[r, K\] = \(2, 4\)"),
        ({"lora_b": torch.ones(6, 3)}, ValueError, r"lora_b must be \[N, r\] = \(6, 2\)"),
        ({"lora_a": torch.ones(0, 4), "lora_b": torch.ones(6, 0)}, ValueError, "needs a rank of"),
        ({"lora_b": torch.ones(6, 2).int()}, TypeError, "lora_b must be one of"),
        ({"spans": VisualSpans.all_text((4,))}, ValueError, r"leading shape \(3,\), got \(4,\)"),
        ({"spans": torch.ones(3)}, TypeError, "bool mask .* got a Tensor of torch.float32"),
        ({"spans": torch.ones(2, 2).bool()}, ValueError, r"leading shape \(3,\), got \(2, 2\)"),
        ({"spans": [0, 1]}, TypeError, "spans must be VisualSpans, a bool mask or None, got list"),
        ({"spans": SPANS.to("meta")}, ValueError, "x is on cpu but spans are on meta"),
        ({"scaling": "1"}, TypeError, "scaling must be a number, got str"),
        ({"scaling": [1.0, 2.0]}, ValueError, "scaling must have an entry for each of 1 weights"),
        ({"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\], got 1.5"),
        ({"weight": [torch.ones(6, 4)]}, TypeError, "lora_a must be a sequence of Tensors"),
    ],
)  # fmt: skip
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str):
    """A wrong argument is named before anything runs, with what was expected and got."""
    arguments = problem((3, 4), 6, 2) | {"spans": SPANS} | change
    with pytest.raises(error, match=f"plora_linear: .*{message}"):
        ops.plora_linear(**arguments)


def test_transposed_batch_is_refused():
    """A [L, B] mask has as many rows as the [B, L] batch, and marks others of them."""
    tensors = problem((2, 3, 4), 6, 2)
    with pytest.raises(ValueError, match=r"leading shape \(2, 3\), got \(3, 2\)"):
        ops.plora_linear(**tensors, spans=torch.ones(3, 2, dtype=torch.bool))


@pytest.mark.skipif(INTERPRETED, reason="about the operator, not the kernel")
class TestOperator:
    """What torch asks of an operator besides its numbers."""

    def test_opcheck(self):
        """A wrong schema, fake or alias breaks torch.compile and export."""
        tensors = problem((2, 9, 6), 5, 3)
        rows, seed = torch.tensor([1, 2, 3, 16], dtype=torch.int32), torch.tensor([7])
        x, w, bias, a, b = tensors.values()
        h = torch.ones(4, 6)
        a = torch.cat([a, a])
        for threshold, key in ((0, None), (9000, seed)):
            options = (rows, [1.0, 0.5], threshold, key)
            torch.library.opcheck(package._fwd, (x, [w, w], [bias, None], a, [b, b], *options))
            dy = torch.ones(2, 9, 5)
            for mask in ([True] * 5, [True, False, False, True, True], [False] * 5):
                arguments = (a, [dy, dy], x, [w, w], [b, b], h, *options, mask)
                torch.library.opcheck(package._bwd, arguments)

    def test_compile(self):
        """A graph break in a layer would split every compiled training step, and a compilation for
        every batch's spans would never end."""
        counter = CompileCounterWithBackend("aot_eager")

        def layer(spans: VisualSpans, **tensors: Tensor) -> Tensor:
            return ops.plora_linear(**tensors, spans=spans, scaling=0.5)

        compilations = 0
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
        for rows, starts, lengths in (
            (40, [3], [20]), (40, [5, 30], [20, 3]), (60, [0], [60]), (50, [9, 20], [5, 2]),
        ):  # fmt: skip
            tensors = problem((rows, 8), 6, 3)
            spans = VisualSpans.from_lengths(starts, lengths, (rows,))
            dy = upstream_of(spans.to_mask(), 6, torch.float32)
            expected = gradients(layer, tensors, dy, spans=spans)
            got = gradients(compiled, tensors, dy, spans=spans)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b)
            compilations = compilations or counter.frame_count
        assert counter.frame_count == compilations

    def test_flops(self):
        """An operator that counts as zero FLOPs silently ruins reported utilisation."""
        from torch.utils.flop_counter import FlopCounterMode

        tensors = problem((40, 8), 6, 3)
        leaves = {n: t.requires_grad_(n != "weight") for n, t in tensors.items()}
        with FlopCounterMode(display=False) as counter:
            spans = VisualSpans.from_lengths([5], [20], (40,))
            ops.plora_linear(**leaves, spans=spans).sum().backward()
        adapter = 20 * 3 * (8 + 6)
        assert counter.get_total_flops() == 2 * (2 * 40 * 8 * 6 + 3 * adapter)
