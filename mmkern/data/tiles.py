"""4KHD's preprocessing: an image as a grid of tiles in about its own shape.

Dong et al., "InternLM-XComposer2-4KHD" (arXiv 2404.06512), section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from mmkern.data.images import MEAN, STD
from mmkern.data.randomness import Keys

__all__ = ["TileTransform", "tile_grid"]


def tile_grid(width: int, height: int, tiles: int) -> tuple[int, int]:
    """Tiles across and down of an image of so many pixels, at most `tiles` in all.

    HD-H of the paper: across is the largest n with n · ceil(n / ratio) <= H for an image that is
    ratio times as wide as high; a portrait is laid on its side first.

    Raises:
        ValueError: sizes or a number below 1.
    """
    if min(width, height, tiles) < 1:
        raise ValueError(
            f"tile_grid: width, height and tiles must be at least 1, got {width}, {height}, {tiles}"
        )
    if width < height:
        across, down = tile_grid(height, width, tiles)
        return down, across
    across = 1
    while (across + 1) * math.ceil((across + 1) * height / width) <= tiles:
        across += 1
    return across, math.ceil(across * height / width)


class TileTransform:
    """Images of any size -> float32 [3, h S, w S], each with a grid of tiles of its own.

    Resized to the width of its tiles (a portrait to their height), with white above and below to
    fill the last row, then (x - mean) / std.

    Args:
        size: S.
        tiles: at most so many an image.
        mean, std: per channel, of values in 0..1.

    Raises:
        ValueError: a size or number below 1.
    """

    def __init__(
        self,
        size: int,
        tiles: int,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        if size < 1 or tiles < 1:
            raise ValueError(f"TileTransform: size and tiles must be >= 1, got {size} and {tiles}")
        self.size, self.tiles = size, tiles
        self._mean, self._std = (torch.tensor(x).view(3, 1, 1) for x in (mean, std))

    def batch(self, pictures: Sequence[Image.Image], keys: Keys) -> list[Tensor]:
        """Prepare images; nothing here is random, so `keys` are not read."""
        return [self(picture) for picture in pictures]

    def __call__(self, picture: Image.Image) -> Tensor:
        """One image."""
        picture = picture.convert("RGB")
        across, down = tile_grid(*picture.size, self.tiles)
        wide, high = across * self.size, down * self.size
        if picture.width >= picture.height:
            inner = (wide, min(high, max(1, int(wide * picture.height / picture.width))))
        else:
            inner = (min(wide, max(1, int(high * picture.width / picture.height))), high)
        page = Image.new("RGB", (wide, high), (255, 255, 255))
        place = ((wide - inner[0]) // 2, (high - inner[1]) // 2)
        page.paste(picture.resize(inner, Image.Resampling.BICUBIC), place)
        pixels = torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(high, wide, 3).permute(2, 0, 1).float() / 255
        return (pixels - self._mean) / self._std
