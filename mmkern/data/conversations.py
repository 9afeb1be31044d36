"""Conversations about pictures: LLaVA's templates, its JSON, and batches of them.

A conversation is rounds of a question and an answer. A template makes a text of each round; only
answers and what ends them are trained on. What they are is decided by character offsets in one
tokenisation of a round's text, so that decoded labels are the answers whatever the tokenizer
merges. Rounds are tokenised apart, as are the texts on either side of a picture: that is where the
end of a sequence and the picture stand. (The authors tokenise each round again to count its tokens
and ignore the whole conversation where the counts disagree.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mmkern.data.epochs import EpochAware
from mmkern.data.images import ImageError, open_image
from mmkern.data.pairs import OnError, PairError, existing_table, json_lines, usable_rows
from mmkern.data.randomness import Stream, sample_keys, uniform
from mmkern.data.strings import Strings

__all__ = [
    "CONVERSATIONS",
    "Conversation",
    "ConversationDataset",
    "Template",
    "Turn",
    "read_turns",
]

TAG = "<image>"
_REPLACEMENTS = 16


class Turn(NamedTuple):
    """One round: a question without its picture tags, the answer, pictures before the question."""

    question: str
    answer: str
    images: int = 0


class Conversation(TypedDict):
    """A sample: rounds, and their pictures in order; see ``Question`` for index and epoch."""

    images: list[Image.Image | Tensor]
    turns: list[Turn]
    index: int
    epoch: int


@dataclass(frozen=True)
class Template:
    """How rounds become texts.

    Attributes:
        first, later: what stands before the answer of the first round and of others; "{}" is the
            question with its pictures.
        after: text behind an answer, trained on.
        eos: whether the end-of-sequence id follows an answer.
        bos_each: whether every round begins with the beginning-of-sequence id, not only the first.
        asks: whether questions are written at all; without, only their pictures are.
    """

    first: str
    later: str = ""
    after: str = ""
    eos: bool = True
    bos_each: bool = False
    asks: bool = True

    def round(self, number: int, turn: Turn, *, answer: bool = True) -> tuple[list[str], str, str]:
        """A round as (texts that end in a picture each, the prompt's rest, the answer).

        The answer comes with what separates it from the prompt, and with ``after``.
        """
        before, _, rest = (self.later if number and self.later else self.first).partition("{}")
        texts = []
        for _ in range(turn.images):
            texts.append(before)
            before = "\n" if self.asks else ""
        prompt = before + (turn.question + rest if self.asks else "")
        if not answer:
            return texts, prompt, ""
        said = turn.answer + self.after
        space = " " if prompt and turn.answer and not prompt[-1].isspace() else ""
        return texts, prompt, space + said


# The authors' names and words.
CONVERSATIONS: dict[str, Template] = {
    "v1": Template(
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: {} ASSISTANT:",
        "USER: {} ASSISTANT:",
    ),
    "llama_2": Template(
        "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to "
        "understand the visual content that the user provides, and assist the user with a variety "
        "of tasks using natural language.\n<</SYS>>\n\n{} [/INST]",
        "[INST] {} [/INST]",
        after=" ",
        bos_each=True,
    ),
    # v1 without its first words: ours, for small models and short runs.
    "bare": Template("USER: {} ASSISTANT:"),
    # Stage 1: a picture and its caption.
    "plain": Template("{}", after="\n", eos=False, asks=False),
}


def read_turns(conversations: Any) -> list[Turn]:
    """Rounds of LLaVA's ``[{"from": "human" | "gpt", "value": text}, ...]``.

    Picture tags of a question are counted and stand before it, wherever they were. An answer
    before the first question is left out, as the authors do.

    Raises:
        ValueError: turns that do not alternate or are no texts.
    """
    if not isinstance(conversations, list) or not all(isinstance(t, dict) for t in conversations):
        raise ValueError(f"'conversations' must be a list of turns, got {conversations!r:.80}")
    answer_first = bool(conversations) and conversations[0].get("from") == "gpt"
    turns = conversations[1:] if answer_first else conversations
    if not turns or len(turns) % 2:
        raise ValueError(f"'conversations' must be pairs of turns, got {len(turns)}")
    rounds = []
    for asked, replied in zip(turns[::2], turns[1::2], strict=True):
        if (asked.get("from"), replied.get("from")) != ("human", "gpt"):
            raise ValueError("'conversations' must alternate human and gpt")
        question, answer = asked.get("value"), replied.get("value")
        if not isinstance(question, str) or not isinstance(answer, str):
            raise ValueError(f"a turn's value must be text, got {question!r} and {answer!r}")
        text = question.replace(TAG, "").strip()
        rounds.append(Turn(text, answer.strip(), question.count(TAG)))
    return rounds


class ConversationDataset(EpochAware, Dataset[Conversation]):
    """Map-style data set of conversations: ``ds[i]`` is a :class:`Conversation`.

    Built by :meth:`from_json`. ``on_error`` and ``seed`` as :class:`mmkern.data.PairDataset` takes
    them.

    Attributes:
        dropped: unusable rows of the file (``on_error="skip"`` only).
    """

    def __init__(
        self, rows: Sequence[tuple[list[str], list[Turn]]], *, on_error: OnError, seed: int
    ) -> None:
        super().__init__()
        if on_error not in ("raise", "skip"):
            raise ValueError(
                f"ConversationDataset: on_error must be 'raise' or 'skip', got {on_error!r}"
            )
        self.on_error: OnError = on_error
        self.seed, self.dropped = seed, 0
        self._rows = Strings([json.dumps(row) for row in rows])
        self._words = np.array(
            [sum(len(f"{t.question} {t.answer}".split()) for t in turns) for _, turns in rows]
        )
        self._images = np.array([len(images) for images, _ in rows])

    @classmethod
    def from_json(
        cls,
        path: str | os.PathLike[str],
        *,
        root: str | os.PathLike[str] | None = None,
        on_error: OnError = "raise",
        seed: int = 0,
        check_files: bool = True,
    ) -> ConversationDataset:
        """Read LLaVA's JSON: a list, or with the ending ``.jsonl`` one object a line.

        Each is ``{"image": path or list of paths (optional), "conversations": [...]}``; see
        :func:`read_turns`. A picture without a tag, and a tag without a picture, are bad rows.

        Args:
            path: the file.
            root, on_error, seed, check_files: as ``PairDataset.from_csv`` takes them.

        Raises:
            MissingPairsError: there is no such file.
            PairError: not JSON; bad rows.
        """
        table = existing_table(path)
        folder = Path(root) if root is not None else table.parent
        rows: list[tuple[list[str], list[Turn]]] = []

        def usable() -> Iterator[tuple[tuple[str, ...], str]]:
            for where, fields, problem in _objects(table):
                if not problem:
                    images, turns, problem = _checked(where, fields, folder, check_files)
                if not problem:
                    rows.append((images, turns))
                yield (), problem

        # Files were looked for above: a row may have none.
        _, dropped = usable_rows(usable(), table, folder, on_error, False)
        data = cls(rows, on_error=on_error, seed=seed)
        data.dropped = dropped
        return data

    def __len__(self) -> int:
        return len(self._rows)

    def lengths(self, image_tokens: int) -> NDArray[np.int64]:
        """About how many tokens each conversation has: words, and pictures' tokens."""
        lengths: NDArray[np.int64] = self._words + image_tokens * self._images
        return lengths

    @property
    def pictured(self) -> NDArray[np.bool_]:
        """Which conversations have a picture."""
        pictured: NDArray[np.bool_] = self._images > 0
        return pictured

    def __getitem__(self, index: int) -> Conversation:
        """Conversation ``index``; errors as ``PairDataset`` raises them."""
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"ConversationDataset: index {index} of {count} conversations")
        index %= count
        epoch = self.epoch
        try:
            images, turns = self._open(index)
        except ImageError as error:
            if self.on_error == "raise":
                raise
            self._count_skipped(error)
            images, turns = self._replacement(index, epoch, error)
        return {"images": images, "turns": turns, "index": index, "epoch": epoch}

    def _open(self, row: int) -> tuple[list[Any], list[Turn]]:
        paths, turns = json.loads(self._rows[row])
        return [open_image(path) for path in paths], [Turn(*turn) for turn in turns]

    def _replacement(
        self, index: int, epoch: int, error: ImageError
    ) -> tuple[list[Any], list[Turn]]:
        draws = uniform(sample_keys(self.seed, epoch, [index]), _REPLACEMENTS, Stream.REPLACEMENT)[
            0
        ]
        for candidate in (draws * len(self)).astype(int).tolist():
            try:
                return self._open(candidate)
            except ImageError:
                continue
        raise PairError(
            f"ConversationDataset: {error}; {_REPLACEMENTS} others drawn in its place are broken "
            "too"
        ) from error


