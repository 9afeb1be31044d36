"""The steps of composition and the edits, with a scripted language model and a toy index."""

from __future__ import annotations

import pytest

from mmkern.compose import edits, steps
from mmkern.compose.document import CompositionError, Document, Illustration
from mmkern.compose.steps import Settings, compose, parse_locations, split_sections
from tests.compose.scripted import Script, Toy, pictures

ARTICLE = "The tiger sleeps.\n\n   \nA banana is yellow.  \n\nThe clock strikes."


def illustrated() -> Document:
    """Three sections, pictures behind the first and the last."""
    return Document(
        "A day",
        ("The tiger sleeps.", "A banana is yellow.", "The clock strikes."),
        (
            Illustration(0, "a tiger asleep", ("tiger.png", "snow.png"), "tiger.png"),
            Illustration(2, "an old clock", ("clock.png", "violin.png"), "clock.png"),
        ),
    )


def test_whole_composition() -> None:
    """The steps would not fit together, or the pictures stand in the wrong places."""
    lm = Script(ARTICLE, '2> and <Seg0>', 'a tiger"', 'an old clock" that', logits=[[3, 1, 0, 2],
                [0, 0, 5, 0]])  # fmt: skip
    toy = Toy()
    document = compose(lm, toy, "A day", count=2)
    assert document.sections == ("The tiger sleeps.", "A banana is yellow.", "The clock strikes.")
    first, second = document.illustrations
    assert (first.after, first.caption, first.chosen) == (0, "a tiger", "tiger.png")
    assert (second.after, second.caption) == (2, "an old clock")
    assert second.chosen == second.candidates[2] and second.candidates[0] == "clock.png"
    # The picture that was taken is not offered again, and stands in the context of the next choice.
    assert toy.asked == [("a tiger", set()), ("an old clock", {"tiger.png"})]
    assert pictures(lm.choices[0][0]) == list(first.candidates)
    assert pictures(lm.choices[1][0]) == ["tiger.png", *second.candidates]
    assert Document.from_json(document.to_json()) == document


def test_prompts_hold_what_a_step_may_see() -> None:
    """A caption would describe what comes later, or repeat the one before unknowingly."""
    lm = Script(ARTICLE, "0> <Seg1>", 'a tiger"', 'fruit"')
    compose(lm, Toy(), "A day")
    where = lm.calls[1]["prompt"][0]
    for part in ("<Seg0> The tiger sleeps.", "<Seg1> A banana", "<Seg2> The clock", "some of them"):
        assert part in where
    assert lm.calls[1]["beams"] == 5 and lm.calls[1]["max_new_tokens"] == 300
    earlier, later = (call["prompt"][0] for call in lm.calls[2:])
    assert "tiger sleeps" in earlier and "banana" not in earlier
    assert "banana" in later and '"a tiger"' in later and "clock" not in later
    for call in lm.calls[2:]:
        assert call["stop"] == '"' and call["begin"] == '"A picture of'
        assert call["repetition_penalty"] == 5.0 and call["max_new_tokens"] == 100
    # Long beginnings are shared: only what is new has to be computed.
    assert later.startswith(earlier.rpartition("\n")[0])


def test_sections_are_the_lines_that_say_something() -> None:
    """Blank lines would be numbered, and an endless article fill the context."""
    assert split_sections(" a \r\n\n\t\n b\n") == ("a", "b")
    assert split_sections("x\n" * 70) == ("x",) * 60
    assert split_sections(" \n") == ()


@pytest.mark.parametrize(
    ("said", "count", "expected"),
    [
        ("<Seg2>, <Seg0>", None, (0, 2)),
        ("<Seg1> <Seg1> <Seg01>", None, (1,)),
        ("<Seg3> <Seg99> <Seg2>", None, (2,)),
        ("<Seg2> <Seg0> <Seg1>", 2, (0, 2)),
        ("<Seg1", None, None),
        ("<Seg-1> <Seg 1> Seg1", None, None),
        ("<Seg3>", 1, None),
    ],
)
def test_locations_are_validated(
    said: str, count: int | None, expected: tuple[int, ...] | None
) -> None:
    """A place that does not exist, or comes twice, would break the article."""
    if expected is None:
        with pytest.raises(CompositionError, match="no section of 0 to 2"):
            parse_locations(said, 3, count)
    else:
        assert parse_locations(said, 3, count) == expected


