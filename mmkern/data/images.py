"""One place opens pictures, and one prepares them as CLIP does.

``open_image`` turns anything that claims to be a picture into an RGB ``PIL.Image`` or raises an
``ImageError`` that names the file. ``ClipTransform`` is CLIP's preprocessing (Radford et al. 2021,
"Learning Transferable Visual Models From Natural Language Supervision", section 2.4);
``PixelTransform`` is the same for batches of small pictures that already have the model's size.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mmkern.data.randomness import Keys, Stream, generator, uniform

__all__ = [
    "MAX_PIXELS",
    "MEAN",
    "STD",
    "ClipTransform",
    "EmptyImageError",
    "ImageError",
    "MissingImageError",
    "OversizedImageError",
    "PixelTransform",
    "TruncatedImageError",
    "UnreadableImageError",
    "open_image",
]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# Pillow warns above this many pixels; here it is an error (0.27 GB as RGB).
MAX_PIXELS = 89_478_485

# Formats that are pictures and nothing else: Pillow would run Ghostscript for EPS, for instance,
# and formats without a magic number make pictures of noise.
_FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF"),
    "WEBP",
)

_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """A picture that cannot be used; the message starts with its name."""


class MissingImageError(ImageError, FileNotFoundError):
    """There is no such file."""


class EmptyImageError(ImageError):
    """The file has no bytes, or the picture no pixels."""


class TruncatedImageError(ImageError):
    """The file ends before the picture does."""


class OversizedImageError(ImageError):
    """More pixels than ``max_pixels``: a decompression bomb, or a picture nobody asked for."""


class UnreadableImageError(ImageError):
    """Not a picture, a format that is not accepted, damaged data, or values without a white."""


def open_image(
    source: str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image,
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Open a picture and return it as a new RGB ``PIL.Image``, fully decoded.

    Args:
        source: a path, the file's bytes, a binary file object (read from where it stands), or a
            PIL image (left as it is).
        name: what error messages call the picture; the path by default.
        max_pixels: width times height above which ``OversizedImageError`` is raised; it is
            compared before any pixel is decoded.

    Modes: 1, L, P, RGB, CMYK, YCbCr and HSV as Pillow converts them. Transparency of any kind (LA,
    RGBA, PA, a palette's or a colour key's) is composited on white. 16-bit grey is divided by 257;
    mode I is 0..65535, as Pillow writes it; mode F is 0..1 if every value is, else 0..255; values
    outside raise. The EXIF orientation is applied. Of an animation the first frame is taken.
    Formats: AVIF, BMP, GIF, ICO, JPEG, JPEG 2000, PNG, PPM, QOI, TIFF, WebP.

    Raises:
        ImageError: one of its subclasses, whatever is wrong with the picture.
        TypeError: ``source`` is something else.
    """
    if isinstance(source, Image.Image):
        label = name or getattr(source, "filename", None) or f"<PIL image of mode {source.mode}>"
        return _decode(source, str(label), max_pixels)
    if isinstance(source, str | os.PathLike):
        label = name or str(os.fspath(source))
        try:
            with open(source, "rb") as file:
                return _read(file, os.fstat(file.fileno()).st_size, label, max_pixels)
        except ImageError:
            raise
        except (OSError, ValueError) as error:
            missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            kind = MissingImageError if missing else UnreadableImageError
            raise kind(f"{label}: {error}") from error
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    elif hasattr(source, "read"):
        data = source.read()
        name = name or getattr(source, "name", None)
    else:
        data = None
    if not isinstance(data, bytes):
        raise TypeError(
            "open_image: source must be a path, bytes, a binary file object or a PIL image, "
            f"got {type(source).__name__}"
        )
    label = str(name or f"<{len(data)} bytes>")
    return _read(io.BytesIO(data), len(data), label, max_pixels)


def _read(file: IO[bytes], length: int, label: str, max_pixels: int) -> Image.Image:
    if length == 0:
        raise EmptyImageError(f"{label}: the file is empty")
    Image.init()
    try:
        with warnings.catch_warnings():
            # Between one and two times its own limit Pillow warns; ours decides below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=[f for f in _FORMATS if f in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise OversizedImageError(f"{label}: {error}") from error
    except UnidentifiedImageError as error:
        start = file.seek(0) or file.read(8)
        raise UnreadableImageError(
            f"{label}: not a picture of an accepted format (it starts with {start!r})"
        ) from error
    except Exception as error:
        raise _failure(label, error) from error
    with image:
        return _decode(image, label, max_pixels)


