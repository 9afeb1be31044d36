"""The gradient cache against a whole batch's backward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmkern import ops
from mmkern.train.gradient_cache import cached_step, split_batch
from tests.train.tiny import TinyClip, batch

CHUNKS = (1, 5, 8, 24, 100)


def features(model: nn.Module, chunk: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What the loss takes."""
    return tuple(model(**chunk, return_loss=False).values())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def whole(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the batch at once."""
    model.zero_grad()
    loss = ops.info_nce(*features(model, inputs))
    loss.backward()
    return loss.detach(), gradients(model)


def cached(
    towers: nn.Module, inputs: dict[str, Tensor], rows: int, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients by chunks."""
    towers.zero_grad()
    chunks = split_batch(inputs, rows)
    loss = cached_step(lambda c: features(towers, c), ops.info_nce, chunks, **options)
    return loss, gradients(towers)


def assert_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6
) -> None:
    """Same parameters, same gradients."""
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", CHUNKS)
def test_equals_whole_batch(rows: int) -> None:
    """Otherwise a user with little memory trains another objective than one with much."""
    torch.manual_seed(0)
    model, inputs = TinyClip(), batch()
    loss, expected = whole(model, inputs)
    cached_loss, actual = cached(model, inputs, rows)
    torch.testing.assert_close(cached_loss, loss, rtol=1e-6, atol=1e-6)
    assert_close(actual, expected)


def test_dropout_is_replayed() -> None:
    """Without the random state the two passes use different masks, and gradients are noise."""
    torch.manual_seed(0)
    model, inputs = TinyClip(dropout=0.5), batch()
    torch.manual_seed(1)
    loss, actual = cached(model, inputs, 7)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    model.zero_grad()
    parts = [features(model, chunk) for chunk in split_batch(inputs, 7)]  # all graphs alive
    assert torch.equal(torch.get_rng_state(), after), "the generator must go on where it stood"
    joined = (torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), parts[0][2])
    reference = ops.info_nce(*joined)
    reference.backward()
    torch.testing.assert_close(loss, reference.detach(), rtol=1e-6, atol=1e-6)
    assert_close(actual, gradients(model))


def test_random_loss_is_not_replayed() -> None:
    """A loss that samples (negatives, say) would else draw the same numbers at every step."""
    drawn = []

    def loss(f: Tensor) -> Tensor:
        drawn.append(torch.rand(()).item())
        return f.sum() * drawn[-1]

    tower = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    for _ in range(2):
        cached_step(tower, loss, torch.randn(6, 4).split(2))
    assert drawn[0] != drawn[1]
    tower[1].p = 0.0
    for _ in range(2):
        cached_step(tower, loss, torch.ones(6, 4).split(2))
    assert drawn[2] != drawn[3]


def test_scale_gradient_counts_once() -> None:
    """Otherwise the temperature's learning rate grows with the number of chunks."""
    torch.manual_seed(0)
    model, inputs = TinyClip(), batch()
    expected = whole(model, inputs)[1]["logit_scale"]
    for rows in CHUNKS:
        torch.testing.assert_close(cached(model, inputs, rows)[1]["logit_scale"], expected)


@pytest.mark.parametrize("frozen", ["visual", "token_embedding", "logit_scale"])
def test_frozen_parts_stay_frozen(frozen: str) -> None:
    """A locked tower (LiT) or a fixed temperature must train the rest exactly, and nothing else."""
    torch.manual_seed(0)
    model, inputs = TinyClip(), batch()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    _, expected = whole(model, inputs)
    _, actual = cached(model, inputs, 7)
    assert not any(name.startswith(frozen) for name in actual)
    assert_close(actual, expected)


def test_loss_is_called_once() -> None:
    """A loss called by chunks would lose the negatives of the other chunks, and gather k times."""
    calls = []

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        calls.append(image.shape)
        return ops.info_nce(image, text, scale)

    model, inputs = TinyClip(), batch()
    cached_step(lambda c: features(model, c), loss, split_batch(inputs, 5))
    assert calls == [(24, 8)]


def test_other_encoders_and_losses() -> None:
    """The step serves any towers: here one tensor, a mapping, and chunks with unequal rows."""
    torch.manual_seed(0)
    tower, x = nn.Linear(4, 3), torch.randn(9, 4)
    tower(x).logsumexp(0).sum().backward()
    expected = gradients(tower)
    tower.zero_grad()
    cached_step(tower, lambda f: f.logsumexp(0).sum(), x.split([2, 4, 3]))
    assert_close(gradients(tower), expected)

    tower.zero_grad()
    chunks = [{"q": x[:2], "d": x[:5]}, {"q": x[2:3], "d": x[5:]}]  # more documents than queries
    cached_step(
        lambda c: {"d": tower(c["d"]), "q": tower(c["q"])},
        lambda q, d: (q @ d.T).logsumexp(1).sum(),
        chunks,
    )
    actual = gradients(tower)
    tower.zero_grad()
    (tower(x[:3]) @ tower(x).T).logsumexp(1).sum().backward()
    assert_close(actual, gradients(tower), 1e-5)


