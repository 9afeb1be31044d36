"""Linear cross-entropy on the GPU: tiles over a list of labelled rows that the host never counts.

`lce_index` lists the labelled rows, -1 behind the last. Grids have room for all rows, and programs
behind the last return at once, so cost follows the labels while the host waits for nothing and a
captured graph follows new labels. The backward forms the gradient's weights for a block of the
vocabulary at a time in the inputs' dtype; two products with them are the gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkern import _triton
from mmkern._triton import Tile, Variant

WEIGHT_BYTES = 256 << 20  # largest block of gradient weights held at once
_PROGRAMS = 1024  # programs of the forward with every row labelled, at least
_GROUP = 16  # row tiles whose programs run side by side, for L2
_MERGE = 128  # rows of a program that merges
_SIZES = ["rows", "vocabulary", "chunk", "chunks", "start", "width", "group", "smoothing", "shift"]


def tile(dtype: torch.dtype) -> Tile:
    """For products."""
    return Tile(64, 64, 32, 4, 3) if dtype == torch.float32 else Tile(128, 128, 64, 8, 3)


def partials_tile(arch: int, dtype: torch.dtype) -> Tile:
    """For log-sum-exps. From sm_100 on, where a tile comes from tensor memory as a whole, 128
    columns spill."""
    wide = tile(dtype)
    return wide._replace(n=64) if arch >= 100 else wide


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def lce_index(labels, place, index, rows, ignore_index, BM: tl.constexpr):
    """index[place_i - 1] = i for labelled rows; `place` counts them up to and with row i."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    labelled = tl.load(labels + i, mask=i < rows, other=ignore_index) != ignore_index
    at = tl.load(place + i, mask=labelled, other=1) - 1
    tl.store(index + at, i, mask=labelled)


@triton.jit
def grouped(program, columns, group):
    """(row tile, column tile) of a program: `group` row tiles side by side share their columns."""
    within = program % (group * columns)
    return program // (group * columns) * group + within % group, within // group


@triton.jit
def label_of(labels, row, seen, vocabulary):
    """The column of each row's label; -1 where it is none of the vocabulary's."""
    y = tl.load(labels + row, mask=seen, other=-1)
    return tl.where((y >= 0) & (y < vocabulary), y, -1).to(tl.int32)


