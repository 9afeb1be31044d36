"""ops.query_info_nce on every backend, against the dense formula in fp64."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkern import ops
from mmkern.ops.query_info_nce import reference
from tests.conftest import INTERPRETED
from tests.testing import assert_within_budget, awkward, unit_features

package = importlib.import_module("mmkern.ops.query_info_nce")
# The interpreter has no bf16, and its launchers take no fp64.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


def pairs(
    rows: int, count: int, width: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Queries [rows, count, width] and texts [rows, width] of about unit norm.

    Multiples of 1/256: fp32 sums of their products are exact in any order, so every backend finds
    the same best query, ties included.
    """
    queries = unit_features(rows * count, width, torch.float64).view(rows, count, width)
    text = unit_features(rows, width, torch.float64, seed=1)
    queries, text = ((x * 256).round().div(256).to(device, dtype) for x in (queries, text))
    return queries, text


def dense(
    queries: Tensor,
    text: Tensor,
    scale: Tensor,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    detach_columns: bool = False,
) -> Tensor:
    """The formula with the [N, N, Q] products, as BLIP-2's reference implementation has it."""

    def logits(queries: Tensor, text: Tensor) -> Tensor:
        return scale * torch.einsum("iqd,jd->ijq", queries, text).max(2).values

    rows, columns = logits(queries, text), logits(queries, text).T
    if detach_columns:
        rows, columns = logits(queries, text.detach()), logits(queries.detach(), text).T
    if ids is None:
        ids = torch.arange(len(text), device=text.device)
    target = (ids[:, None] == ids).to(rows.dtype)
    target = (1 - label_smoothing) * target / target.sum(1, keepdim=True)
    target = target + label_smoothing / len(text)
    return (F.cross_entropy(rows, target) + F.cross_entropy(columns, target)) / 2


def ours(*inputs: Tensor, **options) -> Tensor:  # type: ignore[no-untyped-def]
    return ops.query_info_nce(*inputs, **options).loss


def value_and_gradients(function, *inputs, upstream=1.0, dtype=None, **options):  # type: ignore[no-untyped-def]
    """[loss, d queries, d text, d scale] with inputs cast to `dtype` for the computation."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    loss = function(*leaves, **options)
    return [loss.detach(), *torch.autograd.grad(loss * upstream, leaves)]


def check(queries, text, scale, **options):  # type: ignore[no-untyped-def]
    """Loss and gradients within the budget: fp32 arithmetic on the same rounded inputs."""
    inputs = (queries, text, scale)
    found = value_and_gradients(ours, *inputs, **options)
    exact = value_and_gradients(dense, *inputs, dtype=torch.float64, **options)
    plain = value_and_gradients(dense, *inputs, dtype=torch.float32, **options)
    # The scale's gradient is a sum of products that cancel; weights are held in the texts' dtype.
    terms = (exact[2] * text).abs().sum().item() / abs(scale.item() or 1.0)
    terms = max(terms, exact[3].abs().item())
    terms *= torch.finfo(text.dtype).eps / torch.finfo(found[3].dtype).eps
    for got, same, true, size in zip(found, plain, exact, (None, None, None, terms), strict=True):
        assert_within_budget(got, same.to(got.dtype), true, size)
    return found


SIZES = [
    (1, 1, 1),  # no negative at all
    (2, 1, 4),
    (5, 3, 7),  # odd everywhere
    (33, 32, 24),  # BLIP-2's number of queries
    (67, 4, 40),
    (130 if not INTERPRETED else 30, 5, 20),  # queries of an image in two tiles
    (20, 65, 100),
    (9, 256, 16),  # as many queries as a byte counts
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(backend: str, device: str, dtype: torch.dtype, size: tuple[int, int, int]):
    """A tile edge or padding handled wrongly changes somebody's loss or gradients."""
    check(*pairs(*size, dtype, device), torch.tensor(14.3, device=device), upstream=1.7)


