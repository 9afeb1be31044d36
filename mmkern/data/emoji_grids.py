"""Four emoji in a square, and questions that one look at the whole does not answer.

===========  =================================================  ==================================
kind         asks                                               answers
===========  =================================================  ==================================
``place``    what is at the top left, the bottom right, ...     the name there
``count``    how many of the four are animals, food, ...        zero to four
===========  =================================================  ==================================
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from mmkern.data.emoji import EmojiView
from mmkern.data.epochs import EpochAware
from mmkern.data.randomness import Stream, sample_keys, uniform

__all__ = ["GRID_KINDS", "EmojiGrids"]

GRID_KINDS = ("place", "count")
PLACES = ("top left", "top right", "bottom left", "bottom right")
COUNTS = ("zero", "one", "two", "three", "four")
# Category -> what is counted.
_COUNTED = {
    "Animals & Nature": "from nature",
    "Flags": "flags",
    "Food & Drink": "food",
    "People & Body": "people",
    "Smileys & Emotion": "faces",
}


class EmojiGrids(EpochAware, Dataset[dict[str, Any]]):
    """Squares of four pictures of a view, 2 S pixels a side.

    ``[i]`` is a :class:`~mmkern.data.Question` and its ``candidates``, the answers to choose from.

    There are as many as the view has pictures, each of which is once the first of four; the others
    and the question are drawn from (seed, epoch, index). ``place`` draws four different names. A
    half of ``count``'s pictures are of what is counted, as near as chance comes.

    Args:
        view: the pictures.
        kind: of ``GRID_KINDS``.
        seed: of the draws.

    Raises:
        ValueError: an unknown kind, or a view that is too small for it.
    """

    def __init__(self, view: EmojiView, kind: str, seed: int = 0) -> None:
        super().__init__()
        if kind not in GRID_KINDS:
            raise ValueError(f"EmojiGrids: kind must be one of {GRID_KINDS}, got {kind!r}")
        self.view, self.kind, self.seed = view, kind, seed
        if len(view.name_ids.unique()) < 4:
            raise ValueError("EmojiGrids: the view needs four names")
        category = view.category_ids[view.name_ids]
        self._of = {
            subject: (category == view.categories.index(name)).nonzero().flatten().tolist()
            for name, subject in _COUNTED.items()
            if name in view.categories
        }
        self._of = {subject: rows for subject, rows in self._of.items() if rows}
        if kind == "count" and not self._of:
            raise ValueError(f"EmojiGrids: no picture of the view is one of {[*_COUNTED.values()]}")
        self._members = {subject: set(rows) for subject, rows in self._of.items()}

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, index: int) -> dict[str, Any]:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"EmojiGrids: index {index} of {count} questions")
        index %= count
        epoch = self.epoch
        keys = sample_keys(self.seed, epoch, [index])
        draws = uniform(keys, 32, Stream.QUESTION)[0].tolist()
        rows, subject, answer, candidates = getattr(self, f"_{self.kind}")(index, draws)
        four = [self.view.pictures[row] for row in rows]
        image = torch.cat([torch.cat(four[:2], 1), torch.cat(four[2:], 1)])
        return {
            "image": image,
            "kind": self.kind,
            "subject": subject,
            "answer": answer,
            "index": index,
            "epoch": epoch,
            "candidates": candidates,
        }

    def _place(self, index: int, draws: list[float]) -> tuple[list[int], str, str, list[str]]:
        names = self.view.name_ids.tolist()
        place, rows = int(draws[0] * 4), [index]
        for draw in draws[1:]:
            row = int(draw * len(names))
            if len(rows) < 4 and names[row] not in [names[other] for other in rows]:
                rows.append(row)
        step = 0
        while len(rows) < 4:  # a view of few names, most of them drawn twice
            step += 1
            row = (index + step) % len(names)
            if names[row] not in [names[other] for other in rows]:
                rows.append(row)
        rows = [*rows[1 : place + 1], index, *rows[place + 1 :]]
        said = [self.view.names[names[row]] for row in rows]
        return rows, PLACES[place], said[place], said

    def _count(self, index: int, draws: list[float]) -> tuple[list[int], str, str, list[str]]:
        subject = list(self._of)[int(draws[0] * len(self._of))]
        inside = self._of[subject]
        rows = [
            inside[int(place * len(inside))] if coin < 0.5 else int(place * len(self.view))
            for coin, place in zip(draws[1:5], draws[5:9], strict=True)
        ]
        rows[int(draws[9] * 4)] = index
        found = sum(row in self._members[subject] for row in rows)
        return rows, subject, COUNTS[found], list(COUNTS)
