"""An article with pictures: sections of text, and illustrations that stand behind some of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

__all__ = [
    "CompositionError",
    "Document",
    "Illustration",
    "Picture",
    "Pieces",
    "load_documents",
]

FORMAT = 1


class CompositionError(ValueError):
    """A document, an answer of a language model or an index that cannot be used."""


@dataclass(frozen=True)
class Picture:
    """A picture by its name: a path below the folder of pictures, with "/" between its parts."""

    name: str


#: What a language model reads: texts and pictures, in order.
Pieces: TypeAlias = "Sequence[str | Picture]"


@dataclass(frozen=True)
class Illustration:
    """A place for a picture and, in the end, the picture.

    Attributes:
        after: index of the section that it stands behind.
        caption: what it should show; "" before there is one.
        candidates: names of the pictures that retrieval offered, best first.
        chosen: the one that was taken, None before the choice.
    """

    after: int
    caption: str = ""
    candidates: tuple[str, ...] = ()
    chosen: str | None = None


@dataclass(frozen=True)
class Document:
    """An article. Nothing here changes a document: every edit returns a new one.

    Attributes:
        title: of the article.
        sections: its paragraphs, none of them empty.
        illustrations: at most one a section, in the order of their sections.

    Raises:
        CompositionError: no section or an empty one; illustrations out of range, out of order, two
            behind one section, or a picture that is used twice.
    """

    title: str
    sections: tuple[str, ...]
    illustrations: tuple[Illustration, ...] = ()

    def __post_init__(self) -> None:
        if not self.sections or not all(section.strip() for section in self.sections):
            raise CompositionError("document: needs sections, none of them empty")
        places = [illustration.after for illustration in self.illustrations]
        for place in places:
            if not 0 <= place < len(self.sections):
                raise CompositionError(
                    f"document: an illustration is after section {place}, there are sections 0 to "
                    f"{len(self.sections) - 1}"
                )
        if places != sorted(set(places)):
            raise CompositionError(
                f"document: illustrations must be after different sections, in order, got {places}"
            )
        used = self.used()
        if len(set(used)) < len(used):
            raise CompositionError(f"document: a picture is used twice: {sorted(used)}")

    def used(self) -> tuple[str, ...]:
        """Names of the pictures that were chosen."""
        return tuple(i.chosen for i in self.illustrations if i.chosen is not None)

    def at(self, after: int) -> Illustration:
        """The illustration after a section.

        Raises:
            CompositionError: there is none.
        """
        for illustration in self.illustrations:
            if illustration.after == after:
                return illustration
        raise CompositionError(
            f"document: no illustration after section {after}; there are some after "
            f"{[i.after for i in self.illustrations]}"
        )

    def put(self, illustration: Illustration) -> Document:
        """With this illustration, in the place of the one that may be after its section."""
        others = [i for i in self.illustrations if i.after != illustration.after]
        ordered = sorted([*others, illustration], key=lambda i: i.after)
        return dataclasses.replace(self, illustrations=tuple(ordered))

    def delete(self, after: int) -> Document:
        """Without the illustration after a section; the others stay as they are."""
        gone = self.at(after)
        left = tuple(i for i in self.illustrations if i is not gone)
        return dataclasses.replace(self, illustrations=left)

    def replace(self, after: int, chosen: str) -> Document:
        """With another picture after a section, one of its candidates or any other."""
        return self.put(dataclasses.replace(self.at(after), chosen=chosen))

    def to_json(self) -> str:
        """The document as JSON; :meth:`from_json` gives it back."""
        fields = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Document:
        """The document of :meth:`to_json`.

        Raises:
            CompositionError: not JSON, another format, missing, unknown or misshapen fields.
        """
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise CompositionError(f"document: not JSON: {error}") from error
        return cls.from_fields(fields)

    @classmethod
    def from_fields(cls, fields: Any) -> Document:
        """From the mapping that :meth:`to_json` writes; errors as there."""
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            got = fields.get("format") if isinstance(fields, dict) else type(fields).__name__
            raise CompositionError(f"document: expected format {FORMAT}, got {got!r}")
        _check(fields, {"format": int, "title": str, "sections": list, "illustrations": list})
        for section in fields["sections"]:
            if not isinstance(section, str):
                raise CompositionError(f"document: a section must be text, got {section!r}")
        kinds = {"after": int, "caption": str, "candidates": list, "chosen": str | None}
        illustrations = []
        for entry in fields["illustrations"]:
            if not isinstance(entry, dict):
                raise CompositionError(f"document: an illustration must be a mapping, got {entry}")
            _check(entry, kinds)
            if not all(isinstance(name, str) for name in entry["candidates"]):
                raise CompositionError(f"document: candidates must be names, got {entry}")
            illustrations.append(
                Illustration(**{**entry, "candidates": tuple(entry["candidates"])})
            )
        return cls(fields["title"], tuple(fields["sections"]), tuple(illustrations))


def _check(fields: dict[str, Any], kinds: dict[str, Any]) -> None:
    if fields.keys() != kinds.keys():
        raise CompositionError(f"document: expected {sorted(kinds)}, got {sorted(fields)}")
    for name, kind in kinds.items():
        value = fields[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CompositionError(f"document: {name} has the wrong type, got {value!r}")


def load_documents(path: str | Path) -> list[Document]:
    """Documents from a table with one a line, in the form of :meth:`Document.to_json`.

    Raises:
        FileNotFoundError: there is no such table.
        CompositionError: a line that is no document, naming it; no documents.
    """
    documents = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                documents.append(Document.from_json(line))
            except CompositionError as error:
                raise CompositionError(f"{path}: line {number}: {error}") from error
    if not documents:
        raise CompositionError(f"{path}: no documents in it")
    return documents
