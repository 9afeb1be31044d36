"""Triton pieces that operators share: tiles of logits, masks by intervals, launches, compiling.

Kernels read rows through tensor descriptors (the bulk copy engine) from sm_90 on, through pointers
before. Nothing is tuned at run time: an operator's configurations are constants, chosen by dtype,
device and size, and all of them are compiled for every architecture in the tests.
"""

from __future__ import annotations

import functools
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

Result = TypeVar("Result")

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

# Run-time arguments of the tile kernels that Triton must not compile for: a multiple of 16 here and
# none there would be further kernels, of other register counts than those the tests compile.
SIZES = ["rows", "columns", "offset", "chunks", "chunk_rows"]

WEIGHT_BYTES = 512 << 20  # largest block of gradient weights held at once
_WIDTH_MULTIPLE = 16  # features a row is padded to: 16-byte copies, and no mask along D
_BLOCK_MULTIPLE = 128  # rows and columns a block of weights is cut at
_PROGRAMS = 256  # programs a launch aims for: about two for each multiprocessor of an H100

_RANGE: tl.constexpr = tl.constexpr(128)  # rows whose intervals are compared at a time
_LARGE_TILES = 128  # fewer would leave multiprocessors idle

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Config:
    """Tile of a kernel: [block_m, block_n] logits in steps of block_k features."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    descriptors: bool
    flatten: bool  # one pipelined loop over row tiles and features: loads run under the epilogue

    @property
    def name(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_k}"

    def constants(self, dtype: torch.dtype) -> dict[str, object]:
        """The compile-time arguments that every kernel here takes."""
        return {
            "BM": self.block_m,
            "BN": self.block_n,
            "BK": self.block_k,
            "DESCRIPTORS": self.descriptors,
            "FLATTEN": self.flatten,
            # An fp32 tensor core product would be TF32's: 10 bits of mantissa.
            "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# A tile of [256, 128] reads from L2 half of what [128, 128] does per FLOP, and gives a thread few
# columns, so that their sums fit in its registers. Small batches need more programs instead.
_SMALL = Config(64, 128, 64, warps=4, stages=3, descriptors=True, flatten=True)
_CONFIGS = {  # by the least architecture: large, small
    80: (
        Config(128, 128, 64, warps=8, stages=3, descriptors=False, flatten=False),
        replace(_SMALL, descriptors=False, flatten=False),
    ),
    90: (Config(256, 128, 64, warps=8, stages=3, descriptors=True, flatten=True), _SMALL),
    100: (
        Config(128, 128, 64, warps=8, stages=3, descriptors=True, flatten=True),
        replace(_SMALL, warps=8),
    ),
}
_CONFIGS[120] = _CONFIGS[80]  # no tcgen05, and shared memory of 99 KiB
_FP32 = Config(64, 64, 32, warps=4, stages=3, descriptors=False, flatten=False)


def configs(arch: int, dtype: torch.dtype) -> tuple[Config, Config]:
    """The large and the small tile for an architecture; both cut columns into the same strips."""
    if dtype == torch.float32:
        return _FP32, _FP32
    return _CONFIGS[max(known for known in _CONFIGS if known <= max(arch, 80))]


def pick(image: Tensor, text: Tensor) -> Config:
    """The tile for a problem."""
    large, small = configs(capability(image), image.dtype)
    tiles = triton.cdiv(image.shape[0], large.block_m) * triton.cdiv(text.shape[0], large.block_n)
    return large if tiles >= _LARGE_TILES else small


class Tile(NamedTuple):
    """A plain product: [m, n] results in steps of k."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def constants(self, dtype: torch.dtype) -> dict[str, object]:
        return {
            "BM": self.m,
            "BN": self.n,
            "BK": self.k,
            # An fp32 tensor core product would be TF32's: 10 bits of mantissa.
            "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


@dataclass(frozen=True)
class Variant:
    """One compilation that the package can ask for: what the tests compile for every target."""

    name: str
    kernel: object
    dtype: torch.dtype
    config: Config | None  # None for the kernels without tiles of logits
    arguments: dict[str, str]  # Triton types of run-time arguments; features and ints may be absent
    constants: dict[str, object]
    products: bool = False  # whether it multiplies matrices: 16 bit must reach the tensor cores
    rare: bool = False  # whether to leave it to the long run of the tests


@triton.jit
def feature_tile(rows, start, count, stride, k, D, B: tl.constexpr, BK: tl.constexpr,
                 DESCRIPTORS: tl.constexpr):  # fmt: skip
    """Rows start to start + B, features k to k + BK: [B, BK], zeros past D (and, by descriptor,
    past the last row; by pointer the last row again, which the epilogues mask)."""
    if DESCRIPTORS:
        return rows.load([start, k])
    else:
        index = tl.minimum(start + tl.arange(0, B), count - 1).to(tl.int64)
        features = k + tl.arange(0, BK)
        pointers = rows + index[:, None] * stride + features[None, :]
        return tl.load(pointers, mask=(features < D)[None, :], other=0.0)


@triton.jit
def similarity_tile(image, text, row, column, rows, columns, image_stride, text_stride, D,
                    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """image · textᵀ for one tile, fp32 [BM, BN], before the scale."""
    tl.assume(D > 0)  # else a flattened loop is compiled twice, once for rows of no features
    tile = tl.zeros([BM, BN], dtype=tl.float32)
    for k in tl.range(0, D, BK):
        a = feature_tile(image, row, rows, image_stride, k, D, BM, BK, DESCRIPTORS)
        b = feature_tile(text, column, columns, text_stride, k, D, BN, BK, DESCRIPTORS)
        tile = tl.dot(a, b.T, tile, input_precision=PRECISION)
    return tile


@triton.jit
def mask_tile(tile, fill, row, column, rows, columns, offset, BM: tl.constexpr, BN: tl.constexpr):
    """`fill` where column = row + offset, and outside [rows, columns]."""
    touches = (row + offset < column + BN) & (row + BM + offset > column)
    if touches | (row + BM > rows) | (column + BN > columns):
        i = row + tl.arange(0, BM)
        j = column + tl.arange(0, BN)
        hidden = (j[None, :] == (i + offset)[:, None]) | (i >= rows)[:, None]
        tile = tl.where(hidden | (j >= columns)[None, :], fill, tile)
    return tile


@triton.jit
def store_tile(block, tile, row, column, rows, stride, BM: tl.constexpr, BN: tl.constexpr,
               DESCRIPTORS: tl.constexpr):  # fmt: skip
    """Write a tile of weights. Columns up to `stride` are padding: written, never read."""
    if DESCRIPTORS:
        block.store([row, column], tile.to(block.dtype))
    else:
        i = (row + tl.arange(0, BM)).to(tl.int64)
        j = column + tl.arange(0, BN)
        mask = (i < rows)[:, None] & (j < stride)[None, :]
        pointers = block + i[:, None] * stride + j[None, :]
        tl.store(pointers, tile.to(block.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def positives_kernel(image, text, dots, rows, image_stride, text_stride, D,
                     BM: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """dots_i = <image_i, text_i>: a pass of its own costs O(ND) bytes, while inside the tile
    kernels it would cost registers in every tile."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    features = tl.arange(0, BK)
    total = tl.zeros([BM, BK], dtype=tl.float32)
    for k in tl.range(0, D, BK):
        mask = (i < rows)[:, None] & (k + features < D)[None, :]
        index = i.to(tl.int64)[:, None]
        a = tl.load(image + index * image_stride + k + features[None, :], mask=mask, other=0.0)
        b = tl.load(text + index * text_stride + k + features[None, :], mask=mask, other=0.0)
        total += a.to(tl.float32) * b.to(tl.float32)
    tl.store(dots + i, tl.sum(total, 1), mask=i < rows)


# Masks of layout.RowIntervals: bounds are (a0, a1, b0, b1) of rows, or of one row as scalars.


@triton.jit
def load_intervals(intervals, i, Lq, Lk):
    """(a0, a1, b0, b1) of rows, cut to the keys there are; rows past the last see nothing."""
    if intervals is None:
        a1 = tl.where(i < Lq, Lk, 0)
        return a1 * 0, a1, a1, a1
    else:
        row = intervals + tl.cast(i, tl.int64) * 4
        a0 = tl.load(row, mask=i < Lq, other=0)
        a1 = tl.load(row + 1, mask=i < Lq, other=0)
        b0 = tl.load(row + 2, mask=i < Lq, other=0)
        b1 = tl.load(row + 3, mask=i < Lq, other=0)
        return tl.maximum(a0, 0), tl.minimum(a1, Lk), tl.maximum(b0, 0), tl.minimum(b1, Lk)


@triton.jit
def of_sample(intervals, sample, mask_sample):
    """The intervals of a sample's rows; None stays None."""
    if intervals is None:
        return None
    else:
        return intervals + tl.cast(sample, tl.int64) * mask_sample


@triton.jit
def inside(bounds, j):
    """Whether key j lies in either interval."""
    a0, a1, b0, b1 = bounds
    return ((a0 <= j) & (j < a1)) | ((b0 <= j) & (j < b1))


@triton.jit
def allowed(bounds, j):
    """Rows x keys, [BM, BN]: what the rows may see."""
    a0, a1, b0, b1 = bounds
    return inside((a0[:, None], a1[:, None], b0[:, None], b1[:, None]), j[None, :])


@triton.jit
def hulls(bounds, Lk):
    """The least intervals that hold those of all rows; an empty one goes from Lk to 0."""
    a0, a1, b0, b1 = bounds
    a, b = a0 < a1, b0 < b1
    A0, A1 = tl.min(tl.where(a, a0, Lk), 0), tl.max(tl.where(a, a1, 0), 0)
    B0, B1 = tl.min(tl.where(b, b0, Lk), 0), tl.max(tl.where(b, b1, 0), 0)
    return A0, A1, B0, B1


@triton.jit
def common(bounds, rows, Lk):
    """Two intervals that all rows may see; `rows` masks those past the last."""
    a0, a1, b0, b1 = bounds
    A0, A1 = tl.max(tl.where(rows, a0, 0), 0), tl.min(tl.where(rows, a1, Lk), 0)
    B0, B1 = tl.max(tl.where(rows, b0, 0), 0), tl.min(tl.where(rows, b1, Lk), 0)
    return A0, A1, B0, B1


@triton.jit
def covers(bounds, start, stop):
    """Whether one of the intervals holds all keys from start to stop."""
    a0, a1, b0, b1 = bounds
    return ((a0 <= start) & (stop <= a1)) | ((b0 <= start) & (stop <= b1))


@triton.jit
def tile_ranges(hull, BN: tl.constexpr):
    """Tiles of keys that meet hull A or hull B: (first, count) of one run and of a second, later
    one. Hulls that touch, or B before A (rows with one interval in either place), make one run."""
    A0, A1, B0, B1 = hull
    a_first, a_end = A0 // BN, tl.cdiv(A1, BN)
    b_first, b_end = B0 // BN, tl.cdiv(B1, BN)
    a_some, b_some = A0 < A1, B0 < B1
    joined = a_some & b_some & (b_first < a_first)
    first = tl.where(a_some, tl.where(joined, b_first, a_first), b_first)
    end = tl.where(a_some, tl.where(joined, tl.maximum(a_end, b_end), a_end), b_end)
    count = tl.where(a_some | b_some, end - first, 0)
    second = tl.maximum(b_first, end)
    second_count = tl.where(a_some & b_some & (joined == 0), tl.maximum(b_end - second, 0), 0)
    return first, count, second, second_count


@triton.jit
def row_range(mask, start, stop, Lq, Lk):
    """[first, last) of the rows that see a key in [start, stop)."""
    if mask is None:
        return 0, Lq
    else:
        low, high = Lq, 0
        for base in range(0, Lq, _RANGE):
            i = base + tl.arange(0, _RANGE)
            a0, a1, b0, b1 = load_intervals(mask, i, Lq, Lk)
            meets = tl.maximum(a0, start) < tl.minimum(a1, stop)
            meets = meets | (tl.maximum(b0, start) < tl.minimum(b1, stop))
            low = tl.minimum(low, tl.min(tl.where(meets, i, Lq), 0))
            high = tl.maximum(high, tl.max(tl.where(meets, i + 1, 0), 0))
        return low, high


def padded(features: Tensor) -> Tensor:
    """`features` with rows that both load paths can read: itself, or a zero-padded copy."""
    width, size = features.shape[1], features.element_size()
    stride = features.stride(0)
    if (
        features.stride(1) == 1
        and width % _WIDTH_MULTIPLE == 0
        and stride >= width
        and stride * size % 16 == 0
        and features.data_ptr() % 16 == 0
    ):
        return features
    copy = features.new_zeros(features.shape[0], _ceil(width, _WIDTH_MULTIPLE))
    copy[:, :width] = features
    return copy


def operand(rows: Tensor, block: list[int], config: Config) -> Tensor | TensorDescriptor:
    """What a kernel with this configuration takes for a matrix: a descriptor or its address."""
    return TensorDescriptor.from_tensor(rows, block) if config.descriptors else rows


def tile_arguments(image: Tensor, text: Tensor, config: Config) -> dict[str, object]:
    """The arguments of `similarity_tile` that come from padded features."""
    return {
        "image": operand(image, [config.block_m, config.block_k], config),
        "text": operand(text, [config.block_n, config.block_k], config),
        "rows": image.shape[0],
        "columns": text.shape[0],
        "image_stride": image.stride(0),
        "text_stride": text.stride(0),
        "D": image.shape[1],
    }


def chunked(rows: int, columns: int, config: Config) -> tuple[int, int]:
    """Row chunks of a launch, and the rows in each; a program is one column strip of one chunk.

    Programs of all chunks of a strip run side by side, and the fewer the chunks the fewer times
    the image is read from memory; but 8 keep the strips that run at once small enough for L2.
    """
    tiles, strips = triton.cdiv(rows, config.block_m), triton.cdiv(columns, config.block_n)
    chunks = min(tiles, max(8, triton.cdiv(_PROGRAMS, strips)))
    chunk_rows = triton.cdiv(tiles, chunks) * config.block_m
    return triton.cdiv(rows, chunk_rows), chunk_rows


def positive_dots(image: Tensor, text: Tensor, offset: int) -> Tensor:
    """<image_i, text_(i + offset)> in fp32, for padded features."""
    rows, width = image.shape
    dots = image.new_empty(rows, dtype=torch.float32)
    block = 16
    positives_kernel[(triton.cdiv(rows, block),)](
        image, text[offset:], dots, rows, image.stride(0), text.stride(0), width, BM=block, BK=128
    )
    return dots


def positives_variant(dtype: torch.dtype) -> Variant:
    """What `positive_dots` compiles."""
    constants = {"BM": 16, "BK": 128}
    return Variant("positives", positives_kernel, dtype, None, {"dots": "*fp32"}, constants)


def weight_blocks(rows: int, columns: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Cut a [rows, columns] matrix of `size`-byte weights into blocks of at most WEIGHT_BYTES.

    Squarish, because each block costs a read and a write of its rows of both gradients.
    """
    most = WEIGHT_BYTES // size
    height = min(rows, _floor(math.isqrt(most)))
    width = min(columns, _floor(most // height))
    height = min(rows, _floor(most // _ceil(width, _WIDTH_MULTIPLE)))
    height, width = _share(rows, height), _share(columns, width)
    for r in range(0, rows, height):
        for c in range(0, columns, width):
            yield slice(r, min(r + height, rows)), slice(c, min(c + width, columns))


def weight_buffer(rows: int, columns: int, like: Tensor) -> Tensor:
    """[rows, columns] in `like`'s dtype, its rows padded so that each starts on 16 bytes."""
    return like.new_empty(rows, _ceil(columns, _WIDTH_MULTIPLE))[:, :columns]


def weight_shift(dtype: torch.dtype) -> int:
    """Binary exponent by which weights (at most 2) are stored: fp16 would lose those below 6e-8."""
    return 14 if dtype == torch.float16 else 0


def add_product(out: Tensor, a: Tensor, b: Tensor, *, first: bool, shift: int) -> None:
    """out (+)= 2^-shift a · b with fp32 sums; the library's GEMM reads 16-bit operands."""
    options = {"beta": 0.0 if first else 1.0, "alpha": 2.0**-shift, "out": out}
    if out.is_cuda and a.dtype != out.dtype:
        torch.addmm(out, a, b, out_dtype=out.dtype, **options)
    else:  # the mixed product exists on CUDA only; elsewhere kernels run in the interpreter
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), **options)


def launcher(function: Callable[..., Result]) -> Callable[..., Result]:
    """Run with the first argument's device current, as Triton launches on that one.

    fp64 raises NotImplementedError: tiles are summed in fp32. The dispatcher sends fp64 features to
    the reference instead, which on a GPU is cuBLAS in bands.
    """

    @functools.wraps(function)
    def launch(image: Tensor, *arguments: object, **options: object) -> Result:
        if image.dtype not in _TYPES:
            raise NotImplementedError(
                f"{function.__name__}: Triton kernels take fp32, bf16 or fp16, got {image.dtype}"
            )
        with torch.cuda.device(image.device) if image.is_cuda else nullcontext():
            return function(image, *arguments, **options)

    return launch


def capability(tensor: Tensor) -> int:
    """80 for sm_80 and so on; the interpreter stands for sm_90."""
    if not tensor.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


@dataclass(frozen=True)
class Compiled:
    """What a compilation for one architecture needs."""

    registers: int
    stack: int  # bytes; above 0 when registers spill
    shared: int  # bytes
    ptx: str


def compile_for(variant: Variant, arch: int) -> Compiled:
    """Compile for sm_<arch> without a device, and read off what the machine code needs."""
    constants = _constants(variant)
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
    types = signature(variant)
    # Multiples of 16 by `padded` and by the allocator, as a launch would find and note.
    attrs = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(types.items())
        if kind.startswith("*") or (kind == "i32" and (name == "D" or name.endswith("_stride")))
    }
    source = ASTSource(variant.kernel, types, constants, attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = _machine_code(compiled.asm["cubin"], "cuobjdump", "--dump-resource-usage")
    registers, stack = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    # A few bytes may be set aside and not be used.
    if stack and not re.search(r"\b(STL|LDL)\b", _machine_code(compiled.asm["cubin"], "nvdisasm")):
        stack = 0
    return Compiled(registers, stack, compiled.metadata.shared, compiled.asm["ptx"])


def _machine_code(cubin: bytes, tool: str, *options: str) -> str:
    """What one of the tools in Triton's wheel says of a compiled kernel."""
    path = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [path, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def signature(variant: Variant) -> dict[str, str]:
    """The Triton type of every argument of a variant's kernel; "constexpr" where it is constant."""
    constants = _constants(variant)
    return {
        name: "constexpr" if name in constants else _argument_type(variant, name)
        for name in variant.kernel.arg_names
    }


def _constants(variant: Variant) -> dict[str, object]:
    config = variant.config
    return variant.constants | (config.constants(variant.dtype) if config is not None else {})


def _argument_type(variant: Variant, name: str) -> str:
    config, features = variant.config, _TYPES[variant.dtype]
    if name not in ("image", "text", "weight"):
        return variant.arguments.get(name, "i32")
    if config is None or not config.descriptors:
        return f"*{features}"
    height = config.block_n if name == "text" else config.block_m
    width = config.block_n if name == "weight" else config.block_k
    return f"tensordesc<{features}[{height}, {width}]>"


def _ceil(value: int, multiple: int) -> int:
    return triton.cdiv(value, multiple) * multiple


def _floor(value: int) -> int:
    return max(value // _BLOCK_MULTIPLE, 1) * _BLOCK_MULTIPLE


def _share(total: int, most: int) -> int:
    """The largest of equal parts of at most `most`, in whole tiles unless there is one part."""
    part = triton.cdiv(total, triton.cdiv(total, most))
    return min(_ceil(part, _BLOCK_MULTIPLE), total)
