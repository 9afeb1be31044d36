"""Pictures with questions and answers, from JSON lines: for people's own data."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmkern.data.instructions import TEMPLATES, Question
from mmkern.data.pairs import (
    OnError,
    PairDataset,
    PairError,
    existing_table,
    json_lines,
    usable_rows,
)
from mmkern.data.randomness import Stream, sample_keys, uniform
from mmkern.data.strings import Strings

__all__ = ["QuestionDataset"]


class QuestionDataset(PairDataset):
    """Map-style data set of questions about pictures: ``ds[i]`` is a ``Question``.

    Args:
        images, questions, answers: paths and texts; several answers of one question (as VQAv2 has)
            are joined by a newline, and one is drawn for each epoch.
        kind: the task, whose templates the question is put into; "verbatim" leaves it as it is.
        on_error, seed: as ``PairDataset`` takes them.

    Raises:
        PairError: no questions, unequal numbers, an unknown kind.
    """

    def __init__(
        self,
        images: Sequence[str],
        questions: Sequence[str],
        answers: Sequence[str],
        *,
        kind: str = "question",
        on_error: OnError = "raise",
        seed: int = 0,
    ) -> None:
        super().__init__(images, questions, on_error=on_error, seed=seed)
        if len(answers) != len(images):
            raise PairError(
                f"QuestionDataset: needs one answer a question, got {len(answers)} and "
                f"{len(images)}"
            )
        if kind not in TEMPLATES:
            raise PairError(
                f"QuestionDataset: kind must be one of {sorted(TEMPLATES)}, got {kind!r}"
            )
        self.kind = kind
        self._answers = Strings(answers)

    @classmethod
    def from_jsonl(  # type: ignore[override]
        cls,
        path: str | os.PathLike[str],
        *,
        kind: str = "question",
        image_column: str = "image",
        question_column: str = "question",
        answer_column: str = "answer",
        root: str | os.PathLike[str] | None = None,
        on_error: OnError = "raise",
        seed: int = 0,
        check_files: bool = True,
    ) -> QuestionDataset:
        """Read one JSON object a line, in UTF-8: an image's path, a question, an answer.

        Kinds whose templates are whole instructions (captions) need no question. An answer may be a
        list of texts (of ten people, say). A row with LLaVA's ``conversations`` gives a question
        for each round, without what was said before it.

        Args:
            path: the table.
            kind: see the class.
            image_column, question_column, answer_column: keys of each object.
            root, on_error, seed, check_files: as ``PairDataset.from_csv`` takes them.

        Raises:
            MissingPairsError: there is no such table.
            PairError: bad rows, an unknown kind.
        """
        table = existing_table(path)
        columns = (image_column, question_column, answer_column)
        asks = "{}" in TEMPLATES.get(kind, ("{}",))[0]
        rows = _rows(table, columns, asks)
        folder = Path(root) if root is not None else table.parent
        good, dropped = usable_rows(rows, table, folder, on_error, check_files)
        images, questions, answers = zip(*good, strict=True)
        data = cls(images, questions, answers, kind=kind, on_error=on_error, seed=seed)
        data.dropped = dropped
        return data

    def answers(self, index: int) -> list[str]:
        """Every right answer to question ``index``."""
        return self._answers[index].split("\n")

    def __getitem__(self, index: int) -> Question:  # type: ignore[override]
        """Question ``index``; errors as ``PairDataset`` raises them."""
        sample, source = self._open(index)
        answers = self.answers(source)
        key = sample_keys(self.seed, sample["epoch"], [sample["index"]])
        chosen = int(uniform(key, 1, Stream.ANSWER)[0, 0] * len(answers))
        return {
            "image": sample["image"],
            "kind": self.kind,
            "subject": sample["text"],
            "answer": answers[chosen],
            "index": sample["index"],
            "epoch": sample["epoch"],
        }


def _rows(
    table: Path, columns: tuple[str, str, str], asks: bool
) -> Iterator[tuple[tuple[str, ...], str]]:
    """((image, question, answers), what is wrong)."""
    image, question, answer = columns
    for where, fields, problem in json_lines(table):
        if problem:
            yield (), problem
        elif "conversations" in fields:
            yield from _rounds(where, fields, image)
        else:
            texts = {image: fields.get(image)} | ({question: fields.get(question)} if asks else {})
            yield _checked(where, texts, answer, fields.get(answer))


def _rounds(
    where: str, fields: dict[str, Any], image_column: str
) -> Iterator[tuple[tuple[str, ...], str]]:
    turns = fields["conversations"]
    pairs = turns if isinstance(turns, list) and turns and len(turns) % 2 == 0 else None
    if pairs is None or not all(isinstance(turn, dict) for turn in pairs):
        yield (), f"{where}: 'conversations' must be pairs of turns, got {turns!r}"
        return
    for asked, replied in zip(pairs[::2], pairs[1::2], strict=True):
        if (asked.get("from"), replied.get("from")) != ("human", "gpt"):
            yield (), f"{where}: 'conversations' must alternate human and gpt"
            return
        question = str(asked.get("value", "")).replace("<image>", "")
        texts = {image_column: fields.get(image_column), "value": question}
        yield _checked(where, texts, "value", replied.get("value"))


def _checked(
    where: str, texts: dict[str, Any], column: str, answer: Any
) -> tuple[tuple[str, ...], str]:
    answers = answer if isinstance(answer, list) else [answer]
    for name, value in (*texts.items(), *((column, one) for one in answers)):
        if not isinstance(value, str) or not value.strip():
            return (), f"{where}: {name!r} must be text, got {value!r}"
    if not answers:
        return (), f"{where}: {column!r} has no answers"
    image, question = (*(text.strip() for text in texts.values()), "")[:2]
    return (image, question, "\n".join(" ".join(text.split()) for text in answers)), ""