def _objects(table: Path) -> Iterator[tuple[str, Any, str]]:
    """(where, fields, what is wrong) of each conversation of a file."""
    if table.suffix == ".jsonl":
        yield from json_lines(table)
        return
    try:
        found = json.loads(table.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise PairError(f"{table}: {error}") from error
    if not isinstance(found, list):
        raise PairError(f"{table}: a list of conversations expected, got {type(found).__name__}")
    for number, fields in enumerate(found):
        problem = "" if isinstance(fields, dict) else f"row {number}: a JSON object expected"
        yield f"row {number}", fields, problem


def _checked(
    where: str, fields: Mapping[str, Any], root: Path, check_files: bool
) -> tuple[list[str], list[Turn], str]:
    """Whole paths, rounds, what is wrong."""
    given = fields.get("image")
    names = [] if given is None else given if isinstance(given, list) else [given]
    if not all(isinstance(name, str) and name for name in names):
        return [], [], f"{where}: 'image' must be a path or a list of paths, got {given!r}"
    try:
        turns = read_turns(fields.get("conversations"))
    except ValueError as error:
        return [], [], f"{where}: {error}"
    tags = sum(turn.images for turn in turns)
    if tags != len(names):
        return [], [], f"{where}: {tags} {TAG} tags for {len(names)} pictures"
    paths = [os.path.join(root, name) for name in names]
    missing = [path for path in paths if check_files and not os.path.isfile(path)]
    return paths, turns, f"{where}: no such file: {missing[0]}" if missing else ""
