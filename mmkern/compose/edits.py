"""Edits of a document that need the models: one more picture, another caption, another count.

Those that need none are methods of :class:`~mmkern.compose.document.Document`. All return a new
document; illustrations that an edit does not name stay as they are.
"""

from __future__ import annotations

import dataclasses

from mmkern.compose.document import CompositionError, Document, Illustration
from mmkern.compose.steps import (
    DEFAULT,
    LanguageModel,
    Retriever,
    Settings,
    caption,
    illustrate,
    locations,
)

__all__ = ["add", "change_count", "recaption"]


def add(
    lm: LanguageModel,
    retriever: Retriever,
    document: Document,
    after: int,
    settings: Settings = DEFAULT,
) -> Document:
    """With one more illustration, whose caption and picture the model chooses.

    Raises:
        CompositionError: there is one already, or no such section.
    """
    if any(i.after == after for i in document.illustrations):
        raise CompositionError(f"add: section {after} has an illustration already")
    words = caption(lm, document, after, settings)
    return illustrate(lm, retriever, document.put(Illustration(after, words)), after, settings)


def recaption(
    lm: LanguageModel,
    retriever: Retriever,
    document: Document,
    after: int,
    words: str | None = None,
    settings: Settings = DEFAULT,
) -> Document:
    """With another caption after a section, given or the model's, and a picture chosen for it."""
    old = document.at(after)
    if words is None:
        words = caption(lm, document.delete(after), after, settings)
    elif not words.strip():
        raise CompositionError(f"recaption: the caption after section {after} is empty")
    changed = document.put(dataclasses.replace(old, caption=" ".join(words.split())))
    return illustrate(lm, retriever, changed, after, settings)


def change_count(
    lm: LanguageModel,
    retriever: Retriever,
    document: Document,
    count: int,
    settings: Settings = DEFAULT,
) -> Document:
    """With `count` illustrations: the model names the places anew; what stands there stays.

    Fewer if the model names fewer places.

    Raises:
        CompositionError: more illustrations than sections; see :func:`parse_locations`.
    """
    places = locations(lm, document.title, document.sections, count, settings)
    for illustration in document.illustrations:
        if illustration.after not in places:
            document = document.delete(illustration.after)
    present = {illustration.after for illustration in document.illustrations}
    for after in places:
        if after not in present:
            document = add(lm, retriever, document, after, settings)
    return document
