"""Mixtures: shares, coverage, and what they depend on."""

import collections

import numpy as np
import pytest

from mmkern.data.instructions import TEMPLATES
from mmkern.data.mixture import (
    INSTRUCTBLIP,
    INSTRUCTBLIP_HELD_OUT,
    INSTRUCTBLIP_WEIGHTS,
    Mixture,
    shares,
)


class Numbers:
    """A data set of numbered samples."""

    def __init__(self, count):
        self.count, self.epoch = count, 0

    def __len__(self):
        return self.count

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        assert 0 <= index < self.count
        return {"row": index, "index": index, "epoch": self.epoch}


def mixture(**options):
    sizes = {"large": 900, "small": 9}
    return Mixture({name: Numbers(size) for name, size in sizes.items()}, **options)


def test_shares_follow_square_roots_and_weights():
    """A small data set would be learned by heart, or a weight have another effect than it says."""
    assert shares({"a": 900, "b": 9}) == {"a": pytest.approx(30 / 33), "b": pytest.approx(3 / 33)}
    weighted = shares({"a": 100, "b": 100}, {"a": 0.5})
    assert weighted["b"] == pytest.approx(2 * weighted["a"])
    assert shares({"a": 4, "b": 4}, {"a": 0.0})["a"] == 0


@pytest.mark.parametrize(
    ("sizes", "weights"),
    [
        ({}, {}),
        ({"a": 0}, {}),
        ({"a": 1}, {"b": 1.0}),
        ({"a": 1}, {"a": -1.0}),
        ({"a": 1}, {"a": 0.0}),
    ],
)
def test_shares_that_make_no_sense(sizes, weights):
    """A misspelt data set would train with weight 1, without a word."""
    with pytest.raises(ValueError, match="mixture"):
        shares(sizes, weights)


def test_draws_match_the_shares():
    """What is sampled would not be what the shares say (chi-square at 5 standard deviations)."""
    made = mixture(samples=20_000, seed=1)
    counts = collections.Counter(made[i]["source"] for i in range(0, 20_000, 4))
    for name, share in made.shares.items():
        deviation = (5_000 * share * (1 - share)) ** 0.5
        assert abs(counts[name] - 5_000 * share) < 5 * deviation


def test_each_sample_once_before_any_twice():
    """Part of a data set would never be seen while another part is repeated."""
    made = mixture(samples=1_000, seed=2)
    drawn = [made[i] for i in range(1_000)]
    small = [sample["row"] for sample in drawn if sample["source"] == "small"]
    assert len(small) > 40
    for start in range(0, len(small) - 9, 9):
        assert sorted(small[start : start + 9]) == list(range(9))
    large = [sample["row"] for sample in drawn if sample["source"] == "large"]
    assert max(collections.Counter(large).values()) <= -(-len(large) // 900)
    assert [sample["index"] for sample in drawn] == list(range(1_000))


def test_order_depends_on_seed_and_epoch_alone():
    """A run that goes on in the middle of an epoch would draw other samples."""

    def rows(made, indices):
        return [(made[i]["source"], made[i]["row"], made[i]["epoch"]) for i in indices]

    places = [0, 7, 500, 3]
    first, again = mixture(seed=5), mixture(seed=5)
    first.set_epoch(3)
    rows(first, range(50))
    again.set_epoch(3)
    assert rows(first, places) == rows(again, places)
    assert {epoch for _, _, epoch in rows(first, places)} == {3}
    again.set_epoch(4)
    assert rows(first, range(50)) != rows(again, range(50))
    assert rows(mixture(seed=6), range(50)) != rows(mixture(seed=5), range(50))
    assert len(first) == 909 and first[-1]["index"] == 908
    with pytest.raises(IndexError):
        first[909]


def test_instructblip_table():
    """The paper's recipe would mix other data sets, or name a task that has no templates."""
    assert len(INSTRUCTBLIP) == len(INSTRUCTBLIP_HELD_OUT) == 13
    assert not set(INSTRUCTBLIP) & set(INSTRUCTBLIP_HELD_OUT)
    assert {kind for _, kind in INSTRUCTBLIP.values()} <= set(TEMPLATES)
    found = shares({name: size for name, (size, _) in INSTRUCTBLIP.items()}, INSTRUCTBLIP_WEIGHTS)
    assert np.isclose(sum(found.values()), 1)
    assert max(found, key=found.get) == "web-capfilt"
    assert found["okvqa"] > found["aokvqa"]


def test_templates_in_instructblips_manner():
    """The paper has ten to fifteen wordings a task, and says so where answers are short."""
    for kind, templates in TEMPLATES.items():
        if kind == "verbatim":
            continue
        assert 10 <= len(templates) <= 15 and len(set(templates)) == len(templates)
        if kind != "ask":
            hints = ("short", "brief", "few words", "one word", "yes or no", "word")
            short = [t for t in templates if any(hint in t.lower() for hint in hints)]
            assert len(short) >= len(templates) // 2, kind
