"""Instruction data from captions and boxes, written by a language model that sees no picture.

Liu et al., "Visual Instruction Tuning" (arXiv 2304.08485, section 3): a text-only model is given a
picture as text, its captions and, for details and reasoning, its boxes, with a few examples, and
writes one of three kinds: a *conversation* of several rounds, a *detailed description*, *complex
reasoning*. The instructions here are our own words. What comes back is parsed and checked; what
fails is asked again, then counted by its reason, never kept.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from mmkern.data.conversations import TAG, Turn
from mmkern.data.randomness import Stream, sample_keys, uniform

__all__ = [
    "KINDS",
    "Box",
    "ChatModel",
    "Generated",
    "LanguageModel",
    "Picture",
    "ask",
    "check",
    "describe",
    "generate",
    "parse",
]

Kind = Literal["conversation", "detail", "reasoning"]
Message = dict[str, str]
KINDS: tuple[Kind, ...] = ("conversation", "detail", "reasoning")


class LanguageModel(Protocol):
    """Anything that answers a chat; ``attempt`` counts from 0, so that a second try can differ."""

    def __call__(self, messages: Sequence[Message], attempt: int, /) -> str:
        """What it says to messages of ``role`` (system, user, assistant) and ``content``."""


@dataclass(frozen=True)
class Box:
    """A thing and where it is: x from the left, y from the top, as shares of the picture.

    Raises:
        ValueError: no name, corners outside 0..1 or in the wrong order.
    """

    name: str
    x1: float
    y1: float
    x2: float
    y2: float

    def __post_init__(self) -> None:
        fits = 0 <= self.x1 <= self.x2 <= 1 and 0 <= self.y1 <= self.y2 <= 1
        if not self.name.strip() or not fits:
            raise ValueError(
                "Box: needs a name and 0 <= x1 <= x2 <= 1, 0 <= y1 <= y2 <= 1, got "
                f"{self.name!r}, {(self.x1, self.y1, self.x2, self.y2)}"
            )


@dataclass(frozen=True)
class Picture:
    """What is known of a picture: an id, its file for the data set, captions, boxes.

    Raises:
        ValueError: no caption.
    """

    id: str
    image: str
    captions: tuple[str, ...]
    boxes: tuple[Box, ...] = ()

    def __post_init__(self) -> None:
        if not self.captions or not all(caption.strip() for caption in self.captions):
            raise ValueError(f"Picture {self.id!r}: needs captions that are not empty")


_SYSTEM: dict[Kind, str] = {
    "conversation": (
        "You look at one picture, which is given to you as sentences. Write a conversation between "
        "somebody who asks about the picture and you, who sees it. Ask about what the things are, "
        "how many there are, what they do, where they are and how they relate, but only what has a "
        "sure answer. Then ask one question that needs some background about what is seen. Write "
        "every round as two lines, 'Question: ...' and 'Answer: ...'. Never mention the sentences."
    ),
    "detail": (
        "You look at one picture, which is given to you as sentences and as things with their "
        "places (left, top, right, bottom, from 0 to 1). Describe it in detail, as somebody who "
        "sees it: how many of each thing, where they are, how they relate. Do not give numbers of "
        "places, and never mention the sentences or the list. Write the description only."
    ),
    "reasoning": (
        "You look at one picture, which is given to you as sentences and as things with their "
        "places (left, top, right, bottom, from 0 to 1). Write one question about it that takes "
        "thinking, such as why something happens or what should be done, and that cannot be "
        "answered by naming a thing. Answer it step by step from what is seen. Write two parts, "
        "'Question: ...' and 'Answer: ...'. Never mention the sentences, the list or its numbers."
    ),
}

DETAIL_QUESTIONS = (
    "Describe the picture in detail.",
    "What can be seen in this picture? Tell everything.",
    "Give a full description of what is shown.",
    "Explain carefully what this picture shows.",
    "Walk me through the picture from one side to the other.",
    "Write a thorough account of the picture.",
    "Please describe everything that you see here.",
    "How would you describe this picture to somebody who cannot see it?",
)

# An answer that speaks of its sources was not given by somebody who sees a picture.
_LEAKS = re.compile(
    r"\b(?:captions?|bounding box(?:es)?|the (?:given |provided )?(?:sentences|list of things))\b"
    r"|\b0\.\d+\s*,\s*0\.\d+",
    re.IGNORECASE,
)
_MARK = re.compile(r"^\s*\W*(question|answer)\W*?:[ \t*]*", re.IGNORECASE | re.MULTILINE)
LEAST_WORDS: dict[Kind, int] = {"conversation": 1, "detail": 20, "reasoning": 15}
LEAST_ROUNDS, MOST_ROUNDS = 2, 10


def describe(picture: Picture, kind: Kind) -> str:
    """A picture as text: captions, and but for conversations its boxes."""
    lines = list(picture.captions)
    if kind != "conversation":
        lines += [
            f"{box.name}: [{box.x1:.3f}, {box.y1:.3f}, {box.x2:.3f}, {box.y2:.3f}]"
            for box in picture.boxes
        ]
    return "\n".join(lines)


def ask(
    picture: Picture, kind: Kind, examples: Sequence[tuple[Picture, str]] = ()
) -> list[Message]:
    """The messages that ask for one kind: instructions, examples, the picture.

    Args:
        picture: what to write about.
        kind: of :data:`KINDS`.
        examples: pictures with answers as they should be (two or three).

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in _SYSTEM:
        raise ValueError(f"ask: kind must be one of {KINDS}, got {kind!r}")
    messages = [{"role": "system", "content": _SYSTEM[kind]}]
    for shown, answer in examples:
        messages.append({"role": "user", "content": describe(shown, kind)})
        messages.append({"role": "assistant", "content": answer})
    return [*messages, {"role": "user", "content": describe(picture, kind)}]


