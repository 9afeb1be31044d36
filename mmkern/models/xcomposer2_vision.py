"""The image side of InternLM-XComposer2: tower, tiles, contrast, and whose image is whose."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from mmkern.layout import VisualSpans
from mmkern.models.blip2_base import ClipVisionConfig, ClipVisionModel
from mmkern.models.clip import CLIP
from mmkern.nn.towers import resize_positions
from mmkern.ops import info_nce

__all__ = [
    "ContrastiveHead",
    "VisionTower",
    "check_images",
    "mean_rows",
    "runs_by_sample",
    "tiled_tokens",
]


class VisionTower(ClipVisionModel):
    """CLIP's patch tokens after the last block: [B, 3, S, S] to [B, g², W].

    No class token, and no norm behind the blocks: it serves the class token alone.
    """

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__(config)
        del self.post_layernorm

    def forward(self, pixel_values: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(pixel_values)[:, 1:]

    @torch.no_grad()
    def load_clip(self, clip: CLIP) -> None:
        """Copy the weights of a CLIP's tower; positions are interpolated where sizes differ."""
        state, name = clip.state_dict(), "visual.positional_embedding"
        grid = self._grid(self.image_size)
        state[name] = resize_positions(state[name], grid, antialias=False)
        self.load_state_dict({key: state[f"visual.{key}"] for key in self.state_dict()})


class ContrastiveHead(nn.Module):
    """Pooled states of images and texts to one space; InfoNCE with a trained temperature."""

    def __init__(self, width: int, out: int, temperature: float) -> None:
        super().__init__()
        self.image = nn.Linear(width, out, bias=False)
        self.text = nn.Linear(width, out, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def forward(self, image: Tensor, text: Tensor, group: ProcessGroup | None) -> Tensor:
        weight = self.image.weight
        image, text = (
            F.normalize(linear(x.to(weight.dtype)), dim=-1)
            for linear, x in ((self.image, image), (self.text, text))
        )
        return info_nce(image, text, self.logit_scale.exp(), group=group)


def tiled_tokens(
    tower: VisionTower, images: Sequence[Tensor], separator: Tensor, newline: Tensor
) -> Tensor:
    """Tokens [rows, 4 W] of images of tiles [3, h S, w S], one image behind the other.

    Of each, the lines of the whole at a tile's size, `separator` [1, 1, 4 W], and the lines of all
    tiles put together; a line ends with `newline` [1, 1, 1, 4 W].
    """
    size, tiles, shapes = tower.image_size, [], []
    for image in images:
        whole = F.interpolate(image[None].float(), (size, size), mode="bicubic")
        cut = image.unflatten(1, (-1, size)).unflatten(3, (-1, size))  # [3, h, S, w, S]
        tiles += [whole.to(image.dtype), cut.permute(1, 3, 0, 2, 4).flatten(0, 1)]
        shapes.append((cut.shape[1], cut.shape[3]))
    patches = tower(torch.cat(tiles))  # [tiles, g², W]
    side = round(patches.shape[1] ** 0.5) // 2
    # Four neighbours side by side: row, column, then channels.
    four = patches.view(len(patches), side, 2, side, 2, -1).permute(0, 1, 3, 2, 4, 5)
    four = four.flatten(3)  # [tiles, m, m, 4 W]
    separator, newline = separator.to(four.dtype), newline.to(four.dtype)
    rows, place = [], 0
    for high, wide in shapes:
        views = four[place : place + 1 + high * wide]
        place += len(views)
        local = views[1:].unflatten(0, (high, wide)).permute(0, 2, 1, 3, 4)
        local = local.reshape(high * side, wide * side, -1)
        rows += [_lines(views[0], newline), separator[0], _lines(local, newline)]
    return torch.cat(rows)


def _lines(tokens: Tensor, newline: Tensor) -> Tensor:
    """[rows, columns, C] to [rows (columns + 1), C]."""
    end = newline[0].expand(tokens.shape[0], 1, -1)
    return torch.cat([tokens, end], 1).flatten(0, 1)


def runs_by_sample(spans: VisualSpans) -> list[list[int]]:
    """Lengths of the runs of visual rows in each sample; a run over a border is cut there.

    Raises:
        ValueError: spans that do not know their runs (made from a mask on a GPU).
    """
    if spans.runs is None:
        raise ValueError("XComposer2: build the spans on the host, in the collator")
    batch, length = spans.shape
    found: list[list[int]] = [[] for _ in range(batch)]
    for start, stop in spans.runs:
        while start < stop:
            sample = start // length
            end = min(stop, (sample + 1) * length)
            found[sample].append(end - start)
            start = end
    return found


def check_images(spans: VisualSpans, counts: Sequence[int]) -> None:
    """Raise ValueError, naming the sample, unless the images' tokens fill the placeholders.

    Images belong to samples in order: a sample takes as many as its placeholders hold. Looks at
    what the host knows; spans from a mask on a GPU are not looked at.
    """
    if spans.runs is None:
        return
    images = iter(counts)
    left = list(counts)
    for sample, runs in enumerate(runs_by_sample(spans)):
        wanted, found = sum(runs), 0
        while found < wanted and (rows := next(images, None)) is not None:
            found += rows
            left.pop(0)
        if found != wanted:
            raise ValueError(
                f"XComposer2: sample {sample} has {wanted} image tokens in input_ids, but its "
                f"images become {found}"
            )
    if left:
        raise ValueError(
            f"XComposer2: {len(left)} of {len(counts)} images have no place in input_ids: the last "
            f"sample, {spans.shape[0] - 1}, is full"
        )


def mean_rows(states: Tensor, rows: Tensor) -> Tensor:
    """[B, L, W] and bool [B, L] to the means over its rows, [B, W] in fp32."""
    share = rows.float() / rows.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("bl,blw->bw", share, states.float())