@pytest.mark.skipif(INTERPRETED, reason="thousands of interpreted programs")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
def test_large_sizes(
    backend: str, device: str, dtype: torch.dtype, kept: bool, monkeypatch: pytest.MonkeyPatch
):
    """Statistics carried across tiles and bands must merge to those of the whole matrix, and a
    backward that computes similarities again must find the same ones."""
    monkeypatch.setattr(package, "_keep", lambda queries, texts: kept)
    monkeypatch.setattr(reference, "LOGITS", 1 << 17)
    ids = torch.arange(600, device=device) % 431
    check(
        *pairs(600, 32, 48, dtype, device),
        torch.tensor(100.0, device=device),
        label_smoothing=0.1,
        ids=ids,
    )


def test_packed_tiles_anywhere(backend: str):
    """Packing and padding for bf16 hardware, on any machine: a plain loop stands in for it."""
    if backend != "cpp":
        pytest.skip("about the C++ kernels")
    extension = importlib.import_module("mmkern._C")
    extension.force_tile_path("portable")
    try:
        for size in SIZES:
            check(*pairs(*size, torch.bfloat16), torch.tensor(14.3), label_smoothing=0.1)
        check(*pairs(300, 3, 7, torch.bfloat16), torch.tensor(14.3))  # two strips of texts
    finally:
        extension.force_tile_path("auto")


