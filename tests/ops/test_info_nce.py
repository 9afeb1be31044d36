"""ops.info_nce on every backend, against the dense formula in fp64."""

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

package = importlib.import_module("mmkern.ops.info_nce")
# The interpreter has no bf16, and its launchers take no fp64.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


def dense(image: Tensor, text: Tensor, scale: Tensor, smoothing: float = 0.0) -> Tensor:
    """The formula as CLIP writes it, with the N x N matrix."""
    logits = scale * image @ text.T
    labels = torch.arange(image.shape[0], device=image.device)
    rows = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    columns = F.cross_entropy(logits[:, : image.shape[0]].T, labels, label_smoothing=smoothing)
    return (rows + columns) / 2


def value_and_gradients(function, image, text, scale, upstream=1.0, dtype=None, **kwargs):  # type: ignore[no-untyped-def]
    """[loss, d image, d text, d scale] with inputs cast to `dtype` for the computation."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (image, text, scale)]
    loss = function(*leaves, **kwargs)
    return [loss.detach(), *torch.autograd.grad(loss * upstream, leaves)]


def check(image, text, scale, **kwargs):  # type: ignore[no-untyped-def]
    """Loss and gradients within the budget: fp32 arithmetic on the same rounded inputs."""
    ours = value_and_gradients(ops.info_nce, image, text, scale, **kwargs)
    kwargs["smoothing"] = kwargs.pop("label_smoothing", 0.0)
    exact = value_and_gradients(dense, image, text, scale, dtype=torch.float64, **kwargs)
    plain = value_and_gradients(dense, image, text, scale, dtype=torch.float32, **kwargs)
    # The scale's gradient is a sum of products that cancel, of weights held in the features' dtype.
    terms = (exact[1] * image).abs().sum().item() / abs(scale.item() or 1.0)
    terms *= torch.finfo(image.dtype).eps / torch.finfo(ours[3].dtype).eps
    for got, same, true, size in zip(ours, plain, exact, (None, None, None, terms), strict=True):
        assert_within_budget(got, same.to(got.dtype), true, size)
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "extra", "width"),
    [
        (1, 0, 1),  # no negative at all
        (2, 0, 1),  # one negative, one number wide
        (63, 0, 48),
        (65, 2, 96),  # texts without an image; one past a tile in both directions
        (127, 0, 384),
        (129, 130, 100),  # more unlabelled columns than labelled; width no multiple of 16
        (200, 0, 640),
    ],
)
def test_sizes(backend: str, device: str, dtype: torch.dtype, rows: int, extra: int, width: int):
    """A tile edge, padding or width handled wrongly changes somebody's loss or gradients."""
    image = unit_features(rows, width, dtype, device)
    text = unit_features(rows + extra, width, dtype, device, seed=1)
    check(image, text, torch.tensor(20.0, device=device), upstream=1.7)


@pytest.mark.skipif(INTERPRETED, reason="thousands of interpreted programs")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "kept"), [(1000, 832, 32 << 20), (2500, 64, 0), (300, 2048, 0)]
)
def test_large_sizes(
    backend: str,
    device: str,
    dtype: torch.dtype,
    rows: int,
    width: int,
    kept: int,
    monkeypatch: pytest.MonkeyPatch,
):
    """Statistics carried across tiles and bands must merge to those of the whole matrix, with the
    products kept for the backward (a CPU's fp32 only) and without."""
    monkeypatch.setattr(package, "KEPT_BYTES", kept)
    image = unit_features(rows, width, dtype, device)
    text = unit_features(rows, width, dtype, device, seed=1)
    check(image, text, torch.tensor(100.0, device=device), label_smoothing=0.1)


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing(backend: str, device: str, smoothing: float):
    """The closed form must equal F.cross_entropy's smoothing, extra texts included."""
    image, text = unit_features(40, 24, device=device), unit_features(53, 24, device=device, seed=1)
    check(image, text, torch.tensor([30.0], device=device), label_smoothing=smoothing)