@triton.jit
def logits_tile(hidden, weight, bias, row, seen, j, vocabulary, D, hidden_stride, weight_stride,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """hidden[row] · weight[j]ᵀ + bias[j], fp32 [BM, BN]."""
    own = hidden + row.to(tl.int64)[:, None] * hidden_stride
    classes = weight + j.to(tl.int64)[:, None] * weight_stride
    s = tl.zeros([BM, BN], dtype=tl.float32)
    for start in tl.range(0, D, BK):
        k = start + tl.arange(0, BK)
        h = tl.load(own + k[None, :], mask=seen[:, None] & (k < D)[None, :], other=0.0)
        w = tl.load(classes + k[None, :], mask=(j < vocabulary)[:, None] & (k < D)[None, :],
                    other=0.0)  # fmt: skip
        s = tl.dot(h, w.T, s, input_precision=PRECISION)
    if bias is not None:
        s += tl.load(bias + j, mask=j < vocabulary, other=0.0).to(tl.float32)[None, :]
    return s


@triton.jit(do_not_specialize=_SIZES)
def lce_partials(hidden, weight, bias, labels, index, partials, sums, positives,
                 rows, vocabulary, chunk, chunks, group, D, hidden_stride, weight_stride,
                 BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """Of one row tile and one chunk of the vocabulary: log-sum-exp of the logits but the labels',
    their sums (where `sums` is given), and the labels' logits that lie in it."""
    row_tile, part = grouped(tl.program_id(0), chunks, group)
    i = row_tile * BM + tl.arange(0, BM)
    row = tl.load(index + i, mask=i < rows, other=-1)
    if tl.max(row, 0) < 0:  # behind the last labelled row
        return
    seen = row >= 0
    y = label_of(labels, row, seen, vocabulary)
    top = tl.full([BM], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BM], dtype=tl.float32)
    added = tl.zeros([BM], dtype=tl.float32)
    first = part * chunk
    for start in tl.range(first, tl.minimum(first + chunk, vocabulary), BN):
        j = start + tl.arange(0, BN)
        s = logits_tile(hidden, weight, bias, row, seen, j, vocabulary, D, hidden_stride,
                        weight_stride, BM, BN, BK, PRECISION)  # fmt: skip
        own = j[None, :] == y[:, None]
        here = (y >= start) & (y < start + BN)
        positive = tl.sum(tl.where(own, s, 0.0), 1)
        # +inf less itself is NaN, as in a softmax.
        tl.store(positives + row, tl.where(positive == float("inf"), float("nan"), positive),
                 mask=here)  # fmt: skip
        if sums is not None:
            added += tl.sum(tl.where((j < vocabulary)[None, :], s, 0.0), 1)
        s = tl.where(own | (j >= vocabulary)[None, :], float("-inf"), s)
        larger = tl.maximum(top, tl.max(s, 1))
        reference = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(top - reference) + tl.sum(tl.exp(s - reference[:, None]), 1)
        top = larger
    reference = tl.where(top == float("-inf"), 0.0, top)
    out = tl.cast(part, tl.int64) * rows + i
    tl.store(partials + out, reference + tl.log(total), mask=seen)
    if sums is not None:
        tl.store(sums + out, added, mask=seen)


@triton.jit(do_not_specialize=["rows", "vocabulary", "chunks"])
def lce_merge(partials, sums, labels, index, negatives, positives, means, rows, vocabulary, chunks,
              BM: tl.constexpr):  # fmt: skip
    """Chunks' log-sum-exps and sums to those of rows; NaN for labels outside the vocabulary."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    row = tl.load(index + i, mask=i < rows, other=-1)
    seen = row >= 0
    top = tl.full([BM], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BM], dtype=tl.float32)
    added = tl.zeros([BM], dtype=tl.float32)
    for part in tl.range(0, chunks):
        place = tl.cast(part, tl.int64) * rows + i
        x = tl.load(partials + place, mask=seen, other=float("-inf"))
        larger = tl.maximum(top, x)
        reference = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(top - reference) + tl.exp(x - reference)
        top = larger
        if sums is not None:
            added += tl.load(sums + place, mask=seen, other=0.0)
    reference = tl.where(top == float("-inf"), 0.0, top)
    tl.store(negatives + row, reference + tl.log(total), mask=seen)
    if sums is not None:
        tl.store(means + row, added / vocabulary, mask=seen)
    wrong = seen & (label_of(labels, row, seen, vocabulary) < 0)
    tl.store(positives + row, tl.full([BM], float("nan"), dtype=tl.float32), mask=wrong)


@triton.jit(do_not_specialize=_SIZES)
def lce_weights(hidden, weight, bias, labels, index, negatives, positives, grad, unit, block,
                rows, vocabulary, start, width, smoothing, shift, group, D, hidden_stride,
                weight_stride, block_stride,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """2^shift grad / unit · (softmax - (1 - ε) onehot - ε / V) of `width` columns from `start`."""
    row_tile, column_tile = grouped(tl.program_id(0), tl.cdiv(width, BN), group)
    i = row_tile * BM + tl.arange(0, BM)
    row = tl.load(index + i, mask=i < rows, other=-1)
    if tl.max(row, 0) < 0:
        return
    seen = row >= 0
    place = column_tile * BN + tl.arange(0, BN)
    j = start + place
    s = logits_tile(hidden, weight, bias, row, seen, j, vocabulary, D, hidden_stride,
                    weight_stride, BM, BN, BK, PRECISION)  # fmt: skip
    negative = tl.load(negatives + row, mask=seen, other=0.0)
    positive = tl.load(positives + row, mask=seen, other=0.0)
    margin = negative - positive
    # log(e^positive + e^negative) without overflow; NaN passes.
    most = tl.where(margin > 0, negative, positive)
    lse = most + tl.log(1 + tl.exp(-tl.abs(margin)))
    missing = tl.where(margin > 0, 1 / (1 + tl.exp(-margin)), tl.exp(margin) / (1 + tl.exp(margin)))
    factor = tl.load(grad + row, mask=seen, other=0.0) / tl.load(unit) * tl.exp2(shift)
    y = label_of(labels, row, seen, vocabulary)
    p = tl.exp(s - lse[:, None])
    p = tl.where(j[None, :] == y[:, None], (smoothing - missing)[:, None], p)
    p = (p - smoothing / vocabulary) * factor[:, None]
    # Rows behind the last and columns of padding are written as zeros: products read them.
    p = tl.where(seen[:, None] & (j < vocabulary)[None, :], p, 0.0)
    pointers = block + i.to(tl.int64)[:, None] * block_stride + place[None, :]
    tl.store(pointers, p.to(block.dtype.element_ty),
             mask=(i < rows)[:, None] & (place < block_stride)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def lce_d_hidden(block, weight, index, sums, out, unit, rows, start, width, shift, group, D,
                 block_stride, weight_stride,
                 FIRST: tl.constexpr, LAST: tl.constexpr,
                 BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """sums (+)= block · weight[start:]; after the LAST block, out[index] = unit 2^-shift sums."""
    row_tile, column_tile = grouped(tl.program_id(0), tl.cdiv(D, BN), group)
    i = row_tile * BM + tl.arange(0, BM)
    row = tl.load(index + i, mask=i < rows, other=-1)
    if tl.max(row, 0) < 0:
        return
    d = column_tile * BN + tl.arange(0, BN)
    s = tl.zeros([BM, BN], dtype=tl.float32)
    own = block + i.to(tl.int64)[:, None] * block_stride
    for begin in tl.range(0, width, BK):
        k = begin + tl.arange(0, BK)
        p = tl.load(own + k[None, :], mask=(i < rows)[:, None] & (k < width)[None, :], other=0.0)
        pointers = weight + (start + k).to(tl.int64)[:, None] * weight_stride + d[None, :]
        w = tl.load(pointers, mask=(k < width)[:, None] & (d < D)[None, :], other=0.0)
        s = tl.dot(p, w, s, input_precision=PRECISION)
    mask = (row >= 0)[:, None] & (d < D)[None, :]
    place = i.to(tl.int64)[:, None] * D + d[None, :]
    if not FIRST:
        s += tl.load(sums + place, mask=mask, other=0.0)
    if LAST:
        s *= tl.load(unit) * tl.exp2(-shift)
        pointers = out + row.to(tl.int64)[:, None] * D + d[None, :]
        tl.store(pointers, s.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(sums + place, s, mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def lce_d_weight(block, hidden, index, place, out, d_bias, unit, rows, start, width, shift, group,
                 D, block_stride, hidden_stride,
                 BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """out[start + v] = unit 2^-shift Σ_i block[i, v] hidden[index[i]], and d_bias without hidden.
    The last element of `place` is the number of labelled rows."""
    class_tile, column_tile = grouped(tl.program_id(0), tl.cdiv(D, BN), group)
    v = class_tile * BM + tl.arange(0, BM)
    if class_tile * BM >= width:
        return
    d = column_tile * BN + tl.arange(0, BN)
    count = tl.load(place + rows - 1).to(tl.int32)
    s = tl.zeros([BM, BN], dtype=tl.float32)
    total = tl.zeros([BM], dtype=tl.float32)
    for begin in tl.range(0, count, BK):
        i = begin + tl.arange(0, BK)
        row = tl.load(index + i, mask=i < rows, other=-1)
        pointers = block + i.to(tl.int64)[:, None] * block_stride + v[None, :]
        p = tl.load(pointers, mask=(i < count)[:, None] & (v < width)[None, :], other=0.0)
        pointers = hidden + row.to(tl.int64)[:, None] * hidden_stride + d[None, :]
        h = tl.load(pointers, mask=(row >= 0)[:, None] & (d < D)[None, :], other=0.0)
        s = tl.dot(p.T, h, s, input_precision=PRECISION)
        if d_bias is not None:
            total += tl.sum(p.to(tl.float32), 0)
    factor = tl.load(unit) * tl.exp2(-shift)
    pointers = out + (start + v).to(tl.int64)[:, None] * D + d[None, :]
    tl.store(pointers, (s * factor).to(out.dtype.element_ty),
             mask=(v < width)[:, None] & (d < D)[None, :])  # fmt: skip
    if d_bias is not None:  # noqa: SIM102 (settled at compile time)
        if column_tile == 0:
            tl.store(d_bias + start + v, total * factor, mask=v < width)


class _Rows:
    """The labelled rows of a batch, listed and counted on the device."""

    def __init__(self, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> None:
        self.hidden, self.weight = _triton.padded(hidden), _triton.padded(weight)
        self.labels = labels.contiguous()
        self.count, self.vocabulary = hidden.shape[0], weight.shape[0]
        self.width = self.hidden.shape[1]
        self.tile = tile(hidden.dtype)
        # Labelled rows up to and with each: the last one is their number.
        self.place = torch.cumsum(self.labels != ignore_index, 0)
        self.index = labels.new_full((self.count,), -1, dtype=torch.int32)
        lce_index[(triton.cdiv(self.count, _MERGE),)](
            self.labels, self.place, self.index, self.count, ignore_index, BM=_MERGE
        )

    def operands(self) -> dict[str, object]:
        """What the kernels with logits take."""
        return {
            "hidden": self.hidden,
            "weight": self.weight,
            "labels": self.labels,
            "index": self.index,
            "rows": self.count,
            "vocabulary": self.vocabulary,
            "D": self.width,
            "hidden_stride": self.hidden.stride(0),
            "weight_stride": self.weight.stride(0),
            **self.tile.constants(self.hidden.dtype),
        }

    def grid(self, columns: int) -> tuple[dict[str, int], tuple[int]]:
        """Row tiles side by side, and programs, of a launch with that many column tiles."""
        return _grid(triton.cdiv(self.count, self.tile.m), columns)


def _grid(tiles: int, columns: int) -> tuple[dict[str, int], tuple[int]]:
    group = min(tiles, _GROUP)
    return {"group": group}, (triton.cdiv(tiles, group) * group * columns,)


@_triton.launcher
def linear_cross_entropy_fwd(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    mean: bool,
    kept_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The contract of `reference.linear_cross_entropy_fwd`, but that a label outside the vocabulary
    gives NaN. Nothing is kept."""
    count = hidden.shape[0]
    negatives = hidden.new_full((count,), -torch.inf, dtype=torch.float32)
    positives = torch.zeros_like(negatives)
    means = positives.new_zeros(count if mean else 0)
    kept = labels.new_empty(kept_bytes, dtype=torch.uint8)
    if count == 0:
        return negatives, positives, means, kept
    rows = _Rows(hidden, weight, labels, ignore_index)
    t = partials_tile(_triton.capability(hidden), hidden.dtype)
    strips = triton.cdiv(rows.vocabulary, t.n)
    # Enough chunks for a full device when most rows have no label.
    chunks = min(strips, max(16, triton.cdiv(_PROGRAMS, triton.cdiv(count, t.m))))
    chunk = triton.cdiv(strips, chunks) * t.n
    chunks = triton.cdiv(rows.vocabulary, chunk)
    partials = positives.new_empty(chunks, count)
    sums = torch.empty_like(partials) if mean else None
    group, grid = rows.grid(chunks)
    lce_partials[grid](
        **group, bias=_vector(bias), partials=partials, sums=sums, positives=positives,
        chunk=chunk, chunks=chunks, **rows.operands() | t.constants(hidden.dtype),
    )  # fmt: skip
    lce_merge[(triton.cdiv(count, _MERGE),)](
        partials, sums, rows.labels, rows.index, negatives, positives, means, count,
        rows.vocabulary, chunks, BM=_MERGE,
    )  # fmt: skip
    return negatives, positives, means, kept


def _vector(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


@_triton.launcher
def linear_cross_entropy_bwd(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    negatives: Tensor,
    positives: Tensor,
    kept: Tensor,
    ignore_index: int,
    smoothing: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The contract of `reference.linear_cross_entropy_bwd`.

    Memory above inputs and results: a block of weights, and the sums of d_hidden in fp32 where the
    vocabulary takes more than one block.
    """
    want_hidden, want_weight, want_bias = output_mask
    count, width = hidden.shape
    vocabulary = weight.shape[0]
    d_bias = grad.new_zeros(vocabulary if want_bias else 0)
    bias_dtype = hidden.dtype if bias is None else bias.dtype
    if count == 0:
        d_hidden = hidden.new_zeros(hidden.shape if want_hidden else (0,))
        d_weight = weight.new_zeros(weight.shape if want_weight else (0,))
        return d_hidden, d_weight, d_bias.to(bias_dtype)
    rows = _Rows(hidden, weight, labels, ignore_index)
    dtype, t = hidden.dtype, rows.tile
    d_hidden = hidden.new_zeros((count, rows.width) if want_hidden else (0,))
    d_weight = weight.new_empty((vocabulary, rows.width) if want_weight else (0,))
    # Weights of at most 1 in a 16-bit type: the largest gradient is a factor of the results.
    unit = torch.where(rows.labels != ignore_index, grad.abs(), 0.0).amax().view(1)
    unit = torch.where(unit == 0, 1.0, unit)
    shift = float(_triton.weight_shift(dtype))

    columns = max(WEIGHT_BYTES // (count * hidden.element_size()) // t.n, 1) * t.n
    columns = min(columns, triton.cdiv(vocabulary, t.n) * t.n)
    block = hidden.new_empty(count, columns)
    sums = grad.new_empty(count, rows.width) if want_hidden and columns < vocabulary else None
    # d_bias is d_weight without hidden: alone, it takes a product of one tile's width.
    part = rows.width if want_weight else min(rows.width, t.n)
    out = d_weight if want_weight else weight.new_empty(vocabulary, part) if want_bias else None
    constants = t.constants(dtype)
    common = {"shift": shift, "unit": unit, "block": block, "block_stride": columns}
    listed = {"rows": count, "index": rows.index}
    for start in range(0, vocabulary, columns):
        span = min(columns, vocabulary - start)
        group, grid = rows.grid(triton.cdiv(span, t.n))
        lce_weights[grid](
            **common, **group, **rows.operands(),
            bias=_vector(bias), negatives=negatives, positives=positives, grad=grad.contiguous(),
            start=start, width=span, smoothing=smoothing,
        )  # fmt: skip
        if want_hidden:
            group, grid = rows.grid(triton.cdiv(rows.width, t.n))
            lce_d_hidden[grid](
                **common, **listed, **group, weight=rows.weight, sums=sums, out=d_hidden,
                start=start, width=span, D=rows.width, weight_stride=rows.weight.stride(0),
                FIRST=start == 0, LAST=start + span == vocabulary, **constants,
            )  # fmt: skip
        if out is not None:
            group, grid = _grid(triton.cdiv(span, t.m), triton.cdiv(part, t.n))
            lce_d_weight[grid](
                **common, **listed, **group, hidden=rows.hidden, place=rows.place, out=out,
                d_bias=d_bias if want_bias else None, start=start, width=span, D=part,
                hidden_stride=rows.hidden.stride(0), **constants,
            )  # fmt: skip
    if rows.width > width:  # padded
        d_hidden = d_hidden[:, :width].contiguous() if want_hidden else d_hidden
        d_weight = d_weight[:, :width].contiguous() if want_weight else d_weight
    return d_hidden, d_weight, d_bias.to(bias_dtype)


def variants(arch: int, dtype: torch.dtype) -> list[Variant]:
    """Everything this module can ask Triton to compile for one architecture and dtype."""
    features = _triton._TYPES[dtype]
    kinds = dict.fromkeys(("hidden", "weight", "bias", "block", "out"), f"*{features}")
    kinds |= dict.fromkeys(("partials", "sums", "negatives", "positives", "means"), "*fp32")
    kinds |= dict.fromkeys(("grad", "unit", "d_bias"), "*fp32")
    kinds |= {"labels": "*i64", "place": "*i64", "index": "*i32"}
    kinds |= {"smoothing": "fp32", "shift": "fp32"}
    products = tile(dtype).constants(dtype)
    partials = partials_tile(arch, dtype).constants(dtype)
    found = [Variant("lce_index", lce_index, dtype, None, kinds, {"BM": _MERGE})]
    for full in (False, True):  # with a bias and smoothing, or without
        none = {} if full else {"sums": None}
        found.append(
            Variant(f"lce_merge{' full' * full}", lce_merge, dtype, None, kinds,
                    none | {"BM": _MERGE}, rare=full)
        )  # fmt: skip
        for kernel, absent in (
            (lce_partials, ("bias", "sums")),
            (lce_weights, ("bias",)),
            (lce_d_weight, ("d_bias",)),
        ):
            constants = partials if kernel is lce_partials else products
            constants = constants | ({} if full else dict.fromkeys(absent))
            name = f"{kernel.__name__}{' full' * full}"
            found.append(
                Variant(name, kernel, dtype, None, kinds, constants, products=True, rare=full)
            )
    for first, last in ((True, True), (True, False), (False, False), (False, True)):
        constants = products | {"FIRST": first, "LAST": last}
        if first and last:
            constants["sums"] = None
        found.append(
            Variant(f"lce_d_hidden {first:d}{last:d}", lce_d_hidden, dtype, None, kinds, constants,
                    products=True, rare=first != last)
        )  # fmt: skip
    return found
