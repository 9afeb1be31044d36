"""BLIP-2's image-text contrast: the best of Q queries is the image's similarity to a text."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmkern import _checks, _library
from mmkern._distributed import RowShard
from mmkern.ops.query_info_nce import reference

MOST_QUERIES = 256  # the best one is kept as a byte
# Similarities and best queries are kept for the backward up to this size, and beyond it while they
# take no more than the queries and their gradient in fp32: so memory stays linear in the batch.
KEPT_BYTES = 32 << 20


class QueryInfoNCE(NamedTuple):
    """What `query_info_nce` returns; the negatives are None without a seed."""

    loss: Tensor
    negative_images: Tensor | None
    negative_texts: Tensor | None


def _fake_fwd(
    queries: Tensor,
    text: Tensor,
    scale: Tensor,
    ids: Tensor,
    offset: int,
    keep: bool,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    images, texts = queries.shape[0], text.shape[0]
    stats = queries.new_empty((7, images + texts), dtype=_checks.accumulator(queries.dtype))
    drawn = images + texts if seed is not None else 0
    dots = stats.new_empty((images, texts) if keep else (0,))
    return (
        stats,
        stats.new_empty(drawn),
        ids.new_empty(drawn),
        dots,
        torch.empty_like(dots, dtype=torch.uint8),
    )


def _fake_bwd(
    queries: Tensor,
    text: Tensor,
    scale: Tensor,
    ids: Tensor,
    offset: int,
    stats: Tensor,
    grad: Tensor,
    world: int,
    label_smoothing: float,
    detach_columns: bool,
    output_mask: list[bool],
    dots: Tensor | None = None,
    best: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    d_queries = queries.new_empty(queries.shape if output_mask[0] else (0,))
    d_text = stats.new_empty(text.shape if output_mask[1] else (0,))
    return d_queries, d_text, stats.new_empty(())


def _flops_fwd(
    queries: Any,
    text: Any,
    scale: Any,
    ids: Any,
    offset: Any,
    keep: Any,
    seed: Any = None,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    images, count, width = queries
    return int(2 * images * text[0] * count * width)


def _flops_bwd(
    queries: Any,
    text: Any,
    scale: Any,
    ids: Any,
    offset: Any,
    stats: Any,
    grad: Any,
    world: Any,
    label_smoothing: Any,
    detach_columns: Any,
    output_mask: list[bool],
    dots: Any = None,
    best: Any = None,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """The least: a pair's gradient reaches one query only."""
    images, count, width = queries
    again = count if dots is None else 0
    return int(2 * images * text[0] * width * (again + sum(output_mask)))


_fwd = _library.define(
    "query_info_nce_fwd(Tensor queries, Tensor text, Tensor scale, Tensor ids, SymInt offset,"
    " bool keep, Tensor? seed=None)"
    " -> (Tensor stats, Tensor keys, Tensor draws, Tensor dots, Tensor best)",
    reference=reference.query_info_nce_fwd,
    fake=_fake_fwd,
    triton="mmkern.ops.query_info_nce.triton:query_info_nce_fwd",
    flops=_flops_fwd,
)
_loss = _library.define(
    "query_info_nce_loss(Tensor stats, float label_smoothing, SymInt texts) -> Tensor",
    reference=reference.query_info_nce_loss,
    fake=lambda stats, label_smoothing, texts: stats.new_empty(()),
    triton="mmkern.ops.query_info_nce.triton:query_info_nce_loss",
    flops=lambda *args, **kwargs: 0,
)
_bwd = _library.define(
    "query_info_nce_bwd(Tensor queries, Tensor text, Tensor scale, Tensor ids, SymInt offset,"
    " Tensor stats, Tensor grad, SymInt world, float label_smoothing, bool detach_columns,"
    " bool[2] output_mask, Tensor? dots=None, Tensor? best=None)"
    " -> (Tensor d_queries, Tensor d_text, Tensor d_scale)",
    reference=reference.query_info_nce_bwd,
    fake=_fake_bwd,
    triton="mmkern.ops.query_info_nce.triton:query_info_nce_bwd",
    flops=_flops_bwd,
)