@pytest.mark.parametrize("detach", [False, True], ids=["whole", "detached"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ids", ["own", "pairs", "few", "same"])
def test_targets(backend: str, device: str, ids: str, smoothing: float, detach: bool):
    """BLIP-2's soft targets and its detached columns: the loss people reproduce papers with."""
    rows = 40
    options = {
        "own": None,
        "pairs": torch.arange(rows) // 2 - 2**40,  # ids beyond 32 bits, negative
        "few": torch.arange(rows) % 3 + 2**33 * (torch.arange(rows) % 2),
        "same": torch.zeros(rows, dtype=torch.int32),
    }
    found = options[ids]
    check(
        *pairs(rows, 3, 24, device=device),
        torch.tensor([30.0], device=device),
        label_smoothing=smoothing,
        ids=None if found is None else found.to(device),
        detach_columns=detach,
    )


def test_one_pair(backend: str, device: str):
    """A batch of one has no negative: exact zeros, and -1 where a negative was asked for."""
    queries, text = pairs(1, 32, 8, device=device)
    scale = torch.tensor(100.0, device=device)
    for smoothing in (0.0, 0.1):
        for value in value_and_gradients(ours, queries, text, scale, label_smoothing=smoothing):
            assert torch.count_nonzero(value) == 0
    result = ops.query_info_nce(queries, text, scale, label_smoothing=0.1, negatives_seed=3)
    assert result.negative_images.tolist() == result.negative_texts.tolist() == [-1]


def test_one_query_is_info_nce(backend: str, device: str):
    """With Q = 1 the maximum is gone, and what is left is CLIP's loss."""
    queries, text = pairs(70, 1, 24, device=device)
    scale = torch.tensor(20.0, device=device)
    expected = value_and_gradients(ops.info_nce, queries[:, 0], text, scale, label_smoothing=0.1)
    found = value_and_gradients(ours, queries, text, scale, label_smoothing=0.1)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.flatten(), b.flatten(), rtol=1e-5, atol=1e-6)


def test_ties_go_to_the_first_query(backend: str, device: str):
    """Queries start alike and keep ties: a backward that picks another one than the forward, or
    shares the gradient out, trains differently on every backend."""
    queries, text = pairs(40, 1, 16, device=device)
    queries = queries.repeat(1, 7, 1)
    queries[:, :2] *= -1  # so the first of the equal best is query 2, wherever 2 beats 0
    found = check(queries, text, torch.tensor(9.0, device=device))
    assert torch.count_nonzero(found[1][:, [1, 3, 4, 5, 6]]) == 0
    assert found[1][:, 0].abs().sum() > 0 and found[1][:, 2].abs().sum() > 0


def test_identical_features(backend: str, device: str):
    """Collapsed towers: the loss is ln N, and the draws are still of others."""
    queries, text = (x.expand(50, *x.shape[1:]) for x in pairs(1, 4, 32, device=device))
    loss, d_queries, d_text, _ = value_and_gradients(
        ours, queries, text, torch.tensor(100.0, device=device)
    )
    assert abs(loss.item() - math.log(50)) < 1e-5
    assert d_text.abs().max() < 1e-4 and d_queries.abs().max() < 1e-4
    result = ops.query_info_nce(queries, text, 100.0, negatives_seed=0)
    own = torch.arange(50, device=device)
    for draws in result[1:]:
        assert ((draws >= 0) & (draws < 50) & (draws != own)).all()
        assert len(draws.unique()) > 10


def test_tiny_loss_keeps_its_digits(backend: str, device: str):
    """LSE - S_ii would round a well-trained pair's loss of 1e-7 to noise; log1p must not, nor may
    the gradient be the difference of two ones."""
    rows = 64
    text = torch.eye(rows, device=device)
    queries = torch.stack([torch.zeros_like(text), text], 1)
    loss, d_queries, *_ = value_and_gradients(
        ours, queries, text, torch.tensor(20.0, device=device)
    )
    miss = (rows - 1) * math.exp(-20)
    assert abs(loss.item() / math.log1p(miss) - 1) < 1e-3
    gradient = -20 / rows * miss / (1 + miss)
    assert (d_queries[:, 1].diagonal() / gradient - 1).abs().max() < 1e-3


def test_opposite_towers(backend: str, device: str):
    """All logits -100: a padded text or query read as logit 0 would win every softmax."""
    text = unit_features(1, 16, device=device).repeat(70, 1)
    loss = ours(-text[:, None].repeat(1, 3, 1), text, torch.tensor(100.0, device=device))
    assert abs(loss.item() - math.log(70)) < 1e-5


@pytest.mark.parametrize("value", [0.0, -5.0])
def test_scale_values(backend: str, device: str, value: float):
    """The maximum is over products: a negative scale must not make it one over other queries."""
    check(*pairs(20, 5, 16, device=device), torch.tensor(value, device=device))


def test_scale_forms(backend: str, device: str):
    """0-d and [1] scales, numbers: one loss, the gradient in its shape and dtype."""
    queries, text = pairs(20, 3, 16, device=device)
    expected = ours(queries, text, 12.5)
    for scale in (torch.tensor(12.5), torch.tensor([12.5]), torch.tensor(12.5).half()):
        scale = scale.to(device).requires_grad_()
        loss = ours(queries, text, scale)
        torch.testing.assert_close(loss, expected, atol=0, rtol=0)
        (gradient,) = torch.autograd.grad(loss, scale)
        assert gradient.shape == scale.shape and gradient.dtype == scale.dtype


@pytest.mark.parametrize("kind", ["padded rows", "every second row", "transposed"])
def test_strides(backend: str, device: str, kind: str):
    """A slice of a larger tensor must give what its contiguous copy gives, to the bit."""
    queries, text = pairs(37, 6, 24, device=device)
    scale = torch.tensor(14.3, device=device)
    expected = value_and_gradients(ours, queries, text, scale)
    leaves = [
        awkward(kind, queries.flatten(1)).unflatten(1, (6, 24)).requires_grad_(),
        awkward(kind, text).requires_grad_(),
    ]
    loss = ours(*leaves, scale)
    for a, b in zip([loss.detach(), *torch.autograd.grad(loss, leaves)], expected, strict=False):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["query", "text"])
def test_non_finite_features(backend: str, device: str, where: str, bad: float):
    """A NaN or infinity must reach the loss as in torch, and must not be drawn."""
    queries, text = pairs(40, 4, 16, device=device)
    scale = torch.tensor(5.0, device=device)
    (queries if where == "query" else text)[17].fill_(bad)
    assert dense(queries, text, scale).isnan()
    loss, d_queries, d_text, _ = value_and_gradients(ours, queries, text, scale)
    assert loss.isnan() and d_queries.isnan().any() and d_text.isnan().any()
    result = ops.query_info_nce(queries, text, scale, negatives_seed=1)
    if math.isnan(bad):
        of_bad, others = result[1:] if where == "text" else result[:0:-1]
        assert of_bad[17] == -1 and (others != 17).all()


