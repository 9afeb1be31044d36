"""Opening pictures: every mode, every way to be broken; CLIP's preprocessing."""

import io
import math
import struct
import warnings
import zlib
from collections.abc import Callable
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmkern.data.images import (
    MEAN,
    STD,
    ClipTransform,
    EmptyImageError,
    ImageError,
    MissingImageError,
    OversizedImageError,
    PixelTransform,
    TruncatedImageError,
    UnreadableImageError,
    open_image,
)
from mmkern.data.randomness import sample_keys

WHITE = (255, 255, 255)


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), values.tobytes())


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reference(image: Image.Image, size: int, left_of: Callable[[int], int]) -> np.ndarray:
    """The resized picture in full, rows then columns, then its centre: what transform shortens."""
    width, height = image.size
    short = min(width, height)
    new_width = size if width == short else int(size * width / height)
    new_height = size if height == short else int(size * height / width)
    image = image.resize((new_width, height), Image.Resampling.BICUBIC)
    image = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
    left, top = left_of(new_width - size), left_of(new_height - size)
    return np.asarray(image.crop((left, top, left + size, top + size))).astype(int)


def grey_levels(prepared: torch.Tensor) -> np.ndarray:
    values = prepared * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return (values * 255).round().permute(1, 2, 0).numpy().astype(int)


def palette_image(transparency: object) -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = transparency
    return image


def with_key(mode: str, pixels: list[object], key: object) -> Image.Image:
    image = Image.new(mode, (2, 1))
    image.putdata(pixels)
    image.info["transparency"] = key
    return image


def two_pixels(mode: str, pixels: list[object]) -> Image.Image:
    image = Image.new(mode, (2, 1))
    image.putdata(pixels)
    return image


MODES = {
    "1": (two_pixels("1", [0, 255]), "PNG", [(0, 0, 0), WHITE]),
    "L": (two_pixels("L", [7, 200]), "PNG", [(7,) * 3, (200,) * 3]),
    "LA": (two_pixels("LA", [(0, 255), (0, 0)]), "PNG", [(0, 0, 0), WHITE]),
    "RGB": (two_pixels("RGB", [(1, 2, 3), (4, 5, 6)]), "PNG", [(1, 2, 3), (4, 5, 6)]),
    "RGBA": (
        two_pixels("RGBA", [(255, 0, 0, 255), (0, 0, 0, 51)]),
        "PNG",
        [(255, 0, 0), (204,) * 3],
    ),
    "P": (palette_image(0), "PNG", [WHITE, (200, 100, 50)]),
    "P, alpha a colour": (palette_image(b"\xff\x00"), "PNG", [(10, 20, 30), WHITE]),
    "L, colour key": (with_key("L", [5, 9], 5), "PNG", [WHITE, (9, 9, 9)]),
    "RGB, colour key": (
        with_key("RGB", [(1, 2, 3), (4, 5, 6)], (4, 5, 6)),
        "PNG",
        [(1, 2, 3), WHITE],
    ),
    "CMYK": (
        two_pixels("CMYK", [(0, 255, 255, 0), (0, 0, 0, 255)]),
        "TIFF",
        [(255, 0, 0), (0,) * 3],
    ),
    "I;16": (two_pixels("I;16", [0, 65535]), "PNG", [(0,) * 3, WHITE]),
    "I;16 mid": (two_pixels("I;16", [257 * 100, 257 * 3]), "PNG", [(100,) * 3, (3,) * 3]),
    "I": (two_pixels("I", [257 * 100, 65535]), "TIFF", [(100,) * 3, WHITE]),
    "F to 1": (two_pixels("F", [0.2, 1.0]), "TIFF", [(51,) * 3, WHITE]),
    "F to 255": (two_pixels("F", [51.0, 255.0]), "TIFF", [(51,) * 3, WHITE]),
}


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("from_file", [True, False], ids=["file", "PIL"])
def test_modes(name, from_file):
    """A picture of some mode would reach the model black, inverted or without its background."""
    image, kind, expected = MODES[name]
    opened = open_image(encoded(image, kind) if from_file else image)
    assert opened.mode == "RGB"
    assert [opened.getpixel((x, 0)) for x in range(2)] == expected


def test_cmyk_jpeg():
    """Photographs from print would come out as negatives."""
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = open_image(encoded(image, "JPEG", quality=95)).getpixel((8, 8))
    assert red > 240 and green < 15 and blue < 15


