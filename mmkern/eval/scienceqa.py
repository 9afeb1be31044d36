"""ScienceQA: multiple choice with reasons, scored by the letter that an answer names.

Lu et al., "Learn to Explain" (arXiv 2209.09513); LLaVA's format (arXiv 2304.08485, section 5.2):
the question, its context and the lettered choices are asked, and the model ends its reasons with
"The answer is X.". An answer that names no letter, or several, is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkern.data import Turn, open_image
from mmkern.eval.answers import Answerer

__all__ = ["Problem", "accuracy", "answer_letter", "ask", "evaluate", "read_problems"]

LETTERS = "ABCDEFGHIJ"
_ANSWER = re.compile(r"The answer is ([A-Z])\.")


@dataclass(frozen=True)
class Problem:
    """One problem; ``image`` is a path or None, ``answer`` the right choice's index."""

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""
    grade: int = 0
    hint: str = ""
    image: str | None = None

    def __post_init__(self) -> None:
        if not 2 <= len(self.choices) <= len(LETTERS) or not 0 <= self.answer < len(self.choices):
            raise ValueError(
                f"ScienceQA: expected 2 to {len(LETTERS)} choices and one of them as the answer, "
                f"got {list(self.choices)} and {self.answer}: {self.question!r:.60}"
            )


# The columns of the paper's table: subject, kind of context, grades.
COLUMNS: dict[str, Callable[[Problem], bool]] = {
    "NAT": lambda p: p.subject == "natural science",
    "SOC": lambda p: p.subject == "social science",
    "LAN": lambda p: p.subject == "language science",
    "TXT": lambda p: bool(p.hint),
    "IMG": lambda p: p.image is not None,
    "NO": lambda p: not p.hint and p.image is None,
    "G1-6": lambda p: 1 <= p.grade <= 6,
    "G7-12": lambda p: 7 <= p.grade <= 12,
    "average": lambda p: True,
}


def read_problems(folder: str | Path, split: str = "test") -> list[Problem]:
    """The problems of a split of the published data.

    ``problems.json`` and ``pid_splits.json`` in ``folder``; pictures are
    ``images/SPLIT/ID/image.png`` there.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: an unknown split, an answer that is no choice.
    """
    folder = Path(folder)
    splits = json.loads((folder / "pid_splits.json").read_text(encoding="utf-8"))
    if split not in splits:
        raise ValueError(f"ScienceQA: split must be one of {sorted(splits)}, got {split!r}")
    rows = json.loads((folder / "problems.json").read_text(encoding="utf-8"))
    return [_problem(rows[name], folder / "images" / split / name) for name in splits[split]]


def _problem(row: Mapping[str, Any], pictures: Path) -> Problem:
    picture = row.get("image")
    return Problem(
        question=row["question"],
        choices=tuple(row["choices"]),
        answer=row["answer"],
        subject=row.get("subject", ""),
        grade=int(str(row.get("grade", "0")).removeprefix("grade")),
        hint=row.get("hint", ""),
        image=str(pictures / picture) if picture else None,
    )


def ask(problem: Problem) -> str:
    """The question with its context and lettered choices."""
    choices = " ".join(f"({LETTERS[i]}) {text}" for i, text in enumerate(problem.choices))
    context = f"Context: {problem.hint}\n" if problem.hint else ""
    return f"{context}Question: {problem.question}\nOptions: {choices}"


def answer_letter(said: str, choices: int) -> int | None:
    """The choice that an answer names, or None.

    A letter alone ("B", "B.", "B. because ..."), else the one letter in "The answer is B.".
    """
    said = said.strip()
    found = set(_ANSWER.findall(said))
    if re.fullmatch(r"[A-Z]\.?", said) or re.match(r"[A-Z]\. ", said):
        found = {said[0]}
    if len(found) != 1:
        return None
    index = LETTERS.find(found.pop())
    return index if 0 <= index < choices else None


def accuracy(problems: Sequence[Problem], said: Sequence[str]) -> dict[str, float]:
    """Share of right answers by the paper's columns that have a problem, and how many ``failed``.

    Raises:
        ValueError: numbers that differ, or none.
    """
    if len(problems) != len(said) or not problems:
        raise ValueError(
            f"accuracy: expected an answer to each problem, at least one, got {len(said)} and "
            f"{len(problems)}"
        )
    letters = [answer_letter(s, len(p.choices)) for p, s in zip(problems, said, strict=True)]
    right = [letter == p.answer for letter, p in zip(letters, problems, strict=True)]
    scores: dict[str, float] = {}
    for name, belongs in COLUMNS.items():
        own = [hit for hit, p in zip(right, problems, strict=True) if belongs(p)]
        if own:
            scores[name] = sum(own) / len(own)
    scores["chance"] = sum(1 / len(p.choices) for p in problems) / len(problems)
    scores["failed"] = sum(letter is None for letter in letters) / len(letters)
    return scores


def evaluate(answerer: Answerer, problems: Sequence[Problem]) -> dict[str, float]:
    """Ask a model; see :func:`accuracy`."""
    said: list[str] = []
    for start in range(0, len(problems), answerer.batch_size):
        samples = []
        for index, problem in enumerate(problems[start : start + answerer.batch_size], start):
            images = [] if problem.image is None else [open_image(problem.image)]
            turns = [Turn(ask(problem), "", len(images))]
            samples.append({"images": images, "turns": turns, "index": index, "epoch": 0})
        said += answerer.generate(samples)
    return accuracy(problems, said)
