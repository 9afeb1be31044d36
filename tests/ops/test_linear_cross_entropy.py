"""ops.linear_cross_entropy on every backend, against F.cross_entropy of the logits in fp64."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkern import _library, ops
from tests.conftest import INTERPRETED
from tests.testing import AWKWARD, assert_within_budget, awkward

package = importlib.import_module("mmkern.ops.linear_cross_entropy")
# The interpreter has no bf16, and its launchers take no fp64.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
NAMES = ("hidden", "weight", "bias")


def problem(
    rows: int,
    width: int,
    vocabulary: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    ignored: float = 0.5,
    scale: float = 1.5,
) -> dict[str, Any]:
    """hidden, weight, labels, bias: logits of standard deviation `scale`, a share of rows without
    a label; the same numbers for every dtype and device up to rounding."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=g)
    weight = torch.randn(vocabulary, width, generator=g) * (scale / width**0.5)
    bias = torch.randn(vocabulary, generator=g)
    labels = torch.randint(0, vocabulary, (rows,), generator=g)
    labels[torch.rand(rows, generator=g) < ignored] = -100
    tensors = {"hidden": hidden, "weight": weight, "bias": bias}
    made: dict[str, Any] = {name: x.to(device, dtype) for name, x in tensors.items()}
    return made | {"labels": labels.to(device)}


def plain(hidden, weight, labels, *, bias=None, reduction="mean", **options):  # type: ignore[no-untyped-def]
    """The formula with its logits; the mean over no row is 0."""
    logits = F.linear(hidden, weight, bias).flatten(0, -2)
    reduce = "sum" if reduction == "mean" else reduction
    loss = F.cross_entropy(logits, labels.flatten(), reduction=reduce, **options)
    if reduction == "mean":
        return loss / (labels != options.get("ignore_index", -100)).sum().clamp(min=1)
    return loss.view(labels.shape) if reduction == "none" else loss


def value_and_gradients(function, given, dtype=None, upstream=1.0, frozen=(), **options):  # type: ignore[no-untyped-def]
    """The loss and the gradients of the floating point inputs, by name."""
    leaves = {
        name: x.detach().to(dtype or x.dtype).requires_grad_(name not in frozen)
        for name, x in given.items()
        if name in NAMES and x is not None
    }
    loss = function(**leaves, labels=given["labels"], **options)
    trained = {name: x for name, x in leaves.items() if x.requires_grad}
    upstream = torch.as_tensor(upstream, dtype=loss.dtype, device=loss.device)
    gradients = torch.autograd.grad(loss, list(trained.values()), upstream.expand(loss.shape))
    return {"loss": loss.detach()} | dict(zip(trained, gradients, strict=True))


def check(given, upstream=1.0, **options):  # type: ignore[no-untyped-def]
    """Loss and gradients within the budget: fp32 arithmetic on the same rounded inputs."""
    ours = value_and_gradients(ops.linear_cross_entropy, given, upstream=upstream, **options)
    exact = value_and_gradients(plain, given, torch.float64, upstream, **options)
    same = value_and_gradients(plain, given, torch.float32, upstream, **options)
    for name, got in ours.items():
        assert_within_budget(got, same[name].to(got.dtype), exact[name])
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"),
    [
        (1, 1, 1),  # no other class: loss 0
        (2, 3, 2),
        (63, 48, 127),
        (65, 96, 129),  # one past a tile in both directions
        (130, 33, 257),  # odd width
        (40, 100, 300),
    ],
)
def test_sizes(
    backend: str, device: str, dtype: torch.dtype, rows: int, width: int, vocabulary: int
):
    """A tile edge, padding or width handled wrongly changes somebody's loss or gradients."""
    check(problem(rows, width, vocabulary, dtype, device, ignored=0.3), upstream=1.7)


