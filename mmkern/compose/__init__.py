"""Articles with pictures: composition by a language model and a retriever, step by step."""

from mmkern.compose.document import CompositionError, Document, Illustration, Picture
from mmkern.compose.steps import LanguageModel, Retriever, Settings, compose

__all__ = [
    "CompositionError",
    "Document",
    "Illustration",
    "LanguageModel",
    "Picture",
    "Retriever",
    "Settings",
    "compose",
]