def test_half_precision_upstream(backend: str, device: str):
    """A gradient scaler's 65,536 must not overflow fp16 on the way to gradients that fit."""
    queries, text = pairs(128, 4, 64, torch.float16, device)
    check(queries, text, torch.tensor(100.0, device=device), upstream=65536.0)


@pytest.mark.parametrize("frozen", ["queries", "text", "scale", "both towers"])
@pytest.mark.parametrize("detach", [False, True], ids=["whole", "detached"])
def test_frozen_inputs(backend: str, device: str, frozen: str, detach: bool):
    """A frozen tower leaves the other gradients what they were."""
    queries, text = pairs(30, 3, 16, device=device)
    inputs = {"queries": queries, "text": text, "scale": torch.tensor(10.0, device=device)}
    whole = value_and_gradients(ours, *inputs.values(), detach_columns=detach)
    expected = dict(zip(inputs, whole[1:], strict=True))
    trained = [n for n in inputs if n != frozen and not (frozen == "both towers" and n != "scale")]
    leaves = {name: x.clone().requires_grad_(name in trained) for name, x in inputs.items()}
    ours(*leaves.values(), detach_columns=detach).backward()
    for name, leaf in leaves.items():
        if name in trained:
            torch.testing.assert_close(leaf.grad, expected[name], atol=1e-6, rtol=1e-5)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic(backend: str, device: str, dtype: torch.dtype):
    """Two runs must be bit-equal, or a resumed training run drifts from the first."""
    rows = 70 if INTERPRETED else 500
    inputs = (*pairs(rows, 8, 48, dtype, device), torch.tensor(50.0, device=device))
    first = value_and_gradients(ours, *inputs)
    for a, b in zip(first, value_and_gradients(ours, *inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("detach", [False, True], ids=["whole", "detached"])
def test_gradcheck(
    backend: str, device: str, kept: bool, detach: bool, monkeypatch: pytest.MonkeyPatch
):
    """Analytic against numeric derivatives in fp64 (detached: of the scale, which is whole)."""
    if backend == "triton":
        pytest.skip("the kernels have no fp64")
    monkeypatch.setattr(package, "_keep", lambda queries, texts: kept)
    queries = unit_features(15, 6, torch.float64, device).view(5, 3, 6)
    text = unit_features(5, 6, torch.float64, device, seed=1)
    scale = torch.tensor(3.0, dtype=torch.float64, device=device, requires_grad=True)
    ids = torch.tensor([4, 7, 4, 1, 0], device=device)
    options = {"label_smoothing": 0.2, "ids": ids, "detach_columns": detach}
    queries, text = queries.requires_grad_(not detach), text.requires_grad_(not detach)
    assert torch.autograd.gradcheck(lambda *x: ours(*x, **options), (queries, text, scale))


def test_second_derivative_raises(backend: str, device: str):
    """A silent zero second derivative would corrupt gradient penalties."""
    queries, text = pairs(4, 2, 4, device=device)
    loss = ours(queries.requires_grad_(), text, 5.0)
    with pytest.raises(NotImplementedError, match="query_info_nce: the second derivative"):
        torch.autograd.grad(loss, queries, create_graph=True)


def test_second_backward_with_retain_graph(backend: str, device: str):
    """A kernel that edits saved tensors in place would change the second gradient."""
    inputs = [x.requires_grad_() for x in pairs(20, 3, 8, device=device)]
    loss = ours(*inputs, 9.0)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, inputs), strict=True):
        assert torch.equal(a, b)


