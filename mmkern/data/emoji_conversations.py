"""Conversations of two or three questions about an emoji, for LLaVA's second stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from mmkern.data.conversations import Conversation, Turn
from mmkern.data.emoji import EmojiView
from mmkern.data.emoji_questions import EmojiQuestions
from mmkern.data.epochs import EpochAware
from mmkern.data.language import Texts
from mmkern.data.randomness import Stream, sample_keys, uniform

__all__ = ["EmojiConversations"]


class EmojiConversations(EpochAware, Dataset[Conversation]):
    """One conversation a picture: ``[i]`` is a ``Conversation``; map-style.

    Rounds are questions of different kinds that fit the picture, put by the kinds' templates. How
    many (of ``rounds``, as many as fit), which, and in which words depends on (seed, epoch, index).

    Args:
        view: the pictures.
        kinds: of :data:`mmkern.data.KINDS`.
        seed: of the draws.
        texts: templates of the questions.
        rounds: at least and at most.

    Raises:
        ValueError: an unknown kind, one that fits no picture, no picture that any kind fits, or
            rounds that are not 1 <= least <= most.
    """

    def __init__(
        self,
        view: EmojiView,
        kinds: Sequence[str],
        seed: int = 0,
        *,
        texts: Texts | None = None,
        rounds: tuple[int, int] = (2, 3),
    ) -> None:
        super().__init__()
        if not kinds or not 1 <= rounds[0] <= rounds[1]:
            raise ValueError(
                "EmojiConversations: needs kinds and 1 <= least <= most rounds, got "
                f"{list(kinds)} and {rounds}"
            )
        self.view, self.seed, self.rounds = view, seed, rounds
        self.texts = Texts() if texts is None else texts
        self.questions = [EmojiQuestions(view, kind, seed) for kind in kinds]
        # [kinds, pictures]: which of the kind's questions is about the picture, -1 for none.
        self._place = torch.full((len(kinds), len(view)), -1)
        for own, asked in zip(self._place, self.questions, strict=True):
            own[asked.rows] = torch.arange(len(asked))
        self.rows = (self._place >= 0).any(0).nonzero().flatten()

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        for asked in self.questions:
            asked.set_epoch(epoch)

    def __getitem__(self, index: int) -> Conversation:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"EmojiConversations: index {index} of {count} conversations")
        index %= count
        epoch, row = self.epoch, int(self.rows[index])
        fits = (self._place[:, row] >= 0).nonzero().flatten().tolist()
        keys = sample_keys(self.seed, epoch, [index])
        number, *order = uniform(keys, 1 + len(fits), Stream.ROUNDS)[0].tolist()
        least, most = self.rounds
        wanted = least + int(number * (most - least + 1))
        chosen = [kind for _, kind in sorted(zip(order, fits, strict=True))][:wanted]
        turns = []
        for place, kind in enumerate(chosen):
            question = self.questions[kind][int(self._place[kind, row])]
            # Kinds do not share a draw of their templates.
            own = sample_keys(int(keys[0]), 0, [kind])
            asked, answer = self.texts([question], own)[0]
            turns.append(Turn(asked, answer, int(place == 0)))
        return {"images": [self.view.pictures[row]], "turns": turns, "index": index, "epoch": epoch}