@pytest.mark.skipif(INTERPRETED, reason="thousands of interpreted programs")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("kept", [0, 700_000, 64 << 20])
def test_large_sizes(
    backend: str, device: str, dtype: torch.dtype, kept: int, monkeypatch: pytest.MonkeyPatch
):
    """Several bands of rows and chunks of the vocabulary, with the forward's exponentials kept for
    none, some and all of the rows (a CPU only): the whole matrix's gradients each time."""
    monkeypatch.setattr(package, "KEPT_BYTES", kept)
    check(problem(2500, 64, 1300, dtype, device, ignored=0.2), label_smoothing=0.1)


@pytest.mark.parametrize("ignored", [0.0, 0.8])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_options(backend: str, device: str, smoothing: float, reduction: str, ignored: float):
    """Reduction, smoothing and ignored rows in every combination, as F.cross_entropy has them."""
    given = problem(45, 24, 53, device=device, ignored=ignored)
    upstream = 1.3
    if reduction == "none":
        upstream = torch.linspace(-1, 2, 45).to(device)
    check(given, upstream, reduction=reduction, label_smoothing=smoothing)
    check(given | {"bias": None}, upstream, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 5])
def test_no_label(backend: str, device: str, rows: int, reduction: str):
    """A batch whose answers were all cut off must not poison the run: 0 and zero gradients, where
    torch's mean is NaN. Ignored rows may hold anything."""
    given = problem(rows, 8, 20, device=device, ignored=1.0)
    given["hidden"].fill_(torch.nan)
    found = value_and_gradients(
        ops.linear_cross_entropy, given, reduction=reduction, label_smoothing=0.1
    )
    assert found["loss"].shape == ((rows,) if reduction == "none" else ())
    for result in found.values():
        assert torch.count_nonzero(result) == 0


def test_ignored_rows_are_not_read(backend: str, device: str):
    """Padding holds whatever it holds: NaN there, or in its upstream gradient, must not spread."""
    given = problem(70, 16, 90, device=device)
    clean = value_and_gradients(ops.linear_cross_entropy, given, reduction="none")
    ignored = given["labels"] == -100
    given["hidden"][ignored] = torch.nan
    upstream = torch.where(ignored, torch.nan, 1.0)
    found = value_and_gradients(
        ops.linear_cross_entropy, given, upstream=upstream, reduction="none"
    )
    for name, result in found.items():
        assert torch.equal(result, clean[name])
    assert torch.count_nonzero(found["hidden"][ignored]) == 0


@pytest.mark.parametrize("ignore_index", [-1, 7, 10_000])
def test_ignore_index(backend: str, device: str, ignore_index: int):
    """Any integer can mark a row, one of the classes included."""
    given = problem(50, 16, 20, device=device)
    given["labels"][given["labels"] == -100] = ignore_index
    given["labels"][::5] = 7
    check(given, ignore_index=ignore_index)


def test_batch_of_sequences(backend: str, device: str):
    """[B, L, H] with labels [B, L], as a language model has them."""
    given = problem(60, 16, 33, device=device)
    shaped = given | {
        "hidden": given["hidden"].view(4, 15, 16),
        "labels": given["labels"].view(4, 15),
    }
    flat = value_and_gradients(ops.linear_cross_entropy, given, reduction="none")
    found = value_and_gradients(ops.linear_cross_entropy, shaped, reduction="none")
    for name, result in found.items():
        assert torch.equal(result.flatten(), flat[name].flatten())
    assert found["loss"].shape == (4, 15) and found["hidden"].shape == (4, 15, 16)


def test_tied_weight(backend: str, device: str):
    """An embedding that is the head as well gets both gradients."""
    given = problem(50, 16, 40, device=device, ignored=0.2)
    tokens = torch.arange(50, device=device) % 40

    def tied(function, dtype):  # type: ignore[no-untyped-def]
        weight = given["weight"].detach().to(dtype).requires_grad_()
        loss = function(F.embedding(tokens, weight).tanh(), weight, given["labels"])
        return torch.autograd.grad(loss, weight)[0]

    exact, same = tied(plain, torch.float64), tied(plain, torch.float32)
    assert_within_budget(tied(ops.linear_cross_entropy, torch.float32), same, exact)


