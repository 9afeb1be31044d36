"""Questions from JSON lines: people's own data."""

import json

import pytest
from PIL import Image

from mmkern.data.pairs import PairError
from mmkern.data.questions import QuestionDataset


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{name}.png")
    return tmp_path


def write(folder, *rows):
    path = folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


ROW = {"image": "a.png", "question": "What colour is it?", "answer": "red"}


def test_plain_rows(folder):
    """A table of questions would lose its answers or its tasks."""
    path = write(folder, ROW, {"image": "b.png", "question": "What is it?", "answer": "a square"})
    data = QuestionDataset.from_jsonl(path)
    assert len(data) == 2
    sample = data[1]
    assert (sample["subject"], sample["answer"]) == ("What is it?", "a square")
    assert (sample["kind"], sample["index"], sample["epoch"]) == ("question", 1, 0)
    assert sample["image"].size == (8, 8)
    asked = QuestionDataset.from_jsonl(
        write(folder, {"image": "a.png", "q": "x?", "a": "y"}),
        kind="verbatim", question_column="q", answer_column="a",
    )[0]  # fmt: skip
    assert (asked["kind"], asked["subject"], asked["answer"]) == ("verbatim", "x?", "y")


def test_captions_need_no_question(folder):
    """A table of captions could not be mixed with questions."""
    data = QuestionDataset.from_jsonl(
        write(folder, {"image": "a.png", "answer": "a red square"}), kind="caption"
    )
    assert (data[0]["kind"], data[0]["subject"], data[0]["answer"]) == (
        "caption", "", "a red square",
    )  # fmt: skip


def test_several_answers(folder):
    """VQAv2's ten answers would be joined into one, or only the first be learned."""
    data = QuestionDataset.from_jsonl(write(folder, {**ROW, "answer": ["red", "dark red"]}))
    found = set()
    for epoch in range(20):
        data.set_epoch(epoch)
        found.add(data[0]["answer"])
    assert found == {"red", "dark red"}


def test_llava_conversations(folder):
    """LLaVA's file would have to be rewritten by hand."""
    rounds = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A square."},
        {"from": "human", "value": "Which colour?"},
        {"from": "gpt", "value": "Red."},
    ]
    path = write(folder, {"id": 1, "image": "a.png", "conversations": rounds})
    data = QuestionDataset.from_jsonl(path, kind="verbatim")
    asked = [(data[i]["subject"], data[i]["answer"]) for i in range(2)]
    assert asked == [("What is it?", "A square."), ("Which colour?", "Red.")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "answer": ""}, "line 2: 'answer' must be text"),
        ({**ROW, "answer": []}, "line 2: 'answer' has no answers"),
        ({**ROW, "image": "none.png"}, "no such file"),
        ({"image": "a.png", "question": "x"}, "'answer' must be text, got None"),
        ({"image": "a.png", "conversations": [{"from": "human", "value": "x"}]}, "pairs of turns"),
        ({"image": "a.png", "conversations": [{"from": "gpt", "value": "x"}] * 2}, "alternate"),
    ],
)
def test_bad_rows(row, message, folder):
    """A bad row would end a run after hours, or be learned."""
    path = write(folder, ROW, row)
    with pytest.raises(PairError, match=message):
        QuestionDataset.from_jsonl(path)
    data = QuestionDataset.from_jsonl(path, on_error="skip")
    assert (len(data), data.dropped) == (1, 1)


def test_broken_pictures_are_replaced_with_their_question(folder):
    """Another picture would be shown with the broken one's question."""
    (folder / "a.png").write_bytes(b"nothing")
    other = {"image": "b.png", "question": "Which shape?", "answer": "square"}
    data = QuestionDataset.from_jsonl(write(folder, ROW, other), on_error="skip")
    sample = data[0]
    assert (sample["subject"], sample["answer"]) == ("Which shape?", "square")
    assert data.skipped == 1


def test_refusals(folder):
    """A misspelt task would train with the wrong instruction."""
    with pytest.raises(PairError, match="kind must be one of"):
        QuestionDataset.from_jsonl(write(folder, ROW), kind="smell")
    with pytest.raises(PairError, match="one answer a question"):
        QuestionDataset(["a.png"], ["x?"], [])