def test_transparent_grey16():
    """A transparent background in a 16-bit picture would turn black."""
    image = two_pixels("I;16", [1000, 65535])
    image.info["transparency"] = 1000
    assert open_image(encoded(image, "PNG")).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    """A phone's portrait photograph would lie on its side."""
    upright = noise(6, 4)
    stored = upright
    # To undo each orientation is its definition: row 0 and column 0 of what is stored.
    inverse = [None, None, 0, 3, 1, 5, 2, 6, 4][orientation]
    if inverse is not None:
        stored = upright.transpose(Image.Transpose(inverse))
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(encoded(stored, "PNG", exif=exif))
    assert np.array_equal(np.asarray(opened), np.asarray(upright))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif():
    """A good picture with damaged camera notes would be thrown away."""
    data = encoded(noise(8, 8), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff\x00")
    assert open_image(data).size == (8, 8)


def test_animation_gives_its_first_frame():
    """An animated GIF would give a random frame, or none."""
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_sources(tmp_path):
    """A path, its bytes or an open file would give different pictures."""
    image = noise(5, 3)
    path = tmp_path / "a.png"
    image.save(path)
    data = path.read_bytes()
    with open(path, "rb") as file:
        sources = [path, str(path), data, bytearray(data), memoryview(data), file, image]
        for source in sources:
            assert np.array_equal(np.asarray(open_image(source)), np.asarray(image))
    with pytest.raises(TypeError, match=r"open_image: source must be .* got int"):
        open_image(3)
    with pytest.raises(TypeError, match="binary"):
        open_image(io.StringIO("text"))


def test_result_is_a_copy():
    """Drawing on an opened picture would change the caller's."""
    image = noise(2, 2)
    before = np.asarray(image).copy()
    open_image(image).putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(np.asarray(image), before)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + crc

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x02\x00\x00\x00")
    return start + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BROKEN = {
    "empty": (b"", EmptyImageError),
    "text": (b"this is not a picture at all", UnreadableImageError),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", UnreadableImageError),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", UnreadableImageError),
    "short jpeg": (encoded(noise(64, 64), "JPEG")[:900], TruncatedImageError),
    "short png": (encoded(noise(64, 64), "PNG")[:900], TruncatedImageError),
    "bomb": (png_header(60_000, 60_000), OversizedImageError),
    "half a bomb": (png_header(10_000, 10_000), OversizedImageError),
    "no pixels": (png_header(0, 5), ImageError),
    # Pillow answers this with ValueError.
    "bad number": (b"P6\n20 :0\n255\n" + bytes(1200), UnreadableImageError),
    "bytes in the middle": (encoded(noise(9, 9), "PNG").replace(b"IDAT", b"IDXT"), ImageError),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name, tmp_path):
    """A broken file would stop training with a message that does not say which file it was."""
    data, kind = BROKEN[name]
    path = tmp_path / "broken.jpg"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in (path, data):
            with pytest.raises(kind) as caught:
                open_image(source)
            assert str(caught.value).startswith(str(path) if source is path else f"<{len(data)}")
    with pytest.raises(kind, match=r"shard\.tar/7"):
        open_image(io.BytesIO(data), name="shard.tar/7")


def test_missing_files(tmp_path):
    """A missing file could not be told from a broken one, nor caught as what Python calls it."""
    with pytest.raises(MissingImageError, match=r"nowhere\.png"):
        open_image(tmp_path / "nowhere.png")
    with pytest.raises(FileNotFoundError):
        open_image(str(tmp_path / "nowhere.png"))
    with pytest.raises(UnreadableImageError, match=str(tmp_path)):
        open_image(tmp_path)
    with pytest.raises(ImageError, match="null"):
        open_image("a\0b.png")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1e6])
def test_float_pictures_without_a_white(value):
    """A picture of heights or with NaN would become some picture, silently."""
    with pytest.raises(UnreadableImageError, match="mode F"):
        open_image(two_pixels("F", [value, 0.5]))


def test_max_pixels():
    """A caller could not lower the limit on the size of pictures."""
    assert open_image(noise(10, 10), max_pixels=100).size == (10, 10)
    with pytest.raises(OversizedImageError, match="10x11 is 110 pixels"):
        open_image(noise(10, 11), max_pixels=100)


def test_errors_of_decoders_do_not_escape(monkeypatch):
    """A decoder's struct.error or MemoryError would end a run that skips broken pictures."""
    for error, kind in (
        (struct.error("unpack"), UnreadableImageError),
        (MemoryError(), UnreadableImageError),
        (EOFError("end"), TruncatedImageError),
    ):
        image = noise(4, 4)
        monkeypatch.setattr(image, "load", Mock(side_effect=error))
        with pytest.raises(kind, match="a name: ") as caught:
            open_image(image, name="a name")
        assert caught.value.__cause__ is error