def _decode(image: Image.Image, label: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width == 0 or height == 0:
        raise EmptyImageError(f"{label}: the picture is {width}x{height}")
    if width * height > max_pixels:
        raise OversizedImageError(
            f"{label}: {width}x{height} is {width * height} pixels, more than max_pixels = "
            f"{max_pixels}"
        )
    try:
        image.load()
        picture = _to_rgb(image, label)
        turn = _ORIENTATIONS.get(_orientation(image))
        return picture if turn is None else picture.transpose(turn)
    except ImageError:
        raise
    except Exception as error:
        # Decoders meet hostile bytes with whatever exception comes up: struct.error, IndexError,
        # SyntaxError, zlib.error, MemoryError ...
        raise _failure(label, error) from error


def _failure(label: str, error: Exception) -> ImageError:
    kind: type[ImageError] = UnreadableImageError
    if isinstance(error, Image.DecompressionBombError):
        kind = OversizedImageError
    elif isinstance(error, EOFError) or "truncated" in str(error).lower():
        kind = TruncatedImageError
    return kind(f"{label}: {str(error) or type(error).__name__}")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:
        # The pixels are intact; only what a camera wrote beside them is not.
        return 1


def _to_rgb(image: Image.Image, label: str) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_grey(image, label)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    picture = image.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def _grey(image: Image.Image, label: str) -> NDArray[np.uint8]:
    """uint8 [H, W] from a picture with one deep channel: I;16 in any byte order, I or F."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    limit = 65535.0
    if image.mode == "F":
        limit = 1.0 if low >= 0 and high <= 1 else 255.0
    # Written so that NaN fails.
    if not (low >= 0 and high <= limit):
        raise UnreadableImageError(
            f"{label}: mode {image.mode} must hold values in 0..{limit:g}, got {low:g}..{high:g}"
        )
    transparent = image.info.get("transparency")
    grey = np.rint(values.astype(np.float64) * (255.0 / limit)).astype(np.uint8)
    return grey if transparent is None else np.where(values == transparent, np.uint8(255), grey)


def _positive(name: str, argument: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: {argument} must be an int >= 1, got {value!r}")


def _channels(name: str, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(
            f"{name}: mean and std must have 3 values each, std positive, got {mean} and {std}"
        )
    return torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)


class ClipTransform:
    """CLIP's preprocessing of one picture: PIL or path -> float32 [3, size, size].

    Evaluation (``train=False``): bicubic resize of the shortest edge to ``size`` (the other edge
    is ``int(size * long / short)``), crop of the central size x size, x = (x / 255 - mean) / std.
    The crop starts at ``round((edge - size) / 2)``, half to even, as in torchvision and so in
    OpenAI's and open_clip's code. transformers rounds down: where edge - size is 3 modulo 4 its
    picture lies one pixel further left or up.

    Resize and crop are one step here: only the region under the crop is resampled (Pillow's
    ``box``, whose filter still reads the pixels around it), rows first and then columns. The
    result is that of resizing first within one grey level, and a 1x5000 picture does not become
    224x1,120,000 on its way. (Pillow 13 resizes some tall pictures columns first, which changes
    values where a pass clips; here the order is fixed, as it was in every earlier Pillow.) Unlike
    OpenAI's code the picture is RGB *before* it is resized; Pillow would otherwise take the
    nearest pixel for palette and 1-bit pictures.

    Training (``train=True``): a crop that covers ``scale`` of the area with an aspect ratio in
    ``ratio``, resized to size x size (torchvision's RandomResizedCrop; CLIP's scale is (0.9, 1)),
    and with ``flip`` mirrored half of the time (as BLIP-2's).

    With ``pad`` a picture is first fitted into a square whose border is the mean colour, (122, 116,
    104) for CLIP's, so that nothing is cut off (LLaVA 1.5). The authors make the square first and
    resize it then, which needs an area of the long edge squared; here the picture is resized to the
    square's size and then bordered, which differs where the filter crosses the border.

    Args:
        size: edge of the result in pixels.
        mean, std: per channel, of values in 0..1.
        train: augment.
        scale, ratio: ranges for the training crop.
        flip: mirror training pictures left to right, half of them.
        pad: see above.

    Raises:
        ValueError: a size below 1, ranges that are not 0 < low <= high, wrong channel counts.
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        train: bool = False,
        *,
        scale: tuple[float, float] = (0.9, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = False,
        pad: bool = False,
    ) -> None:
        _positive("ClipTransform", "size", size)
        for argument, (low, high) in (("scale", scale), ("ratio", ratio)):
            if not 0 < low <= high:
                raise ValueError(
                    f"ClipTransform: {argument} must be 0 < low <= high, got {(low, high)}"
                )
        self.size = size
        self.train = train
        self.scale = scale
        self.ratio = ratio
        self.flip = flip
        self._border = tuple(int(255 * value) for value in mean) if pad else None
        self._mean, self._std = _channels("ClipTransform", mean, std)

    def __call__(self, picture: Any, generator: torch.Generator | None = None) -> Tensor:
        """Prepare one picture: a PIL image, or whatever ``open_image`` takes.

        Args:
            picture: the picture; one that is not an RGB PIL image goes through ``open_image``.
            generator: where training's random numbers come from; training needs one, so that
                nobody depends on the global generator by accident.

        Returns:
            float32 [3, size, size].

        Raises:
            ImageError: the picture cannot be read.
            ValueError: ``train`` and no generator.
        """
        if not isinstance(picture, Image.Image) or picture.mode != "RGB":
            picture = open_image(picture)
        if self._border is not None:
            picture = _padded(picture, self.size, self._border)
        if not self.train:
            picture = _resize_and_crop(picture, self.size)
        elif generator is None:
            raise ValueError("ClipTransform: train=True needs a generator, got None")
        else:
            numbers = torch.rand(40, generator=generator, dtype=torch.float64).tolist()
            box = _random_box(picture.size, self.scale, self.ratio, numbers)
            # Cut out first, as torchvision does: the filter must not see what was cut off.
            picture = picture.crop(box).resize((self.size, self.size), Image.Resampling.BICUBIC)
            if self.flip and torch.rand(1, generator=generator).item() < 0.5:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
        return pixels.float().div_(255).sub_(self._mean).div_(self._std)

    def batch(self, pictures: Sequence[Any], keys: Keys) -> Tensor:
        """float32 [B, 3, size, size]; picture b is augmented by key b (``sample_keys``)."""
        return torch.stack(
            [
                self(picture, generator(key) if self.train else None)
                for picture, key in zip(pictures, keys, strict=True)
            ]
        )


def _padded(picture: Image.Image, size: int, border: tuple[int, ...]) -> Image.Image:
    """The whole picture, its long edge ``size``, in the middle of a square."""
    width, height = picture.size
    longest = max(width, height)
    fitted = picture.resize(
        (max(1, round(size * width / longest)), max(1, round(size * height / longest))),
        Image.Resampling.BICUBIC,
    )
    square = Image.new("RGB", (size, size), border)
    square.paste(fitted, ((size - fitted.width) // 2, (size - fitted.height) // 2))
    return square


def _resize_and_crop(picture: Image.Image, size: int) -> Image.Image:
    width, height = picture.size
    if width <= height:
        resized = (size, int(size * height / width))
    else:
        resized = (int(size * width / height), size)
    starts = [round((new - size) / 2) for new in resized]
    step_x, step_y = width / resized[0], height / resized[1]
    left, right = starts[0] * step_x, min((starts[0] + size) * step_x, width)
    top, bottom = starts[1] * step_y, min((starts[1] + size) * step_y, height)
    # Rows that the vertical filter reads: the bicubic kernel spans two steps each way.
    reach = 2 * max(step_y, 1) + 1
    first, last = max(0, math.floor(top - reach)), min(height, math.ceil(bottom + reach))
    rows = picture.crop((0, first, width, last)).resize(
        (size, last - first), Image.Resampling.BICUBIC, box=(left, 0, right, last - first)
    )
    return rows.resize(
        (size, size), Image.Resampling.BICUBIC, box=(0, top - first, size, bottom - first)
    )


def _random_box(
    picture_size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    numbers: Sequence[float],
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a random crop; four of the numbers in [0, 1) an attempt."""
    width, height = picture_size
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(0, len(numbers), 4):
        u_area, u_ratio, u_left, u_top = numbers[attempt : attempt + 4]
        area = width * height * (scale[0] + (scale[1] - scale[0]) * u_area)
        aspect = math.exp(log_low + (log_high - log_low) * u_ratio)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(u_left * (width - w + 1)), int(u_top * (height - h + 1))
            return left, top, left + w, top + h
    # No crop of that shape fits: the largest central one whose ratio is allowed.
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class PixelTransform:
    """CLIP's preprocessing of small pictures that have the model's size: uint8 -> float32.

    A batch is one tensor from end to end: 256 pictures of 32 pixels take a few milliseconds, where
    one by one they would take as long as the model's step. Training moves each picture by up to
    ``shift`` pixels each way (white comes in) and changes its colours a little:

        x'_c = clip(g_c x_c + o, 0, 1),  g_c ~ U(1 - jitter, 1 + jitter),  o ~ U(-jitter, jitter),

    then (x' - mean) / std.

    Args:
        mean, std: per channel, of values in 0..1.
        train: augment.
        shift: pixels; 0 leaves pictures where they are.
        jitter: 0 leaves the colours.

    Raises:
        ValueError: a negative shift or jitter, wrong channel counts.
    """

    def __init__(
        self,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        train: bool = False,
        *,
        shift: int = 4,
        jitter: float = 0.1,
    ) -> None:
        if shift < 0 or jitter < 0:
            raise ValueError(
                f"PixelTransform: shift and jitter must be >= 0, got {shift} and {jitter}"
            )
        self.train = train
        self.shift = shift
        self.jitter = jitter
        self._mean, self._std = _channels("PixelTransform", mean, std)

    def batch(self, pictures: Sequence[Tensor] | Tensor, keys: Keys) -> Tensor:
        """Prepare a batch.

        Args:
            pictures: uint8 [B, H, W, 3], or B tensors of [H, W, 3].
            keys: uint64 [B] (``sample_keys``): what picture b's augmentation derives from.

        Returns:
            float32 [B, 3, H, W].

        Raises:
            TypeError: pictures that are not uint8 tensors.
            ValueError: shapes that differ or are not [H, W, 3]; a wrong number of keys.
        """
        batch = pictures if isinstance(pictures, Tensor) else _stack(pictures)
        if batch.dtype != torch.uint8:
            raise TypeError(f"PixelTransform: pictures must be uint8, got {batch.dtype}")
        if batch.ndim != 4 or batch.shape[3] != 3 or len(batch) != len(keys):
            raise ValueError(
                f"PixelTransform: pictures must be [{len(keys)}, H, W, 3] for {len(keys)} keys, "
                f"got {tuple(batch.shape)}"
            )
        if self.train and self.shift:
            batch = _shifted(batch, keys, self.shift)
        pixels = batch.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        scale = 1 / 255.0
        if self.train and self.jitter:
            numbers = torch.from_numpy(uniform(keys, 4, Stream.JITTER)).float().view(-1, 4, 1, 1)
            change = (numbers * 2 - 1) * self.jitter
            pixels = torch.addcmul(change[:, 3:], pixels, (1 + change[:, :3]) / 255).clamp_(0, 1)
            scale = 1.0
        return torch.addcmul(-self._mean / self._std, pixels, scale / self._std)


def _stack(pictures: Sequence[Tensor]) -> Tensor:
    if not all(isinstance(picture, Tensor) for picture in pictures):
        kind = next(type(p).__name__ for p in pictures if not isinstance(p, Tensor))
        raise TypeError(f"PixelTransform: pictures must be uint8 tensors, got {kind}")
    shapes = {tuple(picture.shape) for picture in pictures}
    if len(shapes) != 1:
        raise ValueError(f"PixelTransform: pictures must have one shape, got {sorted(shapes)}")
    return torch.stack(list(pictures))


def _shifted(batch: Tensor, keys: Keys, shift: int) -> Tensor:
    """Each picture moved by -shift..shift pixels down and right, white where nothing was."""
    count, height, width, channels = batch.shape
    padded = batch.new_full(
        (count, height + 2 * shift, width + 2 * shift, channels), fill_value=255
    )
    padded[:, shift : shift + height, shift : shift + width] = batch
    moves = torch.from_numpy((uniform(keys, 2, Stream.SHIFT) * (2 * shift + 1)).astype(np.int64))
    # Every row of the result is one run of bytes in the padded batch: gather runs, not pixels.
    row_bytes, line = width * channels, padded.stride(1)
    starts = torch.arange(count)[:, None] * padded.stride(0) + moves[:, 1:] * channels
    starts = starts + (moves[:, :1] + torch.arange(height)) * line
    runs = padded.view(-1).unfold(0, row_bytes, 1)
    return runs[starts.view(-1)].view(count, height, width, channels)
