"""Images, text, collators and the small real data sets."""

from mmkern.data.collator import ContrastiveCollator
from mmkern.data.emoji import EmojiData, EmojiView, pixel_neighbour_top1
from mmkern.data.images import (
    MEAN,
    STD,
    ClipTransform,
    ImageError,
    PixelTransform,
    open_image,
)
from mmkern.data.pairs import PairDataset, PairError
from mmkern.data.samplers import UniqueBatchSampler
from mmkern.data.shards import ShardDataset, ShardError
from mmkern.data.tokenizer import ClipTokenizer

__all__ = [
    "MEAN",
    "STD",
    "ClipTokenizer",
    "ClipTransform",
    "ContrastiveCollator",
    "EmojiData",
    "EmojiView",
    "ImageError",
    "PairDataset",
    "PairError",
    "PixelTransform",
    "ShardDataset",
    "ShardError",
    "UniqueBatchSampler",
    "open_image",
    "pixel_neighbour_top1",
]
