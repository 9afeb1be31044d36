"""Training samples of the four tasks of composition, from documents that are right.

A sample is what :class:`mmkern.data.InterleavedCollator` takes: ``pieces`` (texts and pictures, in
order), ``answer`` and ``kind``. Prompts are those of :mod:`mmkern.compose.steps`, so a model is
asked in training what it will be asked in composing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from mmkern.compose.document import CompositionError, Document, Picture, Pieces, load_documents
from mmkern.compose.steps import (
    LETTERS,
    article_prompt,
    caption_prompt,
    choice_prompt,
    location_prompt,
)
from mmkern.data.epochs import EpochAware
from mmkern.data.images import open_image
from mmkern.data.randomness import Stream, sample_keys, uniform

__all__ = [
    "TASKS",
    "DocumentTasks",
    "article_task",
    "caption_task",
    "choice_task",
    "location_task",
]

TASKS = ("article", "locations", "captions", "choice")

Task = dict[str, Any]


def article_task(document: Document) -> Task:
    """Title -> article, a paragraph a line."""
    prompt, begin = article_prompt(document.title)
    return _task("article", prompt, begin + "\n".join(document.sections))


def location_task(document: Document) -> Task:
    """Article and number of pictures -> ``<Seg0> <Seg3>``.

    Raises:
        CompositionError: a document without illustrations.
    """
    places = [illustration.after for illustration in document.illustrations]
    if not places:
        raise CompositionError("location task: the document has no illustrations")
    prompt, _ = location_prompt(document.title, document.sections, len(places))
    return _task("locations", prompt, " ".join(f"<Seg{place}>" for place in places))


def caption_task(document: Document, after: int) -> Task:
    """Text up to a place and the captions before it -> "A picture of ...", in quotes.

    Raises:
        CompositionError: no illustration there, or one without a caption.
    """
    words = document.at(after).caption
    if not words:
        raise CompositionError(f"caption task: no caption after section {after}")
    prompt, begin = caption_prompt(document, after)
    return _task("captions", prompt, f'{begin} {words}"')


def choice_task(
    document: Document, after: int, others: Sequence[str], order: Sequence[int] | None = None
) -> Task:
    """Text and pictures up to a place, and options -> the letter of the picture that belongs there.

    Args:
        document: with a chosen picture after the section.
        after: the section.
        others: names of the pictures that are wrong.
        order: option k shows picture order[k] of [the right one, *others]; None keeps that order.

    Raises:
        CompositionError: no picture there, more options than letters, an order that is none, or the
            right picture among the others.
    """
    right = document.at(after).chosen
    if right is None or right in others:
        raise CompositionError(
            f"choice task: needs a right picture after section {after} and others that are wrong, "
            f"got {right!r} and {list(others)}"
        )
    options = [right, *others]
    order = range(len(options)) if order is None else order
    if sorted(order) != list(range(len(options))):
        raise CompositionError(
            f"choice task: order must be of {len(options)} options, got {list(order)}"
        )
    prompt, begin = choice_prompt(document, after, [options[place] for place in order])
    task = _task("choice", [*prompt, f"\n{begin}"], LETTERS[list(order).index(0)])
    return task


def _task(kind: str, prompt: Pieces, answer: str) -> Task:
    # The line feed that a language model's adapter puts between prompt and answer.
    ended = prompt if kind == "choice" else [*prompt, "\n"]
    return {"pieces": list(ended), "answer": answer, "kind": kind}


class DocumentTasks(EpochAware, Dataset[Task]):
    """All tasks that documents give, as a map-style data set; pictures are opened when asked for.

    A document gives an article, its locations, a caption and a choice for each illustration that
    has what they need. Wrong options of a choice, and the order of all, are drawn from (seed,
    epoch, index): the illustration's own candidates first, then any picture of the documents.

    Args:
        documents: right ones.
        pictures: folder of their pictures.
        tasks: of ``TASKS``.
        seed: of the draws.

    Raises:
        CompositionError: unknown tasks, or documents that give no sample.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        pictures: str | Path,
        *,
        tasks: Sequence[str] = TASKS,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not set(tasks) <= set(TASKS):
            raise CompositionError(f"tasks must be among {TASKS}, got {list(tasks)}")
        self.documents, self.folder, self.seed = tuple(documents), Path(pictures), seed
        self.names = sorted({name for document in documents for name in document.used()})
        self._rows = [
            (kind, number, after)
            for number, document in enumerate(documents)
            for kind in tasks
            for after in self._places(kind, document)
        ]
        if not self._rows:
            raise CompositionError(f"the documents give no sample of the tasks {list(tasks)}")

    @classmethod
    def from_jsonl(
        cls,
        path: str | Path,
        *,
        pictures: str | Path | None = None,
        tasks: Sequence[str] = TASKS,
        seed: int = 0,
    ) -> DocumentTasks:
        """Documents from a table, one a line; their pictures are beside it unless said otherwise.

        Raises:
            FileNotFoundError, CompositionError: see :func:`load_documents`.
        """
        folder = Path(path).parent if pictures is None else pictures
        return cls(load_documents(path), folder, tasks=tasks, seed=seed)

    def _places(self, kind: str, document: Document) -> list[int]:
        if kind == "article":
            return [-1]
        if kind == "locations":
            return [-1] if document.illustrations else []
        if kind == "captions":
            return [i.after for i in document.illustrations if i.caption]
        enough = len(self.names) > 1
        return [i.after for i in document.illustrations if i.chosen is not None and enough]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Task:
        count = len(self._rows)
        if not -count <= index < count:
            raise IndexError(f"DocumentTasks: index {index} of {count} samples")
        index %= count
        kind, number, after = self._rows[index]
        document = self.documents[number]
        if kind == "article":
            task = article_task(document)
        elif kind == "locations":
            task = location_task(document)
        elif kind == "captions":
            task = caption_task(document, after)
        else:
            task = self._choice(document, after, index)
        pieces = [self._open(piece) for piece in task["pieces"]]
        return {**task, "pieces": pieces, "index": index, "epoch": self.epoch}

    def _choice(self, document: Document, after: int, index: int) -> Task:
        own = document.at(after)
        draws = uniform(sample_keys(self.seed, self.epoch, [index]), 7, Stream.CHOICE)[0]
        wrong = len(LETTERS) - 1
        others = [name for name in own.candidates if name != own.chosen][:wrong]
        pool = [name for name in self.names if name not in (own.chosen, *others)]
        for draw in draws[: min(wrong - len(others), len(pool))].tolist():
            others.append(pool.pop(int(draw * len(pool))))
        order = draws[wrong : wrong + 1 + len(others)].argsort(kind="stable").tolist()
        return choice_task(document, after, others, order)

    def _open(self, piece: str | Picture) -> Any:
        return open_image(self.folder / piece.name) if isinstance(piece, Picture) else piece
