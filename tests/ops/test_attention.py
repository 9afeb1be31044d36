"""ops.attention on every backend, against the dense formula in fp64."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor

from mmkern import ops
from mmkern.layout import RowIntervals
from tests.conftest import INTERPRETED
from tests.testing import assert_within_budget

package = importlib.import_module("mmkern.ops.attention")
reference = importlib.import_module("mmkern.ops.attention.reference")
# The interpreter has no bf16, and its launchers take no fp64.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])

Q, T = 5, 11  # queries and text slots of the masks below
LENGTHS, PADS = torch.tensor([T, 4, 0]), torch.tensor([0, 3, 6])
MASKS = {
    "unimodal": RowIntervals.unimodal(Q, T, LENGTHS),
    "bidirectional": RowIntervals.bidirectional(Q, T, LENGTHS),
    "multimodal_causal": RowIntervals.multimodal_causal(Q, T, LENGTHS),
    "stage1": RowIntervals.stage1(Q, T, LENGTHS),
    "hole": RowIntervals.causal(T, LENGTHS, PADS, prefix=Q),
    "prefix_lm": RowIntervals.prefix_lm(Q, T, LENGTHS, PADS),
    "full": RowIntervals.full(Q, T, LENGTHS),
    "one for all": RowIntervals.causal(Q + T),
    "media": RowIntervals.media(torch.tensor([[0, 0, 1, 1], [1, 2, 2, 3], [0, 3, 3, 3]]), 7, 3),
    "packed": RowIntervals.packed(torch.arange(16).expand(3, 16) // torch.tensor([[5], [3], [20]])),
}


def tensors(batch: int, heads: int, queries: int, keys: int, width: int = 16,
            dtype: torch.dtype = torch.float32, device: str = "cpu",
            rows: int | None = None) -> list[Tensor]:  # fmt: skip
    """q, k, v and the output's gradient, laid out as a projection leaves them: [B, L, H, E]."""
    generator = torch.Generator().manual_seed(0)
    rows = batch if rows is None else rows
    sizes = ((batch, queries), (rows, keys), (rows, keys), (batch, queries))
    return [
        torch.randn(b, length, heads, width, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .transpose(1, 2)
        for b, length in sizes
    ]


def dense(q, k, v, mask=None, kv_row=None, keep=None, scale=None):  # type: ignore[no-untyped-def]
    """The formula with every weight in memory; a row without keys is 0."""
    if kv_row is not None:
        k, v = k[kv_row.long()], v[kv_row.long()]
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if mask is not None:
        allowed = mask.to_dense()[:, None]
        weights = scores.masked_fill(~allowed, -1e30).softmax(-1) * allowed
    else:
        weights = scores.softmax(-1)
    return (weights if keep is None else weights * keep.to(v.dtype)) @ v


def with_gradients(function, q, k, v, grad, *, dtype=None, **kwargs):  # type: ignore[no-untyped-def]
    """[out, dq, dk, dv], computed in `dtype`."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v)]
    out = function(*leaves, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def check(q, k, v, grad, mask=None, kv_row=None, dropout_p=0.0, scale=None):  # type: ignore[no-untyped-def]
    """Output and gradients within the budget: fp32 arithmetic on the same rounded inputs."""
    options = {"mask": mask, "kv_row": kv_row, "scale": scale}
    torch.manual_seed(0)
    seed = package._draw_seed(q.device) if dropout_p else None
    torch.manual_seed(0)
    ours = with_gradients(ops.attention, q, k, v, grad, dropout_p=dropout_p, **options)
    if seed is not None:
        kept = reference.keep(seed, range(q.shape[0]), *q.shape[1:3], k.shape[2], dropout_p)
        options["keep"] = kept.double() / (1 - reference.threshold(dropout_p) / 65536)
    exact = with_gradients(dense, q, k, v, grad, dtype=torch.float64, **options)
    wide = torch.promote_types(q.dtype, torch.float32)
    plain = with_gradients(dense, q, k, v, grad, dtype=wide, **options)
    for got, same, true in zip(ours, plain, exact, strict=True):
        assert_within_budget(got, same.to(got.dtype), true)
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_masks(backend: str, device: str, dtype: torch.dtype, name: str):
    """Every family, with lengths, holes and rows that see nothing: a wrong mask trains silently."""
    mask = MASKS[name].to(device)
    check(*tensors(3, 2, mask.queries, mask.keys, 16, dtype, device), mask=mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [1, 15, 16, 17, 31, 33, 63, 65, 127, 129])
def test_key_counts(backend: str, device: str, dtype: torch.dtype, keys: int):
    """One key more or less than a tile holds must not read a neighbour or drop the last."""
    check(*tensors(2, 2, 33, keys, 64, dtype, device), dropout_p=0.1 if keys % 2 else 0.0)


@pytest.mark.skipif(INTERPRETED, reason="hundreds of interpreted programs")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "width"),
    [(32, 257, 64), (257, 257, 88), (1, 577, 128), (64, 677, 64), (300, 300, 80), (40, 1500, 32)],
)
def test_sizes(backend: str, device: str, dtype: torch.dtype, queries: int, keys: int, width: int):
    """The published sizes: ViT-g's width of 88, image keys at three resolutions, one query."""
    mask = None
    if queries == keys:
        mask = RowIntervals.causal(keys, torch.tensor([keys, 129])).to(device)
    check(*tensors(2, 2, queries, keys, width, dtype, device), mask=mask, dropout_p=0.1)


@pytest.mark.parametrize("width", [1, 8, 24, 40, 72, 96, 112, 128, 136])
def test_widths(backend: str, device: str, width: int):
    """A head width that fills no vector exactly must not mix heads."""
    if backend in ("triton", "cuda") and not 16 <= width <= 128:
        pytest.skip("the GPU kernels take 16 to 128")
    mask = RowIntervals.multimodal_causal(Q, T, LENGTHS).to(device)
    for dtype in DTYPES:
        check(*tensors(3, 2, 16, 16, width, dtype, device), mask=mask)


def test_scale(backend: str, device: str):
    """A scale of one's own (T5: 1) replaces 1/√E, a negative one included."""
    for scale in (1.0, 0.0, -0.3):
        check(*tensors(1, 2, 20, 20, 16, device=device), scale=scale)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.999])
