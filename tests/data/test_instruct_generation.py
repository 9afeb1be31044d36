"""Instruction data: prompts, parsers, checks and counts, with a scripted language model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from mmkern.data import ConversationDataset, Turn
from mmkern.data.instruct_generation import (
    DETAIL_QUESTIONS,
    KINDS,
    Box,
    Kind,
    Message,
    Picture,
    ask,
    check,
    generate,
    parse,
)

STREET = Picture(
    "street",
    "street.png",
    ("A man rides a red bicycle.", "A dog runs behind a bicycle."),
    (Box("dog", 0.1, 0.5, 0.25, 0.75), Box("man", 0.4, 0.1, 0.6, 0.8)),
)
ROOM = Picture("room", "room.png", ("A cat sleeps on a chair.",))
GOOD = {
    "conversation": "Question: What does the man ride?\nAnswer: A red bicycle.\n===\n"
    "**Question:** What follows him?\n**Answer:** A dog.",
    "detail": "A man in the middle rides a red bicycle along the road, while a small dog runs "
    "behind him on the left side and seems to enjoy the chase.",
    "reasoning": "Question: Why might the dog run?\n\nAnswer: Dogs like to chase things that move, "
    "and the bicycle moves fast, so it may be playing with its owner.",
}


class Scripted:
    """Says its lines in order and keeps what it was asked."""

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)
        self.asked: list[Sequence[Message]] = []
        self.attempts: list[int] = []

    def __call__(self, messages: Sequence[Message], attempt: int) -> str:
        self.asked.append(messages)
        self.attempts.append(attempt)
        return self.lines.pop(0)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_becomes_a_row_that_can_be_trained_on(kind: Kind, tmp_path: Path) -> None:
    """What was generated could not be read as LLaVA's data."""
    made = generate([STREET], kind, Scripted(GOOD[kind]))
    assert made.counts == {"asked": 1, "calls": 1, "kept": 1} and not made.reasons
    Image.new("RGB", (8, 8)).save(tmp_path / "street.png")
    (tmp_path / "data.json").write_text(json.dumps(made.rows))
    (sample,) = [ConversationDataset.from_json(tmp_path / "data.json")[0]]
    assert [turn.images for turn in sample["turns"]] == [1, 0][: len(sample["turns"])]
    if kind == "conversation":
        assert sample["turns"] == [
            Turn("What does the man ride?", "A red bicycle.", 1),
            Turn("What follows him?", "A dog."),
        ]
    elif kind == "detail":
        assert sample["turns"][0].question in DETAIL_QUESTIONS
        assert sample["turns"][0].answer == GOOD["detail"]


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_hold_what_the_writer_may_know(kind: Kind) -> None:
    """The writer would lack the captions, invent places, or not see the examples."""
    messages = ask(STREET, kind, [(ROOM, GOOD[kind])])
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert messages[1]["content"] == ROOM.captions[0] and messages[2]["content"] == GOOD[kind]
    shown = messages[3]["content"]
    assert all(caption in shown for caption in STREET.captions)
    assert ("dog: [0.100, 0.500, 0.250, 0.750]" in shown) == (kind != "conversation")


def test_a_bad_answer_is_asked_again_then_counted() -> None:
    """Bad rows would be kept, or a picture lost without a word."""
    leak = GOOD["conversation"].replace("A dog.", "The caption says a dog.")
    model = Scripted("I cannot.", GOOD["conversation"], leak, "Question: a?\nAnswer: b.")
    made = generate([STREET, ROOM], "conversation", model, attempts=2)
    assert made.counts == {"asked": 2, "calls": 4, "kept": 1, "dropped": 1}
    assert made.reasons == {
        "not as asked": 1, "speaks of its sources": 1, "number of rounds": 1
    }  # fmt: skip
    assert model.attempts == [0, 1, 0, 1]
    assert [row["id"] for row in made.rows] == ["street-conversation"]


@pytest.mark.parametrize(
    ("turns", "kind", "reason"),
    [
        ([Turn("a?", "b"), Turn("A?", "c")], "conversation", "question twice"),
        ([Turn("a?", "b"), Turn("", "c")], "conversation", "empty turn"),
        ([Turn("a?", "too short")], "detail", "short answer"),
        ([Turn("a?", "word " * 30 + "at 0.25, 0.5")], "detail", "speaks of its sources"),
        ([Turn("a?", "word " * 30)] * 2, "reasoning", "number of rounds"),
        ([Turn("<image>?", "word " * 30)], "reasoning", "picture tag"),
        ([Turn("a?", "word " * 30)], "reasoning", ""),
    ],
)
def test_checks(turns: list[Turn], kind: Kind, reason: str) -> None:
    """Rows that teach a model to speak of captions, or nothing, would be kept."""
    assert check(turns, kind) == reason


@pytest.mark.parametrize("said", ["", "Answer: a", "Question: a", "Question: a\nQuestion: b"])
def test_rounds_must_alternate(said: str) -> None:
    """An answer would be given to another question."""
    with pytest.raises(ValueError, match="do not alternate"):
        parse(said, "conversation")


def test_bad_input_is_refused() -> None:
    """Places outside the picture, or two pictures of one id, would go into prompts and files."""
    with pytest.raises(ValueError, match="x1 <= x2"):
        Box("dog", 0.5, 0.1, 0.2, 0.9)
    with pytest.raises(ValueError, match="needs captions"):
        Picture("a", "a.png", ())
    with pytest.raises(ValueError, match="kind must be one of"):
        ask(ROOM, "poem")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\['room'\] twice"):
        generate([ROOM, ROOM], "detail", Scripted())