def query_info_nce(
    queries: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    *,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    detach_columns: bool = False,
    negatives_seed: int | Tensor | None = None,
    group: ProcessGroup | None = None,
) -> QueryInfoNCE:
    r"""Symmetric contrast of images that have Q vectors each with texts that have one.

    .. math::
        S_{ij} = s \max_q \langle v_{iq}, t_j \rangle, \qquad
        L = -\frac{1}{2N} \sum_{ij} P_{ij} \big( \log \mathrm{softmax}_j(S)_{ij}
                                               + \log \mathrm{softmax}_i(S)_{ij} \big)

    The image-text contrast of BLIP-2 (Li et al. 2023, arXiv 2301.12597, section 3.1), with the
    targets of its reference implementation:

    .. math::
        P_{ij} = (1 - \varepsilon) \frac{[\mathrm{id}_i = \mathrm{id}_j]}
                 {\sum_k [\mathrm{id}_i = \mathrm{id}_k]} + \frac{\varepsilon}{N}

    so that without ids each direction is ``cross_entropy(..., label_smoothing)``. The [N, N, Q]
    products exist a tile at a time. Of queries that tie for the maximum the first gets the
    gradient. 2 N² Q D FLOPs; the gradient of a pair reaches one query, so it needs 4 N² D more.

    Args:
        queries: [N, Q, D] in fp32, bf16, fp16 or fp64, any strides, 1 <= Q <= 256. The caller
            normalises the vectors.
        text: [N, D], same dtype; text i belongs to image i.
        logit_scale: s (1 / temperature), a number or a tensor of shape [] or [1].
        label_smoothing: ε; BLIP-2 takes 0.1.
        ids: [N] integers; pairs with equal ids are positives of each other (several captions of one
            image). Without it every pair has an id of its own.
        detach_columns: what the reference implementation does under a process group, on any number
            of ranks: the image-to-text half trains the queries only and the other half the texts
            only, because what each is compared with is detached. The scale's gradient is whole.
        negatives_seed: an integer, or an integer tensor of one element (read on the device). Draws,
            from the softmax of its row or column of S over the pairs with another id, a negative
            text for each image and a negative image for each text: the input of image-text
            matching. The numbers are a function of seed, direction and the two indices in the
            global batch, so the number of ranks and of threads changes no draw.
        group: each rank passes its local rows, equal counts or not, and gets the loss of the whole
            batch. Gradients, that of `logit_scale` included, are scaled by the number of ranks, so
            that the average DDP takes is the gradient of this loss. `negatives_seed` must be the
            same on all ranks.

    Returns:
        QueryInfoNCE. loss: 0-d, fp32 (fp64 for fp64 inputs). negative_images: int64 [N], for each
        local text the index of an image in the global batch, -1 where every image is a positive
        (N = 1, equal ids); negative_texts: the same for each local image. Both None without a seed.

    Saved for backward: the inputs, 14 N numbers, and 5 N² bytes while that is at most 32 MiB or the
    size of the queries and their fp32 gradient; beyond, similarities are computed again. NaN in the
    inputs gives a loss of NaN, and no NaN is ever drawn. Two runs are bit-equal. A second
    derivative raises NotImplementedError.

    Raises:
        ValueError: N = 0 (on every rank, if it holds for one), Q or D of 0, Q > 256, shapes,
            devices, counts of images, texts and ids that differ, label_smoothing.
        TypeError: dtypes that differ or are not floating point; ids or seed that are no integers.
    """
    op = "query_info_nce"
    _check_inputs(op, queries, text, ids)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    scale = _checks.scalar(op, "logit_scale", logit_scale, text)
    seed = _seed(op, negatives_seed, text)
    queries, text = _checks.autocast(queries, text)
    shard = RowShard.of(op, text, text, group, name="queries")  # as many of both
    with _checks.exact(text):
        if ids is not None:
            ids = shard.gather(ids.to(torch.int64))
        else:
            ids = torch.arange(sum(shard.texts), device=text.device)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (queries, text, scale)):
            loss, draws = _QueryInfoNCE.apply(
                queries, text, scale, ids, label_smoothing, detach_columns, seed, shard
            )
        else:
            texts = shard.gather(text)
            loss, draws, *_ = _forward(
                queries, texts, scale, ids, label_smoothing, seed, shard, False
            )
    if seed is None:
        return QueryInfoNCE(loss, None, None)
    count = queries.shape[0]
    return QueryInfoNCE(loss, draws[count:], draws[:count])


def _check_inputs(op: str, queries: Tensor, text: Tensor, ids: Tensor | None) -> None:
    for name, value, shape in (("queries", queries, "[N, Q, D]"), ("text", text, "[N, D]")):
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")
        if value.dim() != shape.count(",") + 1:
            raise ValueError(f"{op}: {name} must be {shape}, got shape {tuple(value.shape)}")
        if value.dtype not in _checks.FEATURE_DTYPES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in _checks.FEATURE_DTYPES)
            raise TypeError(f"{op}: {name} must be one of {allowed}, got {value.dtype}")
    if queries.dtype != text.dtype:
        raise TypeError(f"{op}: queries is {queries.dtype} but text is {text.dtype}")
    if queries.device != text.device:
        raise ValueError(f"{op}: queries is on {queries.device} but text is on {text.device}")
    images, count, width = queries.shape
    if width != text.shape[1]:
        raise ValueError(
            f"{op}: queries and text must have one width, got {width} and {text.shape[1]}"
        )
    if width == 0:
        raise ValueError(f"{op}: queries and text need a width of at least 1, got 0")
    if not 1 <= count <= MOST_QUERIES:
        raise ValueError(f"{op}: queries must have 1 to {MOST_QUERIES} vectors, got {count}")
    if images != text.shape[0]:
        raise ValueError(
            f"{op}: text must have a row for each of the {images} images, got {text.shape[0]}"
        )
    if ids is None:
        return
    if not isinstance(ids, Tensor):
        raise TypeError(f"{op}: ids must be a Tensor of integers, got {type(ids).__name__}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{op}: ids must be integers, got {ids.dtype}")
    if ids.shape != (images,):
        raise ValueError(f"{op}: ids must have shape ({images},), got {tuple(ids.shape)}")
    if ids.device != text.device:
        raise ValueError(f"{op}: ids is on {ids.device} but text is on {text.device}")


