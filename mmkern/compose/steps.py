"""Composition in steps: article, places for pictures, captions, retrieval, choice.

The procedure is that of InternLM-XComposer (Zhang et al., arXiv 2309.15112, and its released code);
the words of the prompts are ours. Every step is a function of what it is given: a language model,
a retriever and a document. None changes its arguments.

Prompts begin with the text up to the place in question, and what is asked comes last. So the
prompts of one document share long beginnings, of which a language model that keeps its keys and
values computes the new part only.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from mmkern.compose.document import CompositionError, Document, Illustration, Picture, Pieces

__all__ = [
    "LETTERS",
    "LanguageModel",
    "Retriever",
    "Settings",
    "article",
    "caption",
    "choose",
    "compose",
    "illustrate",
    "locations",
    "parse_locations",
    "split_sections",
]

LETTERS = ("A", "B", "C", "D")
_LOCATION = re.compile(r"<Seg(\d+)>")


class LanguageModel(Protocol):
    """What composition needs of a language model."""

    def generate(
        self,
        prompt: Pieces,
        *,
        begin: str = "",
        stop: str | None = None,
        max_new_tokens: int,
        beams: int = 1,
        repetition_penalty: float = 1.0,
    ) -> str:
        """What the model says after the prompt and `begin`, its own first words.

        Without `begin`, and up to `stop` if it comes.
        """
        ...

    def letter_logits(
        self, prompt: Pieces, letters: Sequence[str], *, begin: str = ""
    ) -> Sequence[float]:
        """The logit of each letter as the next thing that is said, from one forward."""
        ...


class Retriever(Protocol):
    """What composition needs of a collection of pictures."""

    def search(self, text: str, k: int, exclude: Collection[str] = ()) -> Sequence[str]:
        """Names of the at most `k` pictures that fit a text best, best first.

        None of them is excluded, nor the copy of one that is, nor the copy of another found.
        """
        ...


@dataclass(frozen=True)
class Settings:
    """Limits of the steps; the defaults are those of the released code where it has one.

    Attributes:
        max_sections: an article's paragraphs beyond these are left out.
        article_tokens, location_tokens, caption_tokens: new tokens at most.
        article_penalty, caption_penalty: repetition penalties.
        location_beams: beams of the search for locations.
        query_characters: of a caption that go to retrieval.
        candidates: pictures to choose from, 1 to 4.
    """

    max_sections: int = 60
    article_tokens: int = 1024
    article_penalty: float = 1.1
    location_tokens: int = 300
    location_beams: int = 5
    caption_tokens: int = 100
    caption_penalty: float = 5.0
    query_characters: int = 53
    candidates: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.candidates <= len(LETTERS):
            raise ValueError(
                f"Settings: candidates must be 1 to {len(LETTERS)}, got {self.candidates}"
            )
        if self.max_sections < 1 or self.query_characters < 1:
            raise ValueError(
                "Settings: max_sections and query_characters must be at least 1, got "
                f"{self.max_sections} and {self.query_characters}"
            )


DEFAULT = Settings()


# Prompts: what is asked, and the first words of the answer. The data builders use them too.


def article_prompt(title: str) -> tuple[Pieces, str]:
    """For an article."""
    return [f'Write an article in several short paragraphs. Its title is "{title}".'], ""


def location_prompt(
    title: str, sections: Sequence[str], count: int | None = None
) -> tuple[Pieces, str]:
    """For the sections that pictures should follow."""
    number = "some of them" if count is None else str(count)
    lines = "\n".join(f"<Seg{i}> {section}" for i, section in enumerate(sections))
    asked = f"Which of these paragraphs should a picture follow? Name {number}."
    return [f"{title}\n{lines}\n{asked}"], "<Seg"


def caption_prompt(document: Document, after: int) -> tuple[Pieces, str]:
    """For a caption: the text up to the place, with the captions that there are before it."""
    lines = [document.title]
    captions = {i.after: i.caption for i in document.illustrations if i.after < after}
    for number, section in enumerate(document.sections[: after + 1]):
        lines.append(section)
        if captions.get(number):
            lines.append(f'[Picture: "{captions[number]}"]')
    last = document.sections[after]
    lines.append(f'Describe a picture for the last paragraph, "{last}", in a few words.')
    return ["\n".join(lines)], '"A picture of'


def choice_prompt(
    document: Document, after: int, candidates: Sequence[str]
) -> tuple[list[str | Picture], str]:
    """For a choice: text and chosen pictures up to the place, then a letter for each candidate.

    Raises:
        CompositionError: no candidates, or more than letters.
    """
    if not 1 <= len(candidates) <= len(LETTERS):
        raise CompositionError(
            f"choice: needs 1 to {len(LETTERS)} candidates, got {len(candidates)}"
        )
    pieces: list[str | Picture] = [f"{document.title}\n"]
    chosen = {i.after: i.chosen for i in document.illustrations if i.after < after}
    for number, section in enumerate(document.sections[: after + 1]):
        pieces.append(f"{section}\n")
        name = chosen.get(number)
        if name is not None:
            pieces += [Picture(name), "\n"]
    wanted = document.at(after).caption
    pieces.append(f'Which picture fits here and shows "{wanted}"?')
    for letter, name in zip(LETTERS, candidates, strict=False):
        pieces += [f"\n{letter}: ", Picture(name)]
    return pieces, "Answer:"


# Steps


def article(lm: LanguageModel, title: str, settings: Settings = DEFAULT) -> tuple[str, ...]:
    """Step 1, the sections of an article with this title.

    Raises:
        CompositionError: an empty title, or the model said nothing.
    """
    if not title.strip():
        raise CompositionError("article: the title is empty")
    prompt, begin = article_prompt(title)
    text = lm.generate(
        prompt,
        begin=begin,
        max_new_tokens=settings.article_tokens,
        repetition_penalty=settings.article_penalty,
    )
    sections = split_sections(text, settings.max_sections)
    if not sections:
        raise CompositionError("article: the language model wrote nothing")
    return sections


def split_sections(text: str, most: int = DEFAULT.max_sections) -> tuple[str, ...]:
    """The lines of a text that are not blank, without spaces around them, at most so many."""
    lines = (line.strip() for line in text.splitlines())
    return tuple([line for line in lines if line][:most])


def locations(
    lm: LanguageModel,
    title: str,
    sections: Sequence[str],
    count: int | None = None,
    settings: Settings = DEFAULT,
) -> tuple[int, ...]:
    """Step 2, the sections that a picture should follow; errors as :func:`parse_locations`."""
    _check_count(count, sections)
    if count == 0:
        return ()
    prompt, begin = location_prompt(title, sections, count)
    said = begin + lm.generate(
        prompt,
        begin=begin,
        max_new_tokens=settings.location_tokens,
        beams=settings.location_beams,
    )
    return parse_locations(said, len(sections), count)


def parse_locations(said: str, sections: int, count: int | None = None) -> tuple[int, ...]:
    """The sections that a text names as ``<Seg3>``, ascending.

    A section counts once; those that do not exist are left out; of more than `count` the first
    named are taken. Fewer than `count` are what they are: the caller sees how many came.

    Raises:
        CompositionError: none is left.
    """
    named = dict.fromkeys(int(number) for number in _LOCATION.findall(said))
    valid = [number for number in named if number < sections][:count]
    if not valid:
        raise CompositionError(
            f"locations: the language model named no section of 0 to {sections - 1}: {said[:80]!r}"
        )
    return tuple(sorted(valid))


def caption(lm: LanguageModel, document: Document, after: int, settings: Settings = DEFAULT) -> str:
    """Step 3, what the picture after a section should show; ends at the closing quote.

    Raises:
        CompositionError: the model said nothing before the quote, or there is no such section.
    """
    _check_place(document, after)
    prompt, begin = caption_prompt(document, after)
    said = lm.generate(
        prompt,
        begin=begin,
        stop='"',
        max_new_tokens=settings.caption_tokens,
        repetition_penalty=settings.caption_penalty,
    )
    words = " ".join(said.partition('"')[0].split())
    if not words:
        raise CompositionError(f"caption: the language model gave none after section {after}")
    return words


def retrieve(
    retriever: Retriever, text: str, exclude: Collection[str], settings: Settings = DEFAULT
) -> tuple[str, ...]:
    """Step 4, candidates for a caption; none of `exclude`.

    Raises:
        CompositionError: no picture is left.
    """
    found = retriever.search(text[: settings.query_characters], settings.candidates, exclude)
    if not found:
        raise CompositionError(f"retrieval: no picture is left for {text!r}")
    return tuple(found)


def choose(lm: LanguageModel, document: Document, after: int) -> str:
    """Step 5, the candidate whose letter the model finds likeliest; of equals the first.

    The model sees the text up to the place with the pictures that were chosen before it. A lone
    candidate needs no choice.

    Raises:
        CompositionError: no illustration there, or no candidates; logits of which one is NaN.
    """
    candidates = document.at(after).candidates
    prompt, begin = choice_prompt(document, after, candidates)
    if len(candidates) == 1:
        return candidates[0]
    logits = list(lm.letter_logits(prompt, LETTERS[: len(candidates)], begin=begin))
    if len(logits) != len(candidates) or any(value != value for value in logits):
        raise CompositionError(
            f"choice: expected {len(candidates)} logits, got {logits} after section {after}"
        )
    return candidates[max(range(len(logits)), key=logits.__getitem__)]


def compose(
    lm: LanguageModel,
    retriever: Retriever,
    title: str,
    *,
    count: int | None = None,
    sections: Sequence[str] | None = None,
    places: Sequence[int] | None = None,
    settings: Settings = DEFAULT,
    progress: Callable[[str], None] = lambda line: None,
) -> Document:
    """All steps.

    Args:
        lm, retriever: see the protocols.
        title: of the article.
        count: pictures wanted; None leaves it to the model.
        sections: an article to illustrate; None has it written.
        places: sections to illustrate, by index; None asks the model.
        settings: limits.
        progress: called with a line of text before each step.

    Raises:
        CompositionError: a step that failed; see each.
    """
    if sections is None:
        progress("article")
        sections = article(lm, title, settings)
    document = Document(title, tuple(sections))
    if places is None:
        progress("locations")
        places = locations(lm, title, document.sections, count, settings)
    for after in sorted(set(places)):
        progress(f"caption after section {after}")
        document = document.put(Illustration(after, caption(lm, document, after, settings)))
    for after in sorted(set(places)):
        progress(f"picture after section {after}")
        document = illustrate(lm, retriever, document, after, settings)
    return document


def illustrate(
    lm: LanguageModel,
    retriever: Retriever,
    document: Document,
    after: int,
    settings: Settings = DEFAULT,
) -> Document:
    """Steps 4 and 5 for one illustration that has a caption; other pictures are not offered."""
    own = document.at(after)
    others = {i.chosen for i in document.illustrations if i is not own and i.chosen is not None}
    found = retrieve(retriever, own.caption, others, settings)
    document = document.put(dataclasses.replace(own, candidates=found, chosen=None))
    return document.replace(after, choose(lm, document, after))


def _check_count(count: int | None, sections: Sequence[str]) -> None:
    if count is not None and not 0 <= count <= len(sections):
        raise CompositionError(
            f"locations: count must be 0 to {len(sections)}, the number of sections, got {count}"
        )


def _check_place(document: Document, after: int) -> None:
    if not 0 <= after < len(document.sections):
        raise CompositionError(
            f"there is no section {after}; there are 0 to {len(document.sections) - 1}"
        )