def test_dropout(backend: str, device: str, dropout_p: float):
    """Forward and backward must drop the weights that the specification names, under a mask too."""
    for dtype in DTYPES:
        mask = RowIntervals.multimodal_causal(9, 30, torch.tensor([30, 7])).to(device)
        check(*tensors(2, 2, 39, 39, 32, dtype, device), mask=mask, dropout_p=dropout_p)


def kept(backend: str, device: str, batch: int, queries: int, keys: int) -> Tensor:
    """Which weights a call keeps: with v the identity, its output is the weights."""
    q, k, _, _ = tensors(batch, 2, queries, keys, 64, device=device)
    v = torch.eye(keys, 64, device=device).expand(batch, 2, keys, 64)
    torch.manual_seed(5)
    return ops.attention(q, k, v, dropout_p=0.3)[..., :keys] != 0


def test_draws_depend_on_places_alone(backend: str, device: str):
    """A batch cut short, or padded longer, must not redraw the dropout of what stays."""
    whole = kept(backend, device, 3, 40, 64)
    assert torch.equal(kept(backend, device, 2, 17, 33), whole[:2, :, :17, :33])
    flat = whole.flatten(0, 1).flatten(1)
    assert len(torch.unique(flat, dim=0)) == len(flat)  # no head or sample repeats another's


def test_generator_is_philox_and_fair():
    """Philox's published answer; a share of 1 - p in every row and column; bits independent."""
    zero = (torch.zeros(1, dtype=torch.int64),) * 3
    k0, k1 = reference._philox(zero, torch.tensor([0]))
    assert (k0.item(), k1.item()) == (0x6627E8D5, 0xE169C58D)
    seed = torch.tensor([-(2**62) + 12345])
    bits = reference.keep(seed, range(5, 7), 8, 256, 512, 0.1)
    p = reference.threshold(0.1) / 65536
    sigma = math.sqrt(p * (1 - p))
    for dim in ((0, 1, 2, 3), (3,), (2,)):
        share = bits.double().mean(dim)
        count = bits.numel() / share.numel()
        assert ((share - (1 - p)).abs() < 5 * sigma / math.sqrt(count)).all()
    x = (bits.double() - (1 - p)) / sigma
    for dim, shift in ((0, 1), (1, 1), (2, 1), (3, 1), (3, 2), (3, 32)):
        pair = (x * x.roll(shift, dim)).mean().item()
        assert abs(pair) < 5 / math.sqrt(x.numel())


