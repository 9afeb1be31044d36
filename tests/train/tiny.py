"""A two-tower model small enough to train in milliseconds, and pairs to train it on."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkern import ops


class TinyClip(nn.Module):
    """CLIP's interface on two small towers, with dropout and (on request) batch normalisation."""

    def __init__(self, width: int = 8, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        middle = nn.BatchNorm1d(16) if norm else nn.Identity()
        self.visual = nn.Sequential(
            nn.Linear(12, 16), middle, nn.GELU(), nn.Dropout(dropout), nn.Linear(16, width)
        )
        self.token_embedding = nn.Embedding(32, 16)
        self.positional_embedding = nn.Parameter(torch.randn(4, 16) * 0.1)
        self.dropout = nn.Dropout(dropout)
        self.text_projection = nn.Parameter(torch.randn(16, width) * 0.25)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def clamp_logit_scale_(self) -> None:
        """As CLIP's."""
        with torch.no_grad():
            self.logit_scale.clamp_(0, math.log(100))

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        return_loss: bool | None = None,
        group: Any = None,
        **unused: Any,
    ) -> dict[str, Tensor]:
        """`mmkern.models.clip.CLIP`'s outputs."""
        image = F.normalize(self.visual(pixel_values.flatten(1)), dim=-1)
        hidden = self.dropout(self.token_embedding(input_ids) + self.positional_embedding)
        text = F.normalize(hidden.mean(1) @ self.text_projection, dim=-1)
        out = OrderedDict(
            image_features=image, text_features=text, logit_scale=self.logit_scale.exp()
        )
        if return_loss is not False:
            out["loss"] = ops.info_nce(image, text, out["logit_scale"], group=group)
        return out


class Pairs(torch.utils.data.Dataset[dict[str, Any]]):
    """Pairs whose augmentation is drawn from (seed, epoch, index), as mmkern.data's is."""

    def __init__(self, count: int = 40, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(count, 3, 2, 2, generator=generator)
        self.ids = torch.randint(0, 32, (count, 4), generator=generator)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """New augmentation."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch, index)) & 0x7FFFFFFF)
        noise = torch.randn(3, 2, 2, generator=generator) * 0.1
        return {"pixel_values": self.images[index] + noise, "input_ids": self.ids[index]}


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def batch(count: int = 24, seed: int = 0) -> dict[str, Tensor]:
    """One batch of pairs."""
    pairs = Pairs(count, seed)
    return collate([pairs[i] for i in range(count)])


def plain() -> TinyClip:
    """A tiny CLIP without dropout, always with the same weights."""
    torch.manual_seed(0)
    return TinyClip()


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether all weights are equal, bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def deviation(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of two models' weights."""
    return max((a[name] - b[name]).abs().max().item() for name in a)