def test_one_pair_is_zero(backend: str, device: str):
    """A batch of one has no negative: anything but exact zeros would move a converged model."""
    image, text = unit_features(1, 8, device=device), unit_features(1, 8, device=device, seed=1)
    for result in value_and_gradients(
        ops.info_nce, image, text, torch.tensor(100.0, device=device)
    ):
        assert torch.count_nonzero(result) == 0


def test_identical_features(backend: str, device: str):
    """Collapsed towers: the loss is ln N, and rounding must not invent a direction."""
    image = unit_features(1, 32, device=device).expand(300, 32)  # stride 0
    loss, d_image, d_text, _ = value_and_gradients(
        ops.info_nce, image, image, torch.tensor(100.0, device=device)
    )
    assert abs(loss.item() - math.log(300)) < 1e-5
    assert max(d_image.abs().max().item(), d_text.abs().max().item()) < 1e-6


def test_tiny_loss_keeps_its_digits(backend: str, device: str):
    """LSE - S_ii would round a well-trained pair's loss of 1e-6 to noise; log1p must not."""
    image = torch.eye(512, device=device)[: 128 if INTERPRETED else 512]
    loss = ops.info_nce(image, image, 20.0)
    true = math.log1p((image.shape[0] - 1) * math.exp(-20))
    assert abs(loss.item() / true - 1) < 1e-3


def test_opposite_towers(backend: str, device: str):
    """All logits -100: a padded column read as logit 0 would win every softmax."""
    image = unit_features(1, 16, device=device).repeat(70, 1)
    loss = ops.info_nce(image, -image, 100.0)
    assert abs(loss.item() - math.log(70)) < 1e-5


def test_large_logits(backend: str, device: str):
    """Unnormalised features, logits to ±1600: a sum without its maximum overflows."""
    image = 4 * unit_features(90, 32, device=device)
    text = 4 * unit_features(90, 32, device=device, seed=1)
    scale = torch.tensor(100.0, device=device)
    exact = value_and_gradients(dense, image, text, scale, dtype=torch.float64)
    # Weights are exp(S - LSE) with both rounded at |S|: that bounds their relative error.
    rounding = 4 * torch.finfo(torch.float32).eps * 1600
    for got, true in zip(value_and_gradients(ops.info_nce, image, text, scale), exact, strict=True):
        assert (got.double() - true).abs().max() <= rounding * true.abs().max()