def _seed(op: str, seed: int | Tensor | None, like: Tensor) -> Tensor | None:
    """int64 on `like`'s device."""
    if seed is None:
        return None
    if isinstance(seed, Tensor):
        if seed.numel() != 1:
            raise ValueError(f"{op}: negatives_seed must have one element, got {tuple(seed.shape)}")
        if seed.is_floating_point() or seed.is_complex() or seed.dtype == torch.bool:
            raise TypeError(f"{op}: negatives_seed must be an integer, got {seed.dtype}")
        return seed.to(like.device, torch.int64)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{op}: negatives_seed must be an integer, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{op}: negatives_seed must fit in 64 bits, got {seed}")
    return torch.full((), seed, dtype=torch.int64, device=like.device)


def _keep(queries: Tensor, texts: int) -> bool:
    """Whether the backward should find similarities and best queries."""
    images, count, width = queries.shape
    if 5 * images * texts <= KEPT_BYTES:
        return True
    return bool(5 * texts <= count * width * (queries.element_size() + 4))


def _forward(
    queries: Tensor,
    texts: Tensor,
    scale: Tensor,
    ids: Tensor,
    smoothing: float,
    seed: Tensor | None,
    shard: RowShard,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss and local draws, and what the backward needs: statistics of local rows and of all
    columns, similarities and best queries. `texts` and `ids` are all ranks'."""
    stats, keys, draws, dots, best = _fwd(queries, texts, scale, ids, shard.offset, keep, seed)
    own = stats
    if shard.world > 1:
        # Column statistics cover local rows only: collect all ranks' for the texts of this one.
        count = queries.shape[0]
        rows, columns = stats[:, :count], shard.exchange(stats[:, count:].T.contiguous())
        columns = _merge(columns)
        own = torch.cat([rows, columns.T], 1)
        stats = torch.cat([rows, shard.gather(columns).T], 1)
        if seed is not None:
            of_column = shard.exchange(draws[count:])
            least, rank = shard.exchange(keys[count:]).min(0)
            of_column = of_column.gather(0, rank[None])[0].masked_fill(least == torch.inf, -1)
            draws = torch.cat([draws[:count], of_column])
    count = texts.shape[0]
    return shard.sum(_loss(own, smoothing, count)) / (2 * count), draws, stats, dots, best


def _merge(parts: Tensor) -> Tensor:
    """Statistics [N, 7] over all ranks' rows from those [W, N, 7] of each rank's."""
    top = parts[..., 0:4:2].amax(0)
    rescale = (parts[..., 0:4:2] - torch.where(top == -torch.inf, 0.0, top)).exp()
    sums = (parts[..., 1:4:2] * rescale).sum(0)
    return torch.cat([torch.stack([top, sums], 2).flatten(1), parts[..., 4:].sum(0)], 1)


class _QueryInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        text: Tensor,
        scale: Tensor,
        ids: Tensor,
        smoothing: float,
        detach_columns: bool,
        seed: Tensor | None,
        shard: RowShard,
    ) -> tuple[Tensor, Tensor]:
        texts = shard.gather(text)
        keep = _keep(queries, texts.shape[0])
        loss, draws, stats, *kept = _forward(
            queries, texts, scale, ids, smoothing, seed, shard, keep
        )
        ctx.mark_non_differentiable(draws)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(queries, texts, scale, ids, stats, *(kept if keep else ()))
        ctx.options, ctx.shard = (smoothing, detach_columns), shard
        return loss, draws

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        _checks.first_derivative_only("query_info_nce")
        if grad is None:
            return (None,) * 8
        with _checks.exact(grad):
            return (*_backward(ctx, grad), None, None, None, None, None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of queries, text and scale."""
    queries, texts, scale, ids, stats, *kept = ctx.saved_tensors
    shard: RowShard = ctx.shard
    want_queries, want_text, want_scale = ctx.needs_input_grad[:3]
    # DDP divides by the number of ranks; scaling by it here leaves the global gradient.
    d_queries, d_text, d_scale = _bwd(
        queries, texts, scale, ids, shard.offset, stats, grad, shard.world, *ctx.options,
        [want_queries, want_text], *kept,
    )  # fmt: skip
    return (
        d_queries if want_queries else None,
        shard.reduce_scatter(d_text).to(texts.dtype) if want_text else None,
        d_scale.to(scale.dtype).view(scale.shape) if want_scale else None,
    )