def test_dropout_extremes(backend: str, device: str):
    """p = 0 is no dropout to the bit, p = 1 is zeros with zero gradients, not 0/0."""
    operands = tensors(2, 2, 20, 30, 16, device=device)
    plain = with_gradients(ops.attention, *operands)
    for got, want in zip(
        with_gradients(ops.attention, *operands, dropout_p=1e-9), plain, strict=True
    ):
        assert torch.equal(got, want)
    for result in with_gradients(ops.attention, *operands, dropout_p=1.0):
        assert torch.count_nonzero(result) == 0


def test_seed_comes_from_torchs_generator(backend: str, device: str):
    """torch.manual_seed must repeat a run, and two layers of one run must not drop alike."""
    q, k, v, _ = tensors(1, 1, 32, 32, device=device)
    torch.manual_seed(1)
    first, second = (ops.attention(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(ops.attention(q, k, v, dropout_p=0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", [n for n, m in MASKS.items() if m.batch == 3])
def test_what_nobody_sees_does_not_matter(backend: str, device: str, name: str):
    """NaN in padding (an uninitialised cache) must reach no output and no gradient."""
    mask = MASKS[name].to(device)
    q, k, v, grad = tensors(3, 2, mask.queries, mask.keys, device=device)
    clean = with_gradients(ops.attention, q, k, v, grad, mask=mask, dropout_p=0.0)
    unseen = ~mask.to_dense().any(1)  # [B, Lk]
    for x in (k, v):
        x.masked_fill_(unseen[:, None, :, None], torch.nan)
    dirty = with_gradients(ops.attention, q, k, v, grad, mask=mask)
    for got, want in zip(dirty, clean, strict=True):
        assert torch.equal(got, want)
    for gradient in dirty[2:]:
        assert torch.count_nonzero(gradient.transpose(1, 2)[unseen]) == 0


def test_rows_that_see_nothing(backend: str, device: str):
    """Text before Flamingo's first image: exactly 0, log-sum-exp -inf, no gradient."""
    mask = MASKS["media"].to(device)
    empty = ~mask.to_dense().any(2)  # [B, Lq]
    operands = tensors(3, 2, mask.queries, mask.keys, device=device)
    out, dq, _, _ = check(*operands, mask=mask)
    assert empty.any()
    for x in (out, dq):
        assert torch.count_nonzero(x.transpose(1, 2)[empty]) == 0
    _, lse = package._fwd(*operands[:3], mask.intervals, None, None, 0.0, 1.0)
    assert ((lse == -torch.inf) == empty[:, None]).all()


def test_no_key_for_anybody(backend: str, device: str):
    """A batch without any image, or Lk = 0, is zeros."""
    for keys in (0, 20):
        operands = tensors(2, 1, 18, keys, device=device)
        mask = RowIntervals(torch.zeros(1, 18, 4, dtype=torch.int32, device=device), keys)
        for result in with_gradients(ops.attention, *operands, mask=mask):
            assert torch.count_nonzero(result) == 0


def test_modalities_do_not_leak(backend: str, device: str):
    """Unimodal: text moved by 1e4 leaves query rows bit-identical, and queries the text rows."""
    mask = MASKS["unimodal"].to(device)
    q, k, v, _ = tensors(3, 2, Q + T, Q + T, device=device)
    before = ops.attention(q, k, v, mask)
    for moved, kept_rows in ((slice(Q, None), slice(0, Q)), (slice(0, Q), slice(Q, None))):
        others = [x.clone() for x in (q, k, v)]
        for x in others:
            x[:, :, moved] += 1e4
        after = ops.attention(*others, mask)
        assert torch.equal(after[:, :, kept_rows], before[:, :, kept_rows])


def test_causality(backend: str, device: str):
    """Generation: a changed token moves its own row and later ones, no earlier one, no query."""
    mask = RowIntervals.multimodal_causal(Q, T).to(device)
    q, k, v, _ = tensors(1, 2, Q + T, Q + T, device=device)
    before = ops.attention(q, k, v, mask)
    for token in (0, 4, T - 1):
        others = [x.clone() for x in (q, k, v)]
        for x in others:
            x[:, :, Q + token] += 1.0
        after = ops.attention(*others, mask)
        assert torch.equal(after[:, :, : Q + token], before[:, :, : Q + token])
        assert not torch.equal(after[:, :, Q + token], before[:, :, Q + token])


def test_queries_ignore_empty_text(backend: str, device: str):
    """Matching with no text at all is the pass of the queries alone."""
    mask = RowIntervals.bidirectional(Q, T, torch.tensor([0])).to(device)
    q, k, v, _ = tensors(1, 2, Q + T, Q + T, device=device)
    alone = ops.attention(*(x[:, :, :Q] for x in (q, k, v)))
    torch.testing.assert_close(ops.attention(q, k, v, mask)[:, :, :Q], alone, rtol=0, atol=1e-6)


def test_holes_equal_the_unpadded_run(backend: str, device: str):
    """Left pads between image and text, a different number in every sample of the batch."""
    pads = torch.arange(T)
    mask = RowIntervals.causal(T, T - pads, pads, prefix=Q).to(device)
    q, k, v, _ = tensors(T, 1, Q + T, Q + T, device=device)
    out = ops.attention(q, k, v, mask)
    for p in range(T):
        rows = torch.tensor([*range(Q), *range(Q + p, Q + T)], device=device)
        x = [t[p : p + 1].index_select(2, rows) for t in (q, k, v)]
        alone = ops.attention(*x, RowIntervals.causal(T - p, prefix=Q).to(device))
        torch.testing.assert_close(out[p : p + 1].index_select(2, rows), alone, rtol=0, atol=1e-6)


def test_packed_documents_are_separate(backend: str, device: str):
    """Documents in one row equal runs of their own."""
    lengths = (32, 16, 48, 16)
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    mask = RowIntervals.packed(documents).to(device)
    q, k, v, _ = tensors(1, 2, sum(lengths), sum(lengths), device=device)
    out = ops.attention(q, k, v, mask)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        own = RowIntervals.causal(length).to(device)
        alone = ops.attention(*(x[:, :, part] for x in (q, k, v)), own)
        torch.testing.assert_close(out[:, :, part], alone, rtol=0, atol=2e-6)
        start += length


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_dominant_score(backend: str, device: str, dtype: torch.dtype):
    """A score of 3e4 (fp16's largest is 65,504) is a weight of 1, not inf or NaN."""
    q, k, v, grad = tensors(1, 1, 20, 40, 16, dtype, device)
    q[:], k[:] = 0, 0
    q[..., 0], k[:, :, 7, 0] = 200, 150
    out, *gradients = with_gradients(ops.attention, q, k, v, grad, scale=1.0)
    assert torch.equal(out, v[:, :, 7:8].expand_as(out))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_kv_row(backend: str, device: str, index: torch.dtype):
    """Texts on one image, in any order, an image nobody reads, masks and dropout of the reader."""
    kv_row = torch.tensor([2, 0, 2, 2, 0], dtype=index, device=device)
    mask = RowIntervals.full(20, 33, torch.tensor([33, 12, 0, 17, 1])).to(device)
    for dtype in DTYPES:
        operands = tensors(5, 2, 20, 33, 16, dtype, device, rows=4)
        _, _, dk, dv = check(*operands, mask=mask, kv_row=kv_row, dropout_p=0.1)
        assert torch.count_nonzero(dk[[1, 3]]) == torch.count_nonzero(dv[[1, 3]]) == 0


def test_many_readers(backend: str, device: str):
    """Re-ranking: 128 texts on one image; its gradient is the sum over duplicates."""
    readers = 8 if INTERPRETED else 128
    kv_row = torch.zeros(readers, dtype=torch.int32, device=device)
    check(*tensors(readers, 2, 17, 50, 16, device=device, rows=1), kv_row=kv_row)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_projection_in_place(backend: str, device: str, dtype: torch.dtype):
    """Views of one [B, L, 3, H, E] buffer behind an odd offset, and a gradient of stride 0."""
    storage = torch.full((3 * 2 * 40 * 2 * 24 + 3,), torch.nan, dtype=dtype, device=device)
    fused = storage[3:].view(2, 40, 3, 2, 24)
    for place, x in enumerate(tensors(2, 2, 40, 40, 24, dtype, device)[:3]):
        fused[:, :, place] = x.transpose(1, 2)
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    grad = torch.ones((), dtype=dtype, device=device).expand_as(q)
    out, dq, _, _ = check(q, k, v, grad, dropout_p=0.1)
    assert out.transpose(1, 2).is_contiguous() and dq.transpose(1, 2).is_contiguous()


def test_awkward_strides(backend: str, device: str):
    """Transposed, expanded, every second number: each dimension goes by its own stride."""
    q, k, v, grad = tensors(2, 2, 20, 20, 16, device=device)
    check(q.mT.contiguous().mT, k[:1].expand_as(k), v[:, :1].expand_as(v), grad)
    wide = torch.full((2, 2, 20, 33), torch.nan, device=device)[..., 1::2]
    wide.copy_(q)
    check(wide, k.flip(2), v.contiguous(), grad)


def test_empty(backend: str, device: str):
    """The last batch of an epoch may be empty; so may the queries."""
    for batch, queries in ((0, 5), (2, 0)):
        results = with_gradients(ops.attention, *tensors(batch, 2, queries, 7, device=device))
        assert results[0].shape == (batch, 2, queries, 16)
        assert all(torch.count_nonzero(x) == 0 for x in results)
    kv_row = torch.zeros(0, dtype=torch.int64, device=device)
    results = with_gradients(
        ops.attention, *tensors(0, 2, 5, 7, device=device, rows=3), kv_row=kv_row
    )
    assert torch.count_nonzero(results[2]) == 0


def test_runs_are_bit_equal(backend: str, device: str):
    """A rerun that differs in its last bit cannot be told from a bug."""
    operands = tensors(3, 2, 48, 65, 16, device=device, rows=2)
    kv_row = torch.tensor([1, 1, 1], device=device)
    runs = []
    for _ in range(2):
        torch.manual_seed(2)
        runs.append(with_gradients(ops.attention, *operands, kv_row=kv_row, dropout_p=0.2))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="the launchers take no fp64")
@pytest.mark.parametrize("name", MASKS)
def test_gradcheck(backend: str, device: str, name: str):
    """The backward is the derivative of the forward, for every family of masks, to fp64."""
    mask = MASKS[name].to(device)
    batch = mask.batch
    q, k, v, _ = tensors(batch, 1, mask.queries, mask.keys, 3, torch.float64, device)

    def run(*inputs: Tensor) -> Tensor:
        torch.manual_seed(0)
        return ops.attention(*inputs, mask, dropout_p=0.25)

    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_second_derivative_is_refused(backend: str, device: str):
    """A silent zero would be a wrong Hessian."""
    q, k, v, _ = (x.requires_grad_() for x in tensors(1, 1, 16, 16, device=device))
    with pytest.raises(NotImplementedError, match="attention: the second derivative"):
        torch.autograd.grad(ops.attention(q, k, v).sum(), q, create_graph=True)


def test_autocast(backend: str, device: str):
    """Under autocast q, k and v go in as for a matmul, and gradients come back in their dtype."""
    dtype = DTYPES[-1]
    q, k, v, _ = (x.requires_grad_() for x in tensors(2, 2, 20, 20, device=device))
    with torch.autocast(torch.device(device).type, dtype):
        out = ops.attention(q, k, v)
    assert out.dtype == dtype
    assert torch.equal(out, ops.attention(*(x.to(dtype) for x in (q, k, v))))
    assert torch.autograd.grad(out.sum(), q)[0].dtype == torch.float32


@pytest.mark.skipif(INTERPRETED, reason="the operator itself, not the launcher")
def test_opcheck():
    """Schema, fake and dispatch must agree, or torch.compile miscompiles around the operator."""
    mask = MASKS["multimodal_causal"]
    q, k, v, grad = tensors(3, 2, 16, 16, rows=2)
    kv_row = torch.tensor([0, 1, 1])
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for intervals, seed, p in ((mask.intervals, torch.tensor([7]), 0.1), (None, None, 0.0)):
        rest = (intervals, kv_row, seed, p, 0.25)
        torch.library.opcheck(package._fwd, (q, k, v, *rest), test_utils=tests)
        saved = (grad, q, k, v, *package._fwd(q, k, v, *rest))
        torch.library.opcheck(package._bwd, (*saved, *rest), test_utils=tests)


@pytest.mark.skipif(INTERPRETED, reason="compiles the operator, not the launcher")
def test_compiles_in_one_graph(backend: str, device: str):
    """A graph break inside a model costs its users the rest of the layer."""
    mask = RowIntervals.multimodal_causal(Q, T, LENGTHS).to(device)
    operands = tensors(3, 2, 16, 16, device=device)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: RowIntervals) -> Tensor:
        return ops.attention(q, k, v, mask) * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want = with_gradients(run, *operands, mask=mask)
    for got, expected in zip(with_gradients(compiled, *operands, mask=mask), want, strict=True):
        assert torch.equal(got, expected)


def test_flops():
    """Model FLOPs utilisation reads this formula: 4 B H Lq Lk E forward, 10 backward."""
    from torch.utils.flop_counter import FlopCounterMode

    operands = tensors(2, 3, 5, 7, 11)
    with FlopCounterMode(display=False) as counter:
        with_gradients(ops.attention, *operands)
    assert counter.get_total_flops() == 14 * 2 * 3 * 5 * 7 * 11


def bad(**changes):  # type: ignore[no-untyped-def]
    q, k, v, _ = tensors(2, 2, 5, 7)
    return {"q": q, "k": k, "v": v} | changes


X = torch.zeros(2, 2, 7, 16)
MASK = RowIntervals.full(5, 7)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (bad(q=[1.0]), TypeError, "q must be a Tensor, got list"),
        (bad(k=X[0]), ValueError, r"k must be \[B, H, L, E\], got shape \(2, 7, 16\)"),
        (bad(q=X.int()), TypeError, "q must be one of float32.*got torch.int32"),
        (bad(v=X.half()), TypeError, "q is torch.float32 but v is torch.float16"),
        (bad(k=X.to("meta")), ValueError, "q is on cpu but k is on meta"),
        (bad(v=X[:, :, :3]), ValueError, "k and v must have one shape"),
        (bad(k=X[:, :1], v=X[:, :1]), ValueError, "k must have q's heads and width, 2 and 16"),
        (bad(k=X[..., :8], v=X[..., :8]), ValueError, "k must have q's heads and width"),
        (bad(q=X[..., :0], k=X[..., :0], v=X[..., :0]), ValueError, "width of at least 1"),
        (bad(k=X[:1], v=X[:1]), ValueError, "q's batch of 2 or come with kv_row, got 1"),
        (bad(kv_row=torch.zeros(2)), TypeError, "kv_row must be an int32 or int64 Tensor"),
        (bad(kv_row=[0, 1]), TypeError, "kv_row must be an int32 or int64 Tensor, got list"),
        (bad(kv_row=torch.zeros(3).long()), ValueError, r"kv_row must be \[2\], got \(3,\)"),
        (bad(k=X[:0], v=X[:0], kv_row=torch.zeros(2).int()), ValueError, "no row for kv_row"),
        (bad(mask=MASK.to_dense()), TypeError, "mask must be RowIntervals.*got Tensor"),
        (bad(mask=RowIntervals.full(5, 6)), ValueError, "5 rows and 7 keys, got 5 and 6"),
        (bad(mask=RowIntervals.full(4, 7)), ValueError, "5 rows and 7 keys, got 4 and 7"),
        (bad(mask=RowIntervals.full(5, 7, torch.ones(3).int())), ValueError, "1 sample or 2"),
        (bad(mask=MASK.to("meta")), ValueError, "q is on cpu but mask is on meta"),
        (bad(dropout_p=1.5), ValueError, r"dropout_p must be in \[0, 1\], got 1.5"),
        (bad(dropout_p=math.nan), ValueError, "dropout_p"),
        (bad(scale=math.inf), ValueError, "scale must be finite, got inf"),
    ],
)
def test_bad_arguments(arguments, error, message):  # type: ignore[no-untyped-def]
    """Wrong input must name operator, argument, expected and got, before anything runs."""
    with pytest.raises(error, match=f"attention: .*{message}|attention: {message}"):
        ops.attention(**arguments)


def test_kv_row_out_of_range(backend: str, device: str):
    """On a CPU a row that does not exist is an error, not a read of foreign memory."""
    if device != "cpu" or backend == "triton":
        pytest.skip("a check of values would wait for the GPU")
    for row in (-3, 2):
        kv_row = torch.tensor([0, row])
        with pytest.raises((IndexError, RuntimeError)):
            ops.attention(**bad(kv_row=kv_row))
