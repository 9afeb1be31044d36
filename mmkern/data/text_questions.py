"""Questions with answers and no picture, from JSON lines: what instruction tuning mixes in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from mmkern.data.epochs import EpochAware
from mmkern.data.instructions import VERBATIM
from mmkern.data.pairs import PairError, existing_table, json_lines
from mmkern.data.strings import Strings

__all__ = ["TextQuestions"]


class TextQuestions(EpochAware, Dataset[dict[str, Any]]):
    """Map-style; ``[i]`` is a :class:`~mmkern.data.Question` without ``image``, taken verbatim.

    Args:
        questions, answers: as many of both.

    Raises:
        PairError: none, or unequal numbers.
    """

    def __init__(self, questions: Sequence[str], answers: Sequence[str]) -> None:
        super().__init__()
        if len(questions) != len(answers) or not questions:
            raise PairError(
                "TextQuestions: needs one answer a question and at least one, got "
                f"{len(questions)} questions and {len(answers)} answers"
            )
        self._questions, self._answers = Strings(questions), Strings(answers)

    @classmethod
    def from_jsonl(
        cls,
        path: str | os.PathLike[str],
        *,
        question_column: str = "question",
        answer_column: str = "answer",
    ) -> TextQuestions:
        """Read one JSON object a line, in UTF-8.

        Raises:
            MissingPairsError: there is no such table.
            PairError: a bad row, by its line.
        """
        questions: list[str] = []
        answers: list[str] = []
        for where, fields, problem in json_lines(existing_table(path)):
            if problem:
                raise PairError(problem)
            for column, found in ((question_column, questions), (answer_column, answers)):
                value = fields.get(column)
                if not isinstance(value, str) or not value.strip():
                    raise PairError(f"{where}: {column!r} must be text, got {value!r}")
                found.append(value)
        return cls(questions, answers)

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"TextQuestions: index {index} of {count} questions")
        index %= count
        return {
            "kind": VERBATIM,
            "subject": self._questions[index],
            "answer": self._answers[index],
            "index": index,
            "epoch": self.epoch,
        }