SEEDS = [
    encoded(noise(20, 20), "PNG"),
    encoded(noise(20, 20), "JPEG"),
    encoded(noise(20, 20).quantize(16), "GIF"),
    encoded(noise(20, 20), "WEBP"),
    encoded(noise(20, 20), "TIFF"),
    encoded(noise(20, 20), "TIFF", compression="tiff_lzw"),
    encoded(noise(20, 20), "BMP"),
    encoded(noise(20, 20, "RGBA"), "ICO"),
    encoded(noise(20, 20), "PPM"),
]


@settings(max_examples=300, deadline=None)
@given(
    data=st.sampled_from(SEEDS),
    edits=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=8),
    keep=st.floats(0, 1),
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_never_escape(data, edits, keep):
    """One damaged download would end a training run with struct.error or worse."""
    damaged = bytearray(data)
    for place, value in edits:
        damaged[int(place * len(damaged))] = value
    try:
        opened = open_image(bytes(damaged[: math.ceil(keep * len(damaged))]), max_pixels=10**6)
    except ImageError:
        return
    assert opened.mode == "RGB"


SIZES = [
    *[(300, 200, 224), (200, 300, 224), (50, 400, 32), (900, 7, 32), (7, 900, 32), (1, 300, 32)],
    *[(32, 32, 32), (35, 32, 32), (32, 35, 32), (640, 481, 224), (33, 1000, 64), (1, 1, 8)],
]


@pytest.mark.parametrize("width, height, size", SIZES)
def test_transform_is_resize_then_crop(width, height, size):
    """Pretrained weights would see pictures that differ from those they were trained on."""
    image = noise(width, height)
    expected = reference(image, size, lambda extra: round(extra / 2))
    prepared = ClipTransform(size)(image)
    assert prepared.shape == (3, size, size) and prepared.dtype == torch.float32
    assert np.abs(grey_levels(prepared) - expected).max() <= 1