def test_wide_range_in_one_tile(backend: str, device: str):
    """One tile with a logit of 100 and a row below -30: a shared maximum flushes that row."""
    text = unit_features(64, 64, device=device)
    image = text.clone()
    image[5] = -F.normalize(text.sum(0), dim=0)
    scale = torch.tensor(100.0, device=device)
    exact = 100 * image.double() @ text.double().T
    exact.fill_diagonal_(-torch.inf)
    row, column, _ = package._fwd(image, text, scale, 0)
    torch.testing.assert_close(row.double(), exact.logsumexp(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(column.double(), exact.logsumexp(0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", AWKWARD)
def test_strides(backend: str, device: str, kind: str):
    """A slice of a larger tensor must give what its contiguous copy gives, to the bit."""
    image, text = unit_features(67, 40, device=device), unit_features(67, 40, device=device, seed=1)
    scale = torch.tensor(14.3, device=device)
    expected = value_and_gradients(ops.info_nce, image, text, scale)
    leaves = [awkward(kind, x).requires_grad_() for x in (image, text)]
    loss = ops.info_nce(*leaves, scale)
    got = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    for result, true in zip(got, expected, strict=False):
        torch.testing.assert_close(result, true, atol=0, rtol=0)


@pytest.mark.parametrize("offset", [0, 3, 60])
def test_rows_of_a_larger_batch(backend: str, device: str, offset: int):
    """A rank's rows against everybody's texts: the positive sits at `offset`, not at 0."""
    rows, columns = 33, 95
    image = unit_features(rows, 24, device=device)
    text = unit_features(columns, 24, device=device, seed=1)
    scale = torch.tensor(10.0, device=device)
    logits = 10 * image.double() @ text.double().T
    positive = logits.diagonal(offset)[:rows].clone()
    masked = logits.clone()
    masked.diagonal(offset)[:rows] = -torch.inf
    row, column, diagonal = package._fwd(image, text, scale, offset)
    torch.testing.assert_close(row.double(), masked.logsumexp(1), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(column.double(), masked.logsumexp(0), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(diagonal.double(), positive, atol=1e-5, rtol=1e-6)

    row_lse, column_lse = logits.logsumexp(1), logits.logsumexp(0)
    column_lse[70:] = torch.inf  # columns without a label
    weight = (logits - row_lse[:, None]).exp() + (logits - column_lse).exp()
    weight.diagonal(offset)[:rows] = 0
    expected = weight @ text.double(), weight.T @ image.double()
    for mask in ([True, True], [True, False], [False, True]):
        got = package._bwd(image, text, scale, row_lse.float(), column_lse.float(), offset, mask)
        for wanted, result, true in zip(mask, got, expected, strict=True):
            if wanted:
                torch.testing.assert_close(result.double(), true, atol=1e-5, rtol=1e-5)
            else:
                assert result.numel() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_features(backend: str, device: str, bad: float):
    """A NaN or infinity must reach the loss as in torch, or a diverged run looks healthy."""
    image, text = unit_features(70, 16, device=device), unit_features(70, 16, device=device, seed=1)
    image[66, 3] = bad
    assert dense(image, text, torch.tensor(5.0, device=device)).isnan()
    assert ops.info_nce(image, text, 5.0).isnan()
    loss, d_image, *_ = value_and_gradients(
        ops.info_nce, image, text, torch.tensor(5.0, device=device)
    )
    assert loss.isnan() and d_image.isnan().any()


def test_scale_forms(backend: str, device: str):
    """open_clip passes 0-d and [1] scales, users pass floats: one loss, gradient in its shape."""
    image, text = unit_features(20, 16, device=device), unit_features(20, 16, device=device, seed=1)
    expected = ops.info_nce(image, text, 12.5)
    for scale in (torch.tensor(12.5), torch.tensor([12.5]), torch.tensor(12.5).half()):
        scale = scale.to(device).requires_grad_()
        loss = ops.info_nce(image, text, scale)
        torch.testing.assert_close(loss, expected, atol=0, rtol=0)
        (gradient,) = torch.autograd.grad(loss, scale)
        assert gradient.shape == scale.shape and gradient.dtype == scale.dtype
    for value in (0.0, -5.0):
        check(image, text, torch.tensor(value, device=device))


def test_half_precision_upstream(backend: str, device: str):
    """A gradient scaler's 65,536 must not overflow fp16 on the way to gradients that fit."""
    image = unit_features(256, 64, torch.float16, device)
    text = unit_features(256, 64, torch.float16, device, seed=1)
    check(image, text, torch.tensor(100.0, device=device), upstream=65536.0)


@pytest.mark.parametrize("frozen", ["image", "text", "scale", "both towers"])
def test_frozen_inputs(backend: str, device: str, frozen: str):
    """Locked-image tuning freezes a tower: the other gradients stay what they were."""
    image, text = unit_features(50, 16, device=device), unit_features(50, 16, device=device, seed=1)
    scale = torch.tensor(10.0, device=device)
    expected = dict(
        zip(
            ("image", "text", "scale"),
            value_and_gradients(ops.info_nce, image, text, scale, 2.0)[1:],
            strict=True,
        )
    )
    leaves = {"image": image, "text": text, "scale": scale}
    leaves = {name: x.clone() for name, x in leaves.items()}
    trained = [n for n in leaves if n != frozen and not (frozen == "both towers" and n != "scale")]
    for name in trained:
        leaves[name].requires_grad_()
    (2 * ops.info_nce(leaves["image"], leaves["text"], leaves["scale"])).backward()
    for name, leaf in leaves.items():
        if name in trained:
            torch.testing.assert_close(leaf.grad, expected[name], atol=1e-6, rtol=1e-5)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [0, 32 << 20])
def test_deterministic(
    backend: str, device: str, kept: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """Two runs must be bit-equal, or a resumed training run drifts from the first. The size gives
    every worker of a thread pool a share."""
    monkeypatch.setattr(package, "KEPT_BYTES", kept)
    rows = 150 if INTERPRETED else 1500
    image = unit_features(rows, 48, dtype, device)
    text = unit_features(rows, 48, dtype, device, seed=1)
    scale = torch.tensor(50.0, device=device)
    first = value_and_gradients(ops.info_nce, image, text, scale)
    for a, b in zip(first, value_and_gradients(ops.info_nce, image, text, scale), strict=True):
        assert torch.equal(a, b)


def test_gradcheck(backend: str, device: str):
    """Analytic against numeric derivatives in fp64, smoothing and extra texts included."""
    if backend == "triton":
        pytest.skip("the kernels have no fp64")
    image = unit_features(5, 6, torch.float64, device).requires_grad_()
    text = unit_features(7, 6, torch.float64, device, seed=1).requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: ops.info_nce(*x, label_smoothing=0.2), (image, text, scale)
    )


def test_second_derivative_raises(backend: str, device: str):
    """A silent zero second derivative would corrupt gradient penalties."""
    image = unit_features(4, 4, device=device).requires_grad_()
    loss = ops.info_nce(image, image.detach(), 5.0)
    with pytest.raises(NotImplementedError, match="info_nce: the second derivative"):
        torch.autograd.grad(loss, image, create_graph=True)


def test_second_backward_with_retain_graph(backend: str, device: str):
    """A kernel that edits saved tensors in place would change the second gradient."""
    image = unit_features(30, 8, device=device).requires_grad_()
    text = unit_features(30, 8, device=device, seed=1).requires_grad_()
    loss = ops.info_nce(image, text, 9.0)
    first = torch.autograd.grad(loss, (image, text), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, (image, text)), strict=True):
        assert torch.equal(a, b)


def test_autocast(backend: str, device: str):
    """Under autocast the fp32 features run in 16 bit like a matmul; gradients return in fp32."""
    if INTERPRETED:
        pytest.skip("the interpreter has no bf16")
    image = unit_features(40, 16, device=device).requires_grad_()
    text = unit_features(40, 16, device=device, seed=1)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = ops.info_nce(image, text, 10.0)
    assert torch.equal(loss, ops.info_nce(image.bfloat16(), text.bfloat16(), 10.0))
    assert torch.autograd.grad(loss, image)[0].dtype == torch.float32


def test_poisoned_allocations(backend: str, device: str):
    """Scratch that is read before it is written shows as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        test_sizes(backend, device, torch.float32, 65, 2, 96)
    finally:
        torch.use_deterministic_algorithms(False)


def test_no_host_synchronisation(backend: str, device: str):
    """A training step must not wait for the GPU inside the loss."""
    if backend != "cuda":
        pytest.skip("about CUDA streams")
    image = unit_features(40, 24, torch.bfloat16, device).requires_grad_()
    text = unit_features(53, 24, torch.bfloat16, device, seed=1).requires_grad_()
    scale = torch.tensor(30.0, device=device, requires_grad=True)
    ops.info_nce(image, text, scale, label_smoothing=0.1).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.info_nce(image, text, scale, label_smoothing=0.1).backward()
        ops.sigmoid_contrastive(image, text, scale, scale).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(INTERPRETED, reason="thousands of interpreted programs")
def test_far_offsets(backend: str, device: str):
    """Rows that lie more than 2^31 elements apart: 32-bit address arithmetic reads elsewhere."""
    storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device=device)  # touched sparsely
    text = torch.as_strided(storage, (3, 16), (2**30, 1))
    text.copy_(unit_features(3, 16, torch.bfloat16, device))
    image = unit_features(3, 16, torch.bfloat16, device, seed=1)
    assert torch.equal(ops.info_nce(image, text, 9.0), ops.info_nce(image, text.clone(), 9.0))


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="millions of interpreted programs")
def test_more_than_2_31_logits(backend: str, device: str):
    """N > 46,341: logits indexed in 32 bits overflow. Collapsed towers have a known loss."""
    image = unit_features(1, 4, device=device).expand(46_400, 4)
    loss, d_image, *_ = value_and_gradients(
        ops.info_nce, image, image, torch.tensor(10.0, device=device)
    )
    assert abs(loss.item() - math.log(46_400)) < 1e-4
    assert d_image.abs().max().item() < 1e-6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": torch.ones(0, 4), "text": torch.ones(0, 4)}, ValueError, "at least one row"),
        ({"image": torch.ones(3, 5)}, ValueError, "one width, got 5 and 4"),
        ({"image": torch.ones(4)}, ValueError, r"image must be \[N, D\], got shape \(4,\)"),
        ({"image": torch.ones(4, 4)}, ValueError, "a row for each of the 4 image rows, got 3"),
        ({"image": torch.ones(3, 0), "text": torch.ones(3, 0)}, ValueError, "width of at least 1"),
        ({"image": torch.ones(3, 4).half()}, TypeError, "image is torch.float16 but text is"),
        ({"image": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "image must be one of"),
        ({"image": [[1.0]]}, TypeError, "image must be a Tensor, got list"),
        ({"logit_scale": torch.ones(2)}, ValueError, r"logit_scale must have shape \[\] or \[1\]"),
        ({"logit_scale": "10"}, TypeError, "logit_scale must be a number or Tensor, got str"),
        ({"logit_scale": torch.tensor(3)}, TypeError, "logit_scale must be a floating point"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_arguments(change: dict, error: type[Exception], message: str):
    """A wrong argument is named before anything runs, with what was expected and got."""
    arguments = {"image": torch.ones(3, 4), "text": torch.ones(3, 4), "logit_scale": 10.0}
    with pytest.raises(error, match=f"info_nce: .*{message}"):
        ops.info_nce(**(arguments | change))


@pytest.mark.skipif(INTERPRETED, reason="about the operator, not the kernel")
class TestOperator:
    """What torch asks of an operator besides its numbers."""

    def test_opcheck(self):
        """A wrong schema, fake or alias breaks torch.compile and export."""
        image, text = unit_features(5, 6), unit_features(6, 5, seed=1).T[:, :6].contiguous()
        text = awkward("transposed", unit_features(7, 6, seed=1))
        scale, row, column = torch.tensor(3.0), torch.zeros(5), torch.zeros(7)
        torch.library.opcheck(package._fwd, (image, text, scale, 1))
        for mask in ([True, True], [True, False], [False, True]):
            torch.library.opcheck(package._bwd, (image, text, scale, row, column, 1, mask))

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compile(self, dynamic: bool):
        """A graph break in the loss would split every compiled training step."""
        compiled = torch.compile(ops.info_nce, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for rows in (6, 9):
            image, text = unit_features(rows, 8), unit_features(rows, 8, seed=1)
            scale = torch.tensor(5.0)
            expected = value_and_gradients(ops.info_nce, image, text, scale, label_smoothing=0.1)
            got = value_and_gradients(compiled, image, text, scale, label_smoothing=0.1)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b)

    @pytest.mark.parametrize(("kept", "work"), [(0, 8), (32 << 20, 6)])
    def test_flops(self, monkeypatch: pytest.MonkeyPatch, kept: int, work: int):
        """An operator that counts as zero FLOPs silently ruins reported utilisation."""
        from torch.utils.flop_counter import FlopCounterMode

        monkeypatch.setattr(package, "KEPT_BYTES", kept)
        image = unit_features(10, 8).requires_grad_()
        text = unit_features(10, 8, seed=1).requires_grad_()
        with FlopCounterMode(display=False) as counter:
            ops.info_nce(image, text, 10.0).backward()
        assert counter.get_total_flops() == work * 10 * 10 * 8