def test_caption_ends_at_the_closing_quote() -> None:
    """What a model goes on to say would be searched for and shown as a caption."""
    document = Document("t", ("a", "b"))
    assert steps.caption(Script('two\n tigers" and "more'), document, 1) == "two tigers"
    with pytest.raises(CompositionError, match="gave none after section 1"):
        steps.caption(Script(' " x'), document, 1)
    with pytest.raises(CompositionError, match="no section 2; there are 0 to 1"):
        steps.caption(Script("x"), document, 2)


def test_only_the_first_characters_are_searched_for() -> None:
    """CLIP's text tower would cut a long caption wherever its context ends."""
    toy = Toy()
    steps.retrieve(toy, "a tiger " * 20, ())
    assert toy.asked[0][0] == ("a tiger " * 20)[:53]
    with pytest.raises(CompositionError, match="no picture is left"):
        steps.retrieve(toy, "snow", toy.index.names)


def test_choice_needs_logits_that_are_numbers() -> None:
    """A model gone wrong would pick the first picture as if it had chosen."""
    document = illustrated()
    assert steps.choose(Script(logits=[[1.0, 1.0]]), document, 0) == "tiger.png"
    with pytest.raises(CompositionError, match="expected 2 logits"):
        steps.choose(Script(logits=[[1.0, float("nan")]]), document, 0)
    with pytest.raises(CompositionError, match="expected 2 logits"):
        steps.choose(Script(logits=[[1.0]]), document, 0)
    alone = document.put(Illustration(1, "fruit", ("banana.png",)))
    lm = Script()
    assert steps.choose(lm, alone, 1) == "banana.png" and not lm.choices
    with pytest.raises(CompositionError, match="1 to 4 candidates, got 0"):
        steps.choose(lm, alone.put(Illustration(1, "fruit")), 1)


def test_edits_change_what_they_say() -> None:
    """An edit would touch other places, or the document that it was given."""
    document = illustrated()
    before = document.to_json()
    assert [i.after for i in document.delete(0).illustrations] == [2]
    assert document.replace(2, "violin.png").at(2).chosen == "violin.png"
    toy = Toy()
    added = edits.add(Script('a ripe banana"', logits=[[0, 9, 0, 0]]), toy, document, 1)
    assert [i.after for i in added.illustrations] == [0, 1, 2]
    assert added.at(1).chosen == added.at(1).candidates[1]
    assert toy.asked[-1][1] == {"tiger.png", "clock.png"}
    with pytest.raises(CompositionError, match="has an illustration already"):
        edits.add(Script(), toy, document, 0)
    # Its own picture may be taken again, the others' may not.
    again = edits.recaption(Script(logits=[[9, 0, 0, 0]]), toy, document, 0, "the tiger, awake")
    assert again.at(0).caption == "the tiger, awake" and again.at(0).chosen == "tiger.png"
    assert toy.asked[-1][1] == {"clock.png"}
    own = edits.recaption(Script('snow"', logits=[[9, 0, 0, 0]]), toy, document, 0)
    assert (own.at(0).caption, own.at(0).chosen) == ("snow", "snow.png")
    with pytest.raises(CompositionError, match="the caption after section 0 is empty"):
        edits.recaption(Script(), toy, document, 0, " ")
    assert document.to_json() == before


def test_count_of_pictures_changes() -> None:
    """More pictures would replace the ones that were liked; fewer would keep the wrong ones."""
    document = illustrated()
    lm = Script("0> <Seg1>", 'fruit"', logits=[[9, 0, 0, 0]])
    changed = edits.change_count(lm, Toy(), document, 2)
    assert [i.after for i in changed.illustrations] == [0, 1]
    assert changed.at(0) == document.at(0)
    assert edits.change_count(Script(), Toy(), document, 0).illustrations == ()
    with pytest.raises(CompositionError, match="count must be 0 to 3"):
        edits.change_count(Script(), Toy(), document, 4)


def test_own_text_and_places() -> None:
    """Who has an article, or knows where pictures go, would have to ask the model all the same."""
    lm = Script('snow"', logits=[[1, 0, 0, 0]])
    document = compose(lm, Toy(), "t", sections=["one", "two"], places=[1])
    assert document.at(1).chosen == "snow.png" and len(lm.calls) == 1
    with pytest.raises(CompositionError, match="wrote nothing"):
        compose(Script(" \n"), Toy(), "t")
    with pytest.raises(CompositionError, match="title is empty"):
        compose(Script(), Toy(), " ")
    with pytest.raises(ValueError, match="candidates must be 1 to 4, got 5"):
        Settings(candidates=5)