@pytest.mark.parametrize("frozen", [("weight", "bias"), ("hidden",), ("hidden", "weight")])
def test_frozen_inputs(backend: str, device: str, frozen: tuple[str, ...]):
    """A frozen language model's head passes gradients on; the others stay what they were."""
    given = problem(70, 16, 150, device=device)
    every = value_and_gradients(ops.linear_cross_entropy, given, label_smoothing=0.1)
    found = value_and_gradients(ops.linear_cross_entropy, given, frozen=frozen, label_smoothing=0.1)
    assert set(found) == {"loss", *NAMES} - set(frozen)
    for name, result in found.items():
        torch.testing.assert_close(result, every[name], atol=1e-7, rtol=1e-6)


def test_tiny_loss_keeps_its_digits(backend: str, device: str):
    """lse - logit would round a learned token's loss of 1e-7 to 0, and with it its gradient."""
    weight = torch.eye(16, device=device)
    hidden = (20 * weight).requires_grad_()
    labels = torch.arange(16, device=device)
    loss = ops.linear_cross_entropy(hidden, weight, labels)
    true = math.log1p(15 * math.exp(-20))
    assert abs(loss.item() / true - 1) < 1e-5
    (gradient,) = torch.autograd.grad(loss, hidden)
    own = -15 * math.exp(-20) / (1 + 15 * math.exp(-20)) / 16
    torch.testing.assert_close(
        gradient.diagonal().double().cpu(), torch.full((16,), own).double(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_far_apart(backend: str, device: str, dtype: torch.dtype):
    """Logits from -400 to 400, the largest in the last columns: any fixed reference overflows."""
    given = problem(70, 32, 600, dtype, device, scale=20.0) | {"bias": None}
    given["weight"][590:] *= 5
    for weight in (given["weight"], given["weight"].flip(0)):
        given["weight"] = weight.contiguous()
        ours = value_and_gradients(ops.linear_cross_entropy, given)
        exact = value_and_gradients(plain, given, torch.float64)
        # Weights are exp(S - LSE) with both rounded at |S|: that bounds their relative error.
        largest = F.linear(given["hidden"].double(), weight.double()).abs().max().item()
        rounding = 4 * torch.finfo(torch.float32).eps * largest
        for name, got in ours.items():
            bound = rounding + 2 * torch.finfo(got.dtype).eps
            error = (got.double() - exact[name]).abs().max()
            assert error <= bound * exact[name].abs().max(), name


def test_masked_classes(backend: str, device: str):
    """A bias of -inf takes a class out, as generation code does; the first 200 here, a whole
    tile of them."""
    given = problem(40, 16, 300, device=device)
    given["bias"][:200] = -torch.inf
    given["labels"] = torch.where(
        given["labels"] >= 0, given["labels"] % 100 + 200, given["labels"]
    )
    check(given, frozen=("bias",))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["hidden", "weight", "label's weight"])
def test_non_finite(backend: str, device: str, where: str, bad: float):
    """A NaN or infinity must reach the loss as in torch, or a diverged run looks healthy."""
    given = problem(70, 16, 150, device=device, ignored=0.0) | {"bias": None}
    row = 66
    given["labels"][given["labels"] == 5] = 6
    given["hidden"][:, 3] = given["hidden"][:, 3].abs() + 0.1
    if where == "hidden":
        given["hidden"][row, 3] = bad
    else:
        given["weight"][5, 3] = bad
        if where == "label's weight":
            given["labels"][row] = 5
    ours = value_and_gradients(ops.linear_cross_entropy, given, reduction="none")
    true = value_and_gradients(plain, given, torch.float64, reduction="none")
    assert torch.equal(ours["loss"].isnan(), true["loss"].isnan())
    finite = true["loss"].isfinite()
    torch.testing.assert_close(
        ours["loss"][finite].double(), true["loss"][finite], rtol=1e-5, atol=1e-5
    )
    assert torch.equal(ours["hidden"].isfinite(), true["hidden"].isfinite())


@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(backend: str, device: str, dtype: torch.dtype, kind: str):
    """A slice of a larger tensor must give what its contiguous copy gives, to the bit."""
    given = problem(67, 40, 200, dtype, device)
    expected = value_and_gradients(ops.linear_cross_entropy, given)
    labels = torch.stack([given["labels"], torch.full_like(given["labels"], 199)], 1)[:, 0]
    strided = {name: awkward(kind, given[name]) for name in ("hidden", "weight")}
    bias = torch.stack([given["bias"]] * 2, 1)[:, 0]
    found = value_and_gradients(
        ops.linear_cross_entropy, strided | {"labels": labels, "bias": bias}
    )
    for name, result in found.items():
        assert torch.equal(result, expected[name])


def test_expanded_weight(backend: str, device: str):
    """Stride 0: all classes equal, so the loss is ln V and nothing has a direction."""
    given = problem(50, 8, 100, device=device, ignored=0.0)
    weight = given["weight"][:1].expand(100, 8)
    loss = ops.linear_cross_entropy(given["hidden"], weight, given["labels"])
    assert abs(loss.item() - math.log(100)) < 1e-5


def test_half_precision_upstream(backend: str, device: str):
    """A gradient scaler's 65,536 must not overflow fp16 on the way to gradients that fit."""
    check(problem(200, 32, 150, torch.float16, device, ignored=0.0), upstream=1024.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic(backend: str, device: str, dtype: torch.dtype):
    """Two runs must be bit-equal, or a resumed training run drifts from the first."""
    given = problem(100 if INTERPRETED else 700, 32, 300 if INTERPRETED else 3000, dtype, device)
    first = value_and_gradients(ops.linear_cross_entropy, given)
    second = value_and_gradients(ops.linear_cross_entropy, given)
    for name, result in first.items():
        assert torch.equal(result, second[name])


def test_gradcheck(backend: str, device: str):
    """Analytic against numeric derivatives in fp64."""
    if backend == "triton":
        pytest.skip("the kernels have no fp64")
    given = problem(6, 5, 7, torch.float64, device, ignored=0.3)
    leaves = [given[name].requires_grad_() for name in NAMES]

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.linear_cross_entropy(
            hidden, weight, given["labels"], bias=bias, label_smoothing=0.2
        )

    assert torch.autograd.gradcheck(loss, leaves)


def test_second_derivative_raises(backend: str, device: str):
    """A silent zero second derivative would corrupt gradient penalties."""
    given = problem(4, 4, 5, device=device, ignored=0.0)
    hidden = given["hidden"].requires_grad_()
    loss = ops.linear_cross_entropy(hidden, given["weight"], given["labels"])
    with pytest.raises(NotImplementedError, match="linear_cross_entropy: the second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_second_backward_with_retain_graph(backend: str, device: str):
    """A kernel that edits saved tensors in place would change the second gradient."""
    given = problem(30, 8, 40, device=device)
    leaves = [given["hidden"].requires_grad_(), given["weight"].requires_grad_()]
    loss = ops.linear_cross_entropy(*leaves, given["labels"])
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(a, b)


def test_autocast(backend: str, device: str):
    """Under autocast fp32 inputs run in 16 bit like a matmul; gradients return in fp32."""
    if INTERPRETED:
        pytest.skip("the interpreter has no bf16")
    given = problem(40, 16, 50, device=device)
    low = {name: x.bfloat16() if name in NAMES else x for name, x in given.items()}
    given["hidden"].requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = ops.linear_cross_entropy(**given)
    assert torch.equal(loss, ops.linear_cross_entropy(**low)) and loss.dtype == torch.float32
    assert torch.autograd.grad(loss, given["hidden"])[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_poisoned_allocations(backend: str, device: str, dtype: torch.dtype):
    """Scratch that is read before it is written shows as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        check(problem(65, 33, 129, dtype, device), label_smoothing=0.1)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("label", [-1, 50, -(2**40), 2**40])
def test_label_out_of_range(backend: str, device: str, label: int):
    """A wrong vocabulary must show at once: an error on a CPU, NaN where an error would make the
    host wait for the GPU. It must never read past the weight."""
    given = problem(20, 8, 50, device=device, ignored=0.0)
    given["labels"][13] = label
    if backend in ("reference", "cpp"):
        with pytest.raises(
            ValueError, match=rf"labels must be in \[0, 50\).*got {label} at row 13"
        ):
            ops.linear_cross_entropy(**given)
        return
    found = value_and_gradients(ops.linear_cross_entropy, given, reduction="none")
    assert found["loss"][13].isnan() and found["loss"].isnan().sum() == 1
    assert found["hidden"][13].isnan().all() and found["hidden"].isnan().any(1).sum() == 1


def test_blocks_of_weights(backend: str, device: str, monkeypatch: pytest.MonkeyPatch):
    """A GPU forms the gradient's weights for a block of the vocabulary at a time: the rows'
    gradient must add up over blocks, and each block's classes land in their place."""
    if backend not in ("triton", "cuda"):
        pytest.skip("about the GPU's blocks")
    kernels = importlib.import_module("mmkern.ops.linear_cross_entropy.triton")
    monkeypatch.setattr(kernels, "WEIGHT_BYTES", 1)
    given = problem(70, 40, 300, device=device)
    check(given, label_smoothing=0.1)
    check(given, frozen=("weight", "hidden"))


def test_no_host_synchronisation(backend: str, device: str):
    """A training step must not wait for the GPU inside the loss, to count labels or otherwise."""
    if backend != "cuda":
        pytest.skip("about CUDA streams")
    given = problem(300, 64, 1000, torch.bfloat16, device)

    def step() -> None:
        value_and_gradients(ops.linear_cross_entropy, given, label_smoothing=0.1)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph(backend: str, device: str):
    """A captured step must follow new labels, a different number of them included."""
    if backend != "cuda":
        pytest.skip("about CUDA graphs")
    given = problem(300, 64, 1000, torch.bfloat16, device, ignored=0.9)
    leaves = [given["hidden"].requires_grad_(), given["weight"].requires_grad_()]

    def step() -> list[Tensor]:
        loss = ops.linear_cross_entropy(*leaves, given["labels"])
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    given["labels"].copy_(problem(300, 64, 1000, device=device, ignored=0.1)["labels"])
    graph.replay()
    for got, true in zip(captured, step(), strict=True):
        assert torch.equal(got, true)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": [[1.0]]}, TypeError, "hidden must be a Tensor, got list"),
        ({"hidden": torch.ones(3, 0)}, ValueError, r"hidden must be \[..., H\] with H of at least"),
        ({"hidden": torch.ones(())}, ValueError, r"hidden must be \[..., H\]"),
        ({"weight": torch.ones(6, 5)}, ValueError, r"weight must be \[V, 4\] .* got shape \(6, 5"),
        ({"weight": torch.ones(0, 4)}, ValueError, r"weight must be \[V, 4\] with V of at least 1"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must be \[V, 4\]"),
        ({"weight": torch.ones(6, 4).half()}, TypeError, "hidden is torch.float32 but weight is"),
        ({"hidden": torch.ones(3, 4).long()}, TypeError, "hidden must be one of"),
        ({"labels": torch.ones(3)}, TypeError, "labels must be torch.int64, got torch.float32"),
        ({"labels": torch.ones(4).long()}, ValueError, r"labels must be \(3,\), one for each row"),
        ({"labels": torch.ones(3, 1).long()}, ValueError, r"got shape \(3, 1\)"),
        ({"bias": torch.ones(5)}, ValueError, r"bias must be \[6\], got shape \(5,\)"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"reduction": "max"}, ValueError, "reduction must be one of .* got 'max'"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str):
    """A wrong argument is named before anything runs, with what was expected and got."""
    arguments = {
        "hidden": torch.ones(3, 4),
        "weight": torch.ones(6, 4),
        "labels": torch.ones(3, dtype=torch.int64),
    }
    with pytest.raises(error, match=f"linear_cross_entropy: .*{message}"):
        ops.linear_cross_entropy(**(arguments | change))


@pytest.mark.skipif(INTERPRETED, reason="about the operator, not the kernel")
class TestOperator:
    """What torch asks of an operator besides its numbers."""

    @pytest.mark.parametrize("bias", [False, True])
    def test_opcheck(self, bias: bool):
        """A wrong schema, fake or alias breaks torch.compile and export."""
        given = problem(9, 6, 20)
        inputs = [given["hidden"], awkward("transposed", given["weight"]), given["labels"]]
        inputs.append(given["bias"] if bias else None)
        for mean in (False, True):
            torch.library.opcheck(package._fwd, (*inputs, -100, mean, 0))
        negatives, positives, _, kept = package._fwd(*inputs, -100, False, 0)
        for mask in ([True, True, bias], [True, False, False], [False, True, False]):
            arguments = (torch.ones(9), *inputs, negatives, positives, kept, -100, 0.1, mask)
            torch.library.opcheck(package._bwd, arguments)

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compile(self, dynamic: bool):
        """A graph break in the loss would split every compiled training step."""
        compiled = torch.compile(
            ops.linear_cross_entropy, fullgraph=True, dynamic=dynamic, backend="aot_eager"
        )
        for rows in (6, 9):
            given = problem(rows, 8, 30)
            options = {"label_smoothing": 0.1, "reduction": "mean"}
            expected = value_and_gradients(ops.linear_cross_entropy, given, **options)
            got = value_and_gradients(compiled, given, **options)
            for name, result in got.items():
                torch.testing.assert_close(result, expected[name])

    @pytest.mark.parametrize(("kept", "products"), [(0, 4), (64 << 20, 3)])
    def test_flops(self, monkeypatch: pytest.MonkeyPatch, kept: int, products: int):
        """An operator that counts as zero FLOPs silently ruins reported utilisation."""
        from torch.utils.flop_counter import FlopCounterMode

        monkeypatch.setattr(package, "KEPT_BYTES", kept)
        given = problem(10, 8, 30)
        leaves = [given["hidden"].requires_grad_(), given["weight"].requires_grad_()]
        with FlopCounterMode(display=False) as counter:
            ops.linear_cross_entropy(*leaves, given["labels"]).backward()
        assert counter.get_total_flops() == products * 2 * 10 * 8 * 30


@pytest.mark.skipif(_library.extension is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("path", ["auto", "portable"])
@pytest.mark.parametrize("rows", [16, 17, 64, 65, 300, 1100])
def test_packed_tiles(path: str, rows: int):
    """The packing for 16-bit matrix units, on any machine: every tail of rows, an odd vocabulary
    and an odd width, with some of the exponentials kept."""
    assert _library.extension is not None
    _library.extension.force_tile_path(path)
    try:
        check(problem(rows, 35, 263, torch.bfloat16, ignored=0.0), label_smoothing=0.1)
    finally:
        _library.extension.force_tile_path("auto")


@pytest.mark.skipif(_library.extension is None, reason="the C++ extension is not built")
def test_wrong_shapes_raise_instead_of_reading_past_the_end():
    """The operators can be called without the public function's checks."""
    hidden, weight = torch.zeros(4, 8), torch.zeros(6, 8)
    labels, row = torch.zeros(4, dtype=torch.int64), torch.zeros(4)
    fwd, bwd = torch.ops.mmkern.linear_cross_entropy_fwd, torch.ops.mmkern.linear_cross_entropy_bwd
    with pytest.raises(RuntimeError, match=r"_fwd: hidden \[M, H\] and weight \[V, H\] expected"):
        fwd(hidden, torch.zeros(6, 9), labels, None, -100, False, 0)
    with pytest.raises(RuntimeError, match=r"_fwd: labels must be Long \[4\]"):
        fwd(hidden, weight, labels[:3], None, -100, False, 0)
    with pytest.raises(RuntimeError, match=r"_fwd: bias must be \[6\]"):
        fwd(hidden, weight, labels, row, -100, False, 0)
    rest = (torch.zeros(0, dtype=torch.uint8), -100, 0.0, [True, True, False])
    with pytest.raises(RuntimeError, match=r"_bwd: grad, negatives and positives must be float"):
        bwd(row[:3], hidden, weight, labels, None, row, row, *rest)
