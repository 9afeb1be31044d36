"""Which of four pictures belongs into a text: composition's choice on emoji, answers known."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from mmkern.compose.document import Document, Illustration, Picture
from mmkern.compose.steps import LETTERS
from mmkern.compose.tasks import choice_task
from mmkern.data.emoji import EmojiView
from mmkern.data.epochs import EpochAware
from mmkern.data.randomness import Stream, sample_keys, uniform

__all__ = ["PICTURE_CHOICE", "EmojiChoice"]

# The kind's name in recipes, beside the kinds of questions.
PICTURE_CHOICE = "picture_choice"
# Draws for options and earlier pictures; enough that one with another name comes up in time.
_DRAWS = 64


class EmojiChoice(EpochAware, Dataset[dict[str, Any]]):
    """A short text with pictures, a place for one more, and four pictures to choose from.

    Item i asks for picture i of the view. The others, the pictures that the text has already and
    the order of the options are drawn from (seed, epoch, index); all have different names, and
    names that share a picture count as one (``EmojiView.group_ids``). Samples are those of
    :mod:`mmkern.compose.tasks`.

    Args:
        view: the pictures.
        seed: of the draws.
        earlier: sections before the place, each with its picture.

    Raises:
        ValueError: fewer names than a sample needs.
    """

    def __init__(self, view: EmojiView, seed: int = 0, *, earlier: int = 1) -> None:
        super().__init__()
        self.view, self.seed, self.earlier = view, seed, earlier
        self._groups: list[int] = view.group_ids().tolist()
        needed = len(LETTERS) + earlier
        if len(set(self._groups)) < needed:
            raise ValueError(
                f"EmojiChoice: needs {needed} different names, the view has "
                f"{len(set(self._groups))}"
            )
        self._names: list[str] = [view.names[i] for i in view.name_ids.tolist()]

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        count = len(self._groups)
        if not -count <= index < count:
            raise IndexError(f"EmojiChoice: index {index} of {count} pictures")
        index %= count
        rows, order = self._draw(index)
        earlier, options = rows[len(LETTERS) :], rows[: len(LETTERS)]
        document = Document(
            "Emoji",
            tuple(f"Here is {self._names[row]}." for row in (*earlier, index)),
            (
                *(Illustration(n, chosen=str(row)) for n, row in enumerate(earlier)),
                Illustration(self.earlier, self._names[index], chosen=str(index)),
            ),
        )
        task = choice_task(document, self.earlier, [str(row) for row in options[1:]], order)
        pieces = [
            self.view.pictures[int(piece.name)] if isinstance(piece, Picture) else piece
            for piece in task["pieces"]
        ]
        return {**task, "pieces": pieces, "index": index, "epoch": self.epoch}

    def _draw(self, index: int) -> tuple[list[int], list[int]]:
        """Rows of the options (the right one first) and of the earlier pictures; the order."""
        count, needed = len(self._groups), len(LETTERS) + self.earlier
        keys = sample_keys(self.seed, self.epoch, [index])
        draws = uniform(keys, _DRAWS + len(LETTERS), Stream.CHOICE)[0].tolist()
        rows, names = [index], {self._groups[index]}
        step = 0
        while len(rows) < needed:
            # After the draws, the rows behind the last one: a view of few names ends as well.
            row = int(draws[step] * count) if step < _DRAWS else (rows[-1] + step) % count
            step += 1
            if self._groups[row] not in names:
                rows.append(row)
                names.add(self._groups[row])
        last = draws[_DRAWS:]
        return rows, sorted(range(len(LETTERS)), key=last.__getitem__)