@pytest.mark.parametrize("inside", [True, False], ids=["outer autocast", "autocast argument"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, inside: bool) -> None:
    """In 16 bits gradients must reach the weights: autocast caches the casts of the first pass."""
    torch.manual_seed(0)
    model, inputs = TinyClip(), batch()
    exact_inputs = {**inputs, "pixel_values": inputs["pixel_values"].double()}
    _, exact = whole(copy.deepcopy(model).double(), exact_inputs)

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", dtype)

    with autocast():
        _, expected = whole(model, inputs)
    if inside:
        with autocast():
            _, actual = cached(model, inputs, 6)
    else:
        _, actual = cached(model, inputs, 6, autocast=autocast)
    for name, gradient in exact.items():
        error = (expected[name] - gradient).norm()
        assert (actual[name] - gradient).norm() <= 2 * error + 1e-3 * gradient.norm(), name


def test_scaler_gets_scaled_gradients() -> None:
    """fp16 training unscales in ``scaler.step``: gradients must come out times the scale."""
    torch.manual_seed(0)
    model, inputs = TinyClip(), batch()
    loss, expected = whole(model, inputs)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled_loss, actual = cached(model, inputs, 7, scaler=scaler)
    torch.testing.assert_close(scaled_loss, loss)
    assert_close({name: g / 1024 for name, g in actual.items()}, expected)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler.step(optimizer)
    assert_close(gradients(model), expected)


def test_running_statistics_change_once() -> None:
    """Batch normalisation's averages would decay twice a step, once for each pass."""
    torch.manual_seed(0)
    model, inputs = TinyClip(norm=True), batch()
    other = copy.deepcopy(model)
    cached(model, inputs, 6, model=model)
    for chunk in split_batch(inputs, 6):
        other(**chunk, return_loss=False)
    for (name, actual), expected in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(actual, expected, msg=name)


def test_peak_memory_follows_the_chunk() -> None:
    """The point of the cache: graphs of the whole batch must never be alive together."""
    saved, most = [0], [0]

    def pack(x: Tensor) -> Tensor:
        saved[0] += x.shape[0] if x.dim() > 1 else 0
        most[0] = max(most[0], saved[0])
        return x

    tower, x = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), torch.randn(64, 4)

    def encode(chunk: Tensor) -> Tensor:
        saved[0] = 0
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            return tower(chunk)

    cached_step(encode, lambda f: f.logsumexp(0).sum(), x.split(4))
    by_chunks = most[0]
    most[0] = 0
    cached_step(encode, lambda f: f.logsumexp(0).sum(), x.split(64))
    assert by_chunks < most[0] / 4


@pytest.mark.parametrize(
    ("encode", "loss", "chunks", "message"),
    [
        (lambda c: c, lambda f: f.sum(), [], "at least one chunk"),
        (lambda c: c, lambda f: f, [torch.ones(2, 2)], "0-d tensor"),
        (lambda c: c, lambda f: torch.ones(()), [torch.ones(2, 2)], "depends on the features"),
        (lambda c: c, lambda f: f.sum(), [torch.ones(2, 2)], "nothing that needs a gradient"),
        (lambda c: [c, 3], lambda f, g: f.sum(), [torch.ones(2, 2)], "must return tensors"),
    ],
)
def test_errors(encode: Any, loss: Any, chunks: Any, message: str) -> None:
    """A wrong call must say what is wrong, not fail deep inside autograd or train nothing."""
    with pytest.raises(ValueError, match=message):
        cached_step(encode, loss, chunks)


def test_split_batch() -> None:
    """Chunks must cover the batch once, and pairs must stay together."""
    chunks = split_batch({"a": torch.arange(5), "b": torch.arange(10).view(5, 2), "flag": True}, 2)
    assert [len(c["a"]) for c in chunks] == [2, 2, 1] and all(c["flag"] for c in chunks)
    assert torch.equal(torch.cat([c["b"] for c in chunks]), torch.arange(10).view(5, 2))
    with pytest.raises(ValueError, match=r"one number of rows, got \{'a': 5, 'b': 4\}"):
        split_batch({"a": torch.ones(5), "b": torch.ones(4)}, 2)
    with pytest.raises(ValueError, match="at least 1"):
        split_batch({"a": torch.ones(5)}, 0)