def parse(said: str, kind: Kind, question: str = "") -> list[Turn]:
    """Rounds of what a model said.

    Args:
        said: its words.
        kind: a description is the answer to ``question``; the others bring their questions,
            "Question: ..." and "Answer: ..." in turn, anything before the first being left out.

    Raises:
        ValueError: marks that do not alternate, or none.
    """
    if kind == "detail":
        return [Turn(question, said.strip())]
    marks = list(_MARK.finditer(said))
    names = [mark[1].lower() for mark in marks]
    if not names or names != ["question", "answer"] * (len(names) // 2):
        raise ValueError(f"questions and answers do not alternate: {names}")
    ends = [mark.start() for mark in marks[1:]] + [len(said)]
    texts = [said[mark.end() : end].strip(" \n\t*=") for mark, end in zip(marks, ends, strict=True)]
    return [Turn(*pair) for pair in zip(texts[::2], texts[1::2], strict=True)]


def check(turns: Sequence[Turn], kind: Kind) -> str:
    """Why rounds cannot be kept, in a few words; "" if they can."""
    least, most = (LEAST_ROUNDS, MOST_ROUNDS) if kind == "conversation" else (1, 1)
    if not least <= len(turns) <= most:
        return "number of rounds"
    for turn in turns:
        if not turn.question or not turn.answer:
            return "empty turn"
        if len(turn.answer.split()) < LEAST_WORDS[kind]:
            return "short answer"
        if _LEAKS.search(turn.question) or _LEAKS.search(turn.answer):
            return "speaks of its sources"
        if TAG in turn.question or TAG in turn.answer:
            return "picture tag"
    if len({turn.question.lower() for turn in turns}) < len(turns):
        return "question twice"
    return ""


@dataclass
class Generated:
    """Rows of LLaVA's JSON, and what became of each picture.

    Attributes:
        rows: for ``ConversationDataset.from_json``, by ``json.dump``.
        counts: ``asked`` pictures, ``calls`` of the model, ``kept``, and ``dropped``.
        reasons: why calls were not kept.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)


def generate(
    pictures: Sequence[Picture],
    kind: Kind,
    model: LanguageModel,
    *,
    examples: Sequence[tuple[Picture, str]] = (),
    attempts: int = 2,
    seed: int = 0,
) -> Generated:
    """Have a model write about pictures.

    Args:
        pictures: their ids must differ.
        kind, examples: as :func:`ask` takes them.
        model: the writer.
        attempts: calls a picture at most.
        seed: of the choice of questions for descriptions, with the picture's place.

    Raises:
        ValueError: an unknown kind, no attempts, an id that comes twice.
    """
    twice = [name for name, n in Counter(picture.id for picture in pictures).items() if n > 1]
    if twice or attempts < 1:
        raise ValueError(
            f"generate: needs ids that differ and attempts >= 1, got {twice[:3]} twice and "
            f"{attempts}"
        )
    made = Generated()
    for index, picture in enumerate(pictures):
        messages = ask(picture, kind, examples)
        draw = uniform(sample_keys(seed, 0, [index]), 1, Stream.TEMPLATE)[0, 0]
        question = DETAIL_QUESTIONS[int(draw * len(DETAIL_QUESTIONS))]
        made.counts["asked"] += 1
        turns = _attempt(messages, kind, model, attempts, question, made)
        made.counts["kept" if turns else "dropped"] += 1
        if turns:
            made.rows.append(_row(picture, kind, turns))
    return made


def _attempt(
    messages: Sequence[Message],
    kind: Kind,
    model: LanguageModel,
    attempts: int,
    question: str,
    made: Generated,
) -> list[Turn]:
    """Rounds that can be kept, or none."""
    for attempt in range(attempts):
        made.counts["calls"] += 1
        said = model(messages, attempt)
        try:
            turns = parse(said, kind, question)
        except ValueError:
            made.reasons["not as asked"] += 1
            continue
        if not (problem := check(turns, kind)):
            return turns
        made.reasons[problem] += 1
    return []


def _row(picture: Picture, kind: Kind, turns: Sequence[Turn]) -> dict[str, Any]:
    conversations = []
    for number, turn in enumerate(turns):
        question = turn.question if number else f"{TAG}\n{turn.question}"
        conversations.append({"from": "human", "value": question})
        conversations.append({"from": "gpt", "value": turn.answer})
    return {
        "id": f"{picture.id}-{kind}",
        "image": picture.image,
        "conversations": conversations,
    }


class ChatModel:
    """A causal language model of transformers with a chat template, such as SmolLM2.

    The first attempt is greedy, later ones are sampled from a seed of their own.

    Args:
        model, tokenizer: of transformers.
        max_new_tokens: of an answer.
    """

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int = 300) -> None:
        self.model, self.tokenizer, self.max_new_tokens = model.eval(), tokenizer, max_new_tokens

    def __call__(self, messages: Sequence[Message], attempt: int) -> str:
        import torch

        prompt = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(attempt)
            ids = self.model.generate(
                **prompt,
                max_new_tokens=self.max_new_tokens,
                do_sample=attempt > 0,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        said: str = self.tokenizer.decode(
            ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return said
