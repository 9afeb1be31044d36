"""A language model that says what it was told to, and an index of six toy pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from mmkern.compose.document import Picture
from mmkern.compose.retriever import PictureIndex

WORDS = ("tiger", "banana", "harbour", "clock", "violin", "snow")


class Script:
    """Answers in order; every call is kept. Letters' logits come from a table of their own."""

    def __init__(self, *said: str, logits: Sequence[Sequence[float]] = ()) -> None:
        self.said, self.logits = list(said), list(logits)
        self.calls: list[dict[str, Any]] = []
        self.choices: list[tuple[list[Any], list[str]]] = []

    def generate(self, prompt: Any, **options: Any) -> str:
        self.calls.append({"prompt": list(prompt), **options})
        return self.said.pop(0)

    def letter_logits(self, prompt: Any, letters: Sequence[str], *, begin: str = "") -> list[float]:
        self.choices.append((list(prompt), list(letters)))
        return list(self.logits.pop(0)) if self.logits else [0.0] * len(letters)


class Toy:
    """Retrieval by words: a picture fits a text that has its word; the index is a real one."""

    def __init__(self, names: Sequence[str] = tuple(f"{word}.png" for word in WORDS)) -> None:
        digests = [name.partition(".")[0] for name in names]
        vectors = F.normalize(torch.eye(len(names), 8) + 0.1, dim=1)
        self.index = PictureIndex(tuple(names), vectors, tuple(digests))
        self.asked: list[tuple[str, set[str]]] = []

    def search(self, text: str, k: int, exclude: Any = ()) -> list[str]:
        self.asked.append((text, set(exclude)))
        query = torch.full((8,), 0.01)
        for row, name in enumerate(self.index.names):
            query[row] += 1.0 * (name.partition(".")[0] in text) - 0.001 * row
        return [name for name, _ in self.index.search(query, k, exclude)]


def pictures(prompt: Sequence[Any]) -> list[str]:
    return [piece.name for piece in prompt if isinstance(piece, Picture)]
