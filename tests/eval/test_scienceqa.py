"""ScienceQA: letters in answers, accuracy by column, the published files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmkern.eval.scienceqa import Problem, accuracy, answer_letter, ask, evaluate, read_problems


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", 1),
        ("b", None),
        ("C.", 2),
        ("A. because it is", 0),
        ("It is cold. The answer is B.", 1),
        ("The answer is B. The answer is B.", 1),
        ("The answer is A. Or: The answer is B.", None),
        ("The answer is D.", None),
        ("The answer is B", None),
        ("An apple", None),
        ("", None),
    ],
)
def test_the_letter_of_an_answer(said: str, letter: int | None) -> None:
    """A wrong or missing letter would count as right, or a right one as wrong."""
    assert answer_letter(said, 3) == letter


PROBLEMS = [
    Problem("why?", ("x", "y"), 0, "natural science", 3, hint="a hint"),
    Problem("what?", ("x", "y", "z"), 1, "natural science", 8, image="a.png"),
    Problem("who?", ("x", "y"), 1, "social science", 12),
]


def test_accuracy_by_column() -> None:
    """The paper's columns would mix subjects, contexts or grades."""
    found = accuracy(PROBLEMS, ["The answer is A.", "The answer is C.", "nothing"])
    assert found == pytest.approx(
        {"NAT": 0.5, "SOC": 0, "TXT": 1, "IMG": 0, "NO": 0, "G1-6": 1, "G7-12": 0,
         "average": 1 / 3, "chance": (0.5 + 1 / 3 + 0.5) / 3, "failed": 1 / 3}
    )  # fmt: skip
    with pytest.raises(ValueError, match="got 1 and 3"):
        accuracy(PROBLEMS, ["A"])


def test_published_files_are_asked(tmp_path: Path) -> None:
    """The published data could not be read, or a picture not be shown with its problem."""
    row = {"question": "what?", "choices": ["x", "y"], "answer": 1, "grade": "grade4",
           "subject": "language science", "hint": "", "image": "image.png"}  # fmt: skip
    rows = {"7": row, "9": {**row, "image": None, "hint": "It rains."}, "8": row}
    (tmp_path / "problems.json").write_text(json.dumps(rows))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["7", "9"], "train": ["8"]}))
    folder = tmp_path / "images" / "test" / "7"
    folder.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "image.png")
    problems = read_problems(tmp_path)
    assert [p.grade for p in problems] == [4, 4] and len(problems) == 2
    assert ask(problems[1]) == "Context: It rains.\nQuestion: what?\nOptions: (A) x (B) y"
    seen: list[Any] = []

    class Knows:
        batch_size = 1

        def generate(self, samples: list[Any]) -> list[str]:
            seen.extend(samples)
            return ["The answer is B."] * len(samples)

    assert evaluate(Knows(), problems)["average"] == 1  # type: ignore[arg-type]
    assert [len(sample["images"]) for sample in seen] == [1, 0]
    assert [sample["turns"][0].images for sample in seen] == [1, 0]
    with pytest.raises(ValueError, match="split must be one of"):
        read_problems(tmp_path, "val")
    with pytest.raises(ValueError, match="2 to 10 choices"):
        Problem("what?", ("x", "y"), 2)