def test_autocast(backend: str, device: str):
    """Under autocast the fp32 features run in 16 bit like a matmul; gradients return in fp32."""
    if INTERPRETED:
        pytest.skip("the interpreter has no bf16")
    queries, text = pairs(40, 3, 16, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = ours(queries.requires_grad_(), text, 10.0)
    assert torch.equal(loss, ours(queries.bfloat16(), text.bfloat16(), 10.0))
    assert torch.autograd.grad(loss, queries)[0].dtype == torch.float32


def test_poisoned_allocations(backend: str, device: str):
    """Scratch that is read before it is written shows as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for dtype in DTYPES:
            inputs = (*pairs(67, 5, 20, dtype, device), torch.tensor(9.0, device=device))
            check(*inputs, label_smoothing=0.1)
            draws = ops.query_info_nce(*inputs, negatives_seed=5)[1:]
            assert all(((x >= 0) & (x < 67)).all() for x in draws)
    finally:
        torch.use_deterministic_algorithms(False)


def test_no_host_synchronisation(backend: str, device: str):
    """A training step must not wait for the GPU inside the loss, draws included."""
    if backend != "cuda":
        pytest.skip("about CUDA streams")
    inputs = [x.requires_grad_() for x in pairs(40, 32, 64, torch.bfloat16, device)]
    scale = torch.tensor(30.0, device=device, requires_grad=True)
    ids, seed = torch.arange(40, device=device) // 2, torch.tensor(3, device=device)
    for mode in ("default", "error"):  # the first call compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            result = ops.query_info_nce(*inputs, scale, ids=ids, negatives_seed=seed)
            result.loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


class TestNegatives:
    """The draws: exact, reproducible, never a positive."""

    @staticmethod
    def philox(i: int, j: int, key: int) -> tuple[int, int]:
        """Philox2x32-10 as its authors write it."""
        for _ in range(10):
            product = 0xD256D193 * i
            i, j = (product >> 32) ^ key ^ j, product & 0xFFFFFFFF
            key = (key + 0x9E3779B9) & 0xFFFFFFFF
        return i, j

    @pytest.mark.parametrize(
        ("i", "j", "key", "words"),
        [
            (0, 0, 0, (0xFF1DAE59, 0x6CD10DF2)),
            (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, (0x2C3F628B, 0xAB4FD7AD)),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, (0xDD7CE038, 0xF62A4C12)),
        ],
    )
    def test_generator(self, i: int, j: int, key: int, words: tuple[int, int]):
        """The published known answers: a mistyped constant would weaken the generator unseen."""
        assert self.philox(i, j, key) == words
        found = reference._philox(torch.tensor(i), torch.tensor(j), torch.tensor(key))
        assert tuple(found.tolist()) == words

    @pytest.mark.parametrize("seed", [0, 1, -7, 2**62 + 12345])
    def test_recipe(self, backend: str, device: str, seed: int):
        """Gumbel-max by hand: every backend must draw what the documents say, so that a run can be
        moved from one to another."""
        rows, s = 17 if INTERPRETED else 41, 10.0
        queries, text = pairs(rows, 3, 16, device=device)
        ids = torch.arange(rows) // 2
        logits = s * torch.einsum("iqd,jd->ijq", queries.double(), text.double()).amax(2).cpu()
        key = (seed ^ (seed >> 32)) & 0xFFFFFFFF
        noise = torch.empty(2, rows, rows, dtype=torch.float64)
        for i in range(rows):
            for j in range(rows):
                for d, word in enumerate(self.philox(i, j, key)):
                    v = (word + 0.5) * 2.0**-32
                    noise[d, i, j] = math.log(-math.log1p(-v))
        keys = (noise - logits).masked_fill(ids[:, None] == ids, math.inf)
        for form in (seed, torch.tensor(seed), torch.tensor([seed], device=device)):
            result = ops.query_info_nce(queries, text, s, ids=ids.to(device), negatives_seed=form)
            assert torch.equal(result.negative_texts.cpu(), keys[0].argmin(1))
            assert torch.equal(result.negative_images.cpu(), keys[1].argmin(0))

    @pytest.mark.skipif(INTERPRETED, reason="thousands of interpreted programs")
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_distribution(self, backend: str, device: str, dtype: torch.dtype):
        """Chi-square of 2,000 draws from a known softmax, in both directions."""
        rows, kinds = 2000, 8
        kind = torch.arange(rows, device=device) % kinds
        logits = torch.linspace(-1.5, 1.5, kinds, device=device)
        one = torch.ones(rows, 1, 1, dtype=dtype, device=device)
        values = logits[kind].to(dtype)
        weights = values.double().exp()
        for axis in (0, 1):
            inputs = (one, values[:, None]) if axis == 0 else (values[:, None, None], one[:, 0])
            result = ops.query_info_nce(*inputs, 1.0, negatives_seed=11)
            draws = result.negative_texts if axis == 0 else result.negative_images
            assert (draws != torch.arange(rows, device=device)).all()
            # Each row leaves out its own pair: expectations summed over rows.
            remaining = weights.sum() - weights
            expected = torch.zeros(kinds, dtype=torch.float64, device=device)
            for k in range(kinds):
                of_kind = weights[k] * ((kind == k).sum() - (kind == k).double())
                expected[k] = (of_kind / remaining).sum()
            seen = torch.bincount(kind[draws], minlength=kinds).double()
            statistic = ((seen - expected) ** 2 / expected).sum().item()
            assert statistic < 24.3  # chi-square, 7 degrees of freedom: p = 1e-3

    def test_positives_are_never_drawn(self, backend: str, device: str):
        """A positive as a negative teaches the matching head that a right caption is wrong; the
        positives here have nearly all the mass."""
        rows = 48
        ids = torch.arange(rows, device=device) // 16
        queries, text = pairs(rows, 2, 16, device=device)
        text[:] = torch.eye(16, device=device)[ids]
        queries[:] = text[:, None]
        for seed in range(2 if INTERPRETED else 40):
            result = ops.query_info_nce(queries, text, 100.0, ids=ids, negatives_seed=seed)
            for draws in result[1:]:
                assert ((draws >= 0) & (ids[draws] != ids)).all()

    def test_no_negative(self, backend: str, device: str):
        """Where every pair is a positive there is none to draw: -1, not a positive, silently."""
        queries, text = pairs(6, 3, 8, device=device)
        ids = torch.full((6,), 5, device=device)
        result = ops.query_info_nce(queries, text, 10.0, ids=ids, negatives_seed=0)
        assert result.negative_images.tolist() == result.negative_texts.tolist() == [-1] * 6
        one_apart = torch.tensor([5, 5, 5, 9, 5, 5], device=device)
        result = ops.query_info_nce(queries, text, 1000.0, ids=one_apart, negatives_seed=0)
        assert result.negative_texts[[0, 1, 2, 4, 5]].tolist() == [3] * 5
        assert result.negative_texts[3] != 3 and result.negative_images[3] != 3

    def test_seed_is_all_that_matters(self, backend: str, device: str):
        """Same seed, same draws, gradients wanted or not; another seed, others; no seed, none."""
        queries, text = pairs(60, 2, 16, device=device)
        first = ops.query_info_nce(queries, text, 1.0, negatives_seed=4)
        again = ops.query_info_nce(queries.requires_grad_(), text, 1.0, negatives_seed=4)
        other = ops.query_info_nce(queries, text, 1.0, negatives_seed=5)
        for a, b, c in zip(first[1:], again[1:], other[1:], strict=True):
            assert torch.equal(a, b) and not torch.equal(a, c) and a.dtype == torch.int64
        assert ops.query_info_nce(queries, text, 1.0)[1:] == (None, None)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"queries": torch.ones(0, 2, 4), "text": torch.ones(0, 4)},
            ValueError,
            "at least one row",
        ),
        ({"queries": torch.ones(3, 2, 5)}, ValueError, "one width, got 5 and 4"),
        ({"queries": torch.ones(3, 4)}, ValueError, r"queries must be \[N, Q, D\], got shape"),
        ({"text": torch.ones(3, 1, 4)}, ValueError, r"text must be \[N, D\], got shape"),
        ({"text": torch.ones(4, 4)}, ValueError, "a row for each of the 3 images, got 4"),
        ({"queries": torch.ones(3, 0, 4)}, ValueError, "1 to 256 vectors, got 0"),
        ({"queries": torch.ones(3, 257, 4)}, ValueError, "1 to 256 vectors, got 257"),
        ({"queries": torch.ones(3, 2, 0), "text": torch.ones(3, 0)}, ValueError, "width of at"),
        ({"queries": torch.ones(3, 2, 4).half()}, TypeError, "queries is torch.float16 but text"),
        ({"text": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "text must be one of"),
        ({"queries": [[1.0]]}, TypeError, "queries must be a Tensor, got list"),
        ({"logit_scale": torch.ones(2)}, ValueError, r"logit_scale must have shape \[\] or \[1\]"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"ids": torch.ones(2, dtype=torch.int64)}, ValueError, r"ids must have shape \(3,\)"),
        ({"ids": torch.ones(3)}, TypeError, "ids must be integers, got torch.float32"),
        ({"ids": ["a", "b", "c"]}, TypeError, "ids must be a Tensor of integers, got list"),
        ({"negatives_seed": 0.5}, TypeError, "negatives_seed must be an integer, got float"),
        ({"negatives_seed": True}, TypeError, "negatives_seed must be an integer, got bool"),
        ({"negatives_seed": torch.ones(1)}, TypeError, "negatives_seed must be an integer, got"),
        ({"negatives_seed": torch.ones(2).int()}, ValueError, "must have one element"),
        ({"negatives_seed": 2**63}, ValueError, "must fit in 64 bits"),
    ],
)
def test_bad_arguments(change: dict, error: type[Exception], message: str):
    """A wrong argument is named before anything runs, with what was expected and got."""
    arguments = {"queries": torch.ones(3, 2, 4), "text": torch.ones(3, 4), "logit_scale": 10.0}
    with pytest.raises(error, match=f"query_info_nce: .*{message}"):
        ops.query_info_nce(**(arguments | change))


@pytest.mark.skipif(INTERPRETED, reason="about the operator, not the kernel")
class TestOperator:
    """What torch asks of an operator besides its numbers."""

    def test_opcheck(self):
        """A wrong schema, fake or alias breaks torch.compile and export."""
        queries, text = pairs(5, 3, 6)
        text = awkward("transposed", torch.cat([text, text[:2]]))
        scale, ids, seed = torch.tensor(3.0), torch.tensor([1, 2, 3, 1, 5, 6, 7]), torch.tensor(9)
        for keep, given in ((True, seed), (False, None)):
            torch.library.opcheck(package._fwd, (queries, text, scale, ids, 1, keep, given))
        stats, _, _, dots, best = package._fwd(queries, text, scale, ids, 1, True)
        torch.library.opcheck(package._loss, (stats[:, :5], 0.1, 7))
        for mask in ([True, True], [True, False], [False, True]):
            arguments = (queries, text, scale, ids, 1, stats, scale, 2, 0.1, False, mask)
            torch.library.opcheck(package._bwd, arguments)
            torch.library.opcheck(package._bwd, (*arguments, dots, best))

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compile(self, dynamic: bool):
        """A graph break in the loss would split every compiled training step."""

        def call(queries, text, scale):  # type: ignore[no-untyped-def]
            return ops.query_info_nce(queries, text, scale, label_smoothing=0.1, negatives_seed=3)

        compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for rows in (6, 9):
            inputs = (*pairs(rows, 3, 8), torch.tensor(5.0))
            for a, b in zip(compiled(*inputs), call(*inputs), strict=True):
                torch.testing.assert_close(a, b)
            expected = value_and_gradients(lambda *x: call(*x).loss, *inputs)
            got = value_and_gradients(lambda *x: compiled(*x).loss, *inputs)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b)

    @pytest.mark.parametrize(("kept", "work"), [(True, 2 * 3 + 4), (False, 4 * 3 + 4)])
    def test_flops(self, monkeypatch: pytest.MonkeyPatch, kept: bool, work: int):
        """An operator that counts as zero FLOPs silently ruins reported utilisation."""
        from torch.utils.flop_counter import FlopCounterMode

        monkeypatch.setattr(package, "_keep", lambda queries, texts: kept)
        queries, text = (x.requires_grad_() for x in pairs(10, 3, 8))
        with FlopCounterMode(display=False) as counter:
            ours(queries, text, 10.0).backward()
        assert counter.get_total_flops() == work * 10 * 10 * 8