@pytest.mark.parametrize("width, height", [(300, 200), (231, 224), (227, 224), (224, 224)])
def test_transform_against_transformers(width, height):
    """Features would differ from those of transformers' CLIP on the same picture."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = noise(width, height)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=224)
    theirs = torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))
    ours = ClipTransform(224)(image)
    extra = max(int(224 * width / height), int(224 * height / width)) - 224
    if extra % 4 == 3:
        # The documented difference: theirs is ours, moved by a pixel.
        theirs, ours = theirs[:, :, 1:], ours[:, :, :-1]
    # One grey level, in units of the smallest standard deviation.
    assert (theirs - ours).abs().max() < 1.01 / 255 / min(STD)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1)])
def test_extreme_shapes_stay_small(shape, train, monkeypatch):
    """A 1x5000 picture would take a gigabyte on its way to 224x224."""
    made = []
    resize = Image.Image.resize

    def record(self, size, *args, **kwargs):
        made.append(size[0] * size[1])
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", record)
    prepared = ClipTransform(224, train=train)(noise(*shape), torch.Generator().manual_seed(0))
    assert prepared.shape == (3, 224, 224)
    assert made and max(made) <= 224 * 224


def test_transform_takes_any_picture(tmp_path):
    """Files and transparent pictures would need to be opened by hand first."""
    path = tmp_path / "a.png"
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(path)
    white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    for source in (path, path.read_bytes(), Image.open(path)):
        assert torch.allclose(ClipTransform(4)(source)[:, 1, 1], white)


def test_training_crops():
    """Augmentation would not be what the paper says, or not be repeatable."""
    transform = ClipTransform(16, train=True)
    # Two gradients say where each crop lies.
    across, down = np.meshgrid(np.linspace(0, 255, 100), np.linspace(0, 255, 80))
    picture = Image.fromarray(np.stack([across, down, down], -1).astype(np.uint8))
    keys = sample_keys(0, 0, range(64))
    batch = transform.batch([picture] * 64, keys)
    assert torch.equal(batch, transform.batch([picture] * 64, keys))
    assert not torch.equal(batch[0], batch[1])
    assert torch.equal(batch[5:6], transform.batch([picture], keys[5:6]))
    std = torch.tensor(STD)
    spans = (batch.amax((2, 3)) - batch.amin((2, 3))) * std
    areas = spans[:, 0] * spans[:, 1]
    # Pixel centres span 15/16 of an edge each way.
    assert float(areas.min()) > 0.9 * (15 / 16) ** 2 - 0.03 and float(areas.max()) <= 1
    with pytest.raises(ValueError, match="needs a generator"):
        transform(picture)


@pytest.mark.parametrize("shape", [(5, 200), (200, 5), (1, 1)])
def test_training_crop_of_a_shape_that_never_fits(shape):
    """A panorama among the training pictures would raise or be stretched out of all proportion."""
    image = noise(*shape)
    prepared = ClipTransform(8, train=True)(image, torch.Generator().manual_seed(1))
    edge = min(shape)
    long = min(max(shape), max(1, round(edge * 4 / 3)))
    start = (max(shape) - long) // 2
    cut = (start, 0, start + long, edge) if shape[0] > shape[1] else (0, start, edge, start + long)
    expected = np.asarray(image.crop(cut).resize((8, 8), Image.Resampling.BICUBIC))
    assert np.abs(grey_levels(prepared) - expected).max() <= 1


def test_pixel_transform_agrees_with_clip_transform():
    """The fast path for small pictures would give a model other numbers than the general one."""
    pictures = [noise(32, 32, seed=s) for s in range(4)]
    arrays = [torch.from_numpy(np.array(p)) for p in pictures]
    keys = sample_keys(0, 0, range(4))
    expected = ClipTransform(32).batch(pictures, keys)
    for given_as in (arrays, torch.stack(arrays)):
        assert torch.allclose(PixelTransform().batch(given_as, keys), expected, atol=1e-6)


def test_pixel_transform_shifts():
    """Shifting would wrap pictures around, mix them up, or shift all alike."""
    shift = 3
    batch = torch.randint(0, 255, (40, 8, 6, 3), dtype=torch.uint8)
    keys = sample_keys(1, 2, range(40))
    transform = PixelTransform((0, 0, 0), (1, 1, 1), train=True, shift=shift, jitter=0)
    moved = (transform.batch(batch, keys) * 255).round().permute(0, 2, 3, 1)
    padded = torch.full((40, 8 + 2 * shift, 6 + 2 * shift, 3), 255.0)
    padded[:, shift:-shift, shift:-shift] = batch.float()
    places = set()
    for row in range(40):
        fits = [
            (y, x)
            for y in range(2 * shift + 1)
            for x in range(2 * shift + 1)
            if torch.equal(padded[row, y : y + 8, x : x + 6], moved[row])
        ]
        assert len(fits) == 1
        places.update(fits)
    assert len(places) > 20 and {y for y, _ in places} == {x for _, x in places} == set(range(7))


def test_pixel_transform_jitters():
    """Colours would leave their range, or augmentation depend on a picture's place in the batch."""
    batch = torch.randint(0, 256, (32, 4, 4, 3), dtype=torch.uint8)
    keys = sample_keys(0, 0, range(32))
    transform = PixelTransform((0, 0, 0), (1, 1, 1), train=True, shift=0, jitter=0.2)
    out = transform.batch(batch, keys)
    assert float(out.min()) >= 0 and float(out.max()) <= 1
    change = (out - batch.permute(0, 3, 1, 2) / 255).abs().amax((1, 2, 3))
    assert float(change.min()) > 0.02 and float(change.max()) <= 0.4 + 1e-6
    order = torch.randperm(32)
    assert torch.equal(transform.batch(batch[order], keys[order.numpy()]), out[order])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ClipTransform(0), "size must be an int >= 1, got 0"),
        (lambda: ClipTransform(8, scale=(0.9, 0.5)), "scale must be 0 < low <= high"),
        (lambda: ClipTransform(8, ratio=(0, 1)), "ratio must be 0 < low <= high"),
        (lambda: ClipTransform(8, mean=(0.5,)), "mean and std must have 3 values"),
        (lambda: PixelTransform(std=(1, 1, 0)), "std positive"),
        (lambda: PixelTransform(shift=-1), "shift and jitter must be >= 0"),
    ],
)
def test_bad_arguments(call, message):
    """A mistyped setting would surface as noise in the pictures."""
    with pytest.raises(ValueError, match=message):
        call()


def test_pixel_transform_refuses_other_tensors():
    """Pictures in floats or channels first would be prepared twice or sideways."""
    keys = sample_keys(0, 0, range(2))
    with pytest.raises(TypeError, match="uint8"):
        PixelTransform().batch(torch.rand(2, 8, 8, 3), keys)
    with pytest.raises(TypeError, match="got Image"):
        PixelTransform().batch([noise(4, 4)] * 2, keys)
    with pytest.raises(ValueError, match=r"\[2, H, W, 3\]"):
        PixelTransform().batch(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), keys)
    with pytest.raises(ValueError, match="one shape"):
        PixelTransform().batch([torch.zeros(4, 4, 3).byte(), torch.zeros(5, 4, 3).byte()], keys)
