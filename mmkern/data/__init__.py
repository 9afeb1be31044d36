"""Images, text, collators and the small real data sets."""

from mmkern.data.collator import ContrastiveCollator
from mmkern.data.conversation_batches import ConversationCollator
from mmkern.data.conversations import CONVERSATIONS, ConversationDataset, Template, Turn, read_turns
from mmkern.data.documents import DocumentCollator, DocumentDataset
from mmkern.data.emoji import EmojiData, EmojiView, pixel_neighbour_top1
from mmkern.data.emoji_conversations import EmojiConversations
from mmkern.data.emoji_episodes import EmojiEpisodes
from mmkern.data.emoji_grids import GRID_KINDS, EmojiGrids
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
from mmkern.data.interleaved import InterleavedCollator
from mmkern.data.language import CausalCollator, PretrainingCollator, Seq2SeqCollator, Texts
from mmkern.data.mixture import Mixture
from mmkern.data.pairs import PairDataset, PairError
from mmkern.data.questions import QuestionDataset
from mmkern.data.samplers import GroupedBatchSampler, UniqueBatchSampler
from mmkern.data.shards import ShardDataset, ShardError
from mmkern.data.text_questions import TextQuestions
from mmkern.data.tiles import TileTransform
from mmkern.data.tokenizer import ClipTokenizer

__all__ = [
    "CONVERSATIONS",
    "GRID_KINDS",
    "KINDS",
    "MEAN",
    "STD",
    "TEMPLATES",
    "CausalCollator",
    "ClipTokenizer",
    "ClipTransform",
    "ContrastiveCollator",
    "ConversationCollator",
    "ConversationDataset",
    "DocumentCollator",
    "DocumentDataset",
    "EmojiConversations",
    "EmojiData",
    "EmojiEpisodes",
    "EmojiGrids",
    "EmojiQuestions",
    "EmojiView",
    "GroupedBatchSampler",
    "ImageError",
    "InterleavedCollator",
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
    "Template",
    "TextQuestions",
    "Texts",
    "TileTransform",
    "Turn",
    "UniqueBatchSampler",
    "open_image",
    "pixel_neighbour_top1",
    "read_turns",
]
