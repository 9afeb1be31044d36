"""Images, text, collators and the small real data sets."""

from mmkern.data.collator import ContrastiveCollator
from mmkern.data.documents import DocumentCollator, DocumentDataset
from mmkern.data.emoji import EmojiData, EmojiView, pixel_neighbour_top1
from mmkern.data.emoji_episodes import EmojiEpisodes
from mmkern.data.emoji_questions import KINDS, EmojiQuestions
from mmkern.data.images import (
    MEAN,
    STD,
    ClipTransform,
    ImageError,
    PixelTransform,
    open_image,
)
from mmkern.data.instructions import TEMPLATES, Question
from mmkern.data.language import CausalCollator, PretrainingCollator, Seq2SeqCollator, Texts
from mmkern.data.mixture import Mixture
from mmkern.data.pairs import PairDataset, PairError
from mmkern.data.questions import QuestionDataset
from mmkern.data.samplers import UniqueBatchSampler
from mmkern.data.shards import ShardDataset, ShardError
from mmkern.data.tokenizer import ClipTokenizer

__all__ = [
    "KINDS",
    "MEAN",
    "STD",
    "TEMPLATES",
    "CausalCollator",
    "ClipTokenizer",
    "ClipTransform",
    "ContrastiveCollator",
    "DocumentCollator",
    "DocumentDataset",
    "EmojiData",
    "EmojiEpisodes",
    "EmojiQuestions",
    "EmojiView",
    "ImageError",
    "Mixture",
    "PairDataset",
    "PairError",
    "PixelTransform",
    "PretrainingCollator",
    "Question",
    "QuestionDataset",
    "Seq2SeqCollator",
    "ShardDataset",
    "ShardError",
    "Texts",
    "UniqueBatchSampler",
    "open_image",
    "pixel_neighbour_top1",
]
