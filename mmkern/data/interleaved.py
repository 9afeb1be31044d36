"""Texts with pictures in any places, as batches: InternLM-XComposer's and XComposer2's.

A sample has ``pieces``, texts and pictures in order, and an ``answer``, which is trained on. Those
of other data sets are turned into such: ``<ImageHere>`` in a question or its answer is the place of
a picture; a lone picture without a place stands before everything; a lone ``text`` is an answer
without a prompt. A picture becomes as many image tokens as it has, and what is trained on is
decided by character offsets, as everywhere here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkern.data.language import IGNORE, _LanguageCollator
from mmkern.data.randomness import Keys, sample_keys
from mmkern.layout import VisualSpans

__all__ = ["IMAGE", "InterleavedCollator", "interleave", "with_images"]

IMAGE = "<ImageHere>"

Sample = Mapping[str, Any]
# What stands before everything, in the prompt, and in the answer: texts and pictures.
Split = tuple[list[Any], list[Any], list[Any]]
# Text or ids.
Part = str | Sequence[int]


def with_images(prompt: str, answer: str, images: Sequence[Any], sample: int = 0) -> Split:
    """Texts with the images in the places of ``<ImageHere>``.

    One image without a place stands before everything.

    Raises:
        ValueError: naming the sample, another number of places than images.
    """
    places = prompt.count(IMAGE) + answer.count(IMAGE)
    if places == 0 and len(images) == 1:
        return [images[0]], [prompt], [answer]
    if places != len(images):
        raise ValueError(
            f"interleave: sample {sample} has {places} times {IMAGE} in its text, but "
            f"{len(images)} images"
        )
    left = iter(images)
    return [], _filled(prompt, left), _filled(answer, left)


def _filled(text: str, images: Iterator[Any]) -> list[Any]:
    first, *others = text.split(IMAGE)
    return [first, *(piece for after in others for piece in (next(images), after))]


def interleave(
    tokenizer: Any, asked: Sequence[Part], said: Sequence[Part]
) -> tuple[list[int], list[int]]:
    """Ids of what is asked, and of what is said after it.

    Texts that follow each other are tokenised as one; a token over the border belongs to what is
    said.
    """
    rows: tuple[list[int], list[int]] = ([], [])
    parts = [*((part, 0) for part in asked), *((part, 1) for part in said)]
    full = [(part, side) for part, side in parts if part != ""]
    for is_text, run in groupby(full, key=lambda part: isinstance(part[0], str)):
        pieces = list(run)
        if not is_text:
            for ids, side in pieces:
                rows[side].extend(ids)  # type: ignore[arg-type]
            continue
        found = tokenizer(
            "".join(str(text) for text, _ in pieces),
            add_special_tokens=False,
            return_offsets_mapping=True,
            split_special_tokens=True,
        )
        # A run that begins behind the border has no token before it, not even an empty one.
        border = -1 if pieces[0][1] else sum(len(text) for text, side in pieces if not side)
        ids, offsets = found["input_ids"], found["offset_mapping"]
        first = next((i for i, (_, end) in enumerate(offsets) if end > border), len(ids))
        rows[0].extend(ids[:first])
        rows[1].extend(ids[first:])
    return rows


class InterleavedCollator(_LanguageCollator):
    """``[bos][pieces][answer][end][pads]``, any number of pictures a sample, none too.

    Gives ``input_ids``, ``attention_mask`` and ``labels`` int64 [B, L]; ``pixel_values`` of the
    pictures of all samples in order of samples and places, [n, 3, H, W], or a list where their
    sizes differ, and absent without any; ``image_counts`` int64 [B], or ``spans``.

    Args:
        transform: as ``ContrastiveCollator`` takes it; may give a list of tensors.
        tokenizer: the language model's, fast.
        image_tokens: tokens of an image of so many pixels (height, width).
        image_token_index: the id that stands for each; may lie outside the vocabulary.
        prompt_length: tokens of a prompt, those of its pictures too, of which the end is kept.
        answer_length: tokens of an answer without its end, of which the beginning is kept.
        max_length: of a whole row, of which the beginning is kept.
        chat: the tokens that begin and end a turn: prompts and answers are then turns of "user" and
            "assistant", as InternLM2's chat models take them.
        spans: instead of ``image_counts`` give the image tokens' rows, which all layers share.
        options: ``texts``, ``bos``, ``eos``, ``seed`` as the other language collators take them.

    Raises:
        ValueError: a tokenizer without offsets, an end, or the tokens of ``chat``; lengths below 1,
            a ``max_length`` below 2.
    """

    def __init__(
        self,
        transform: Any,
        tokenizer: Any,
        image_tokens: Callable[[int, int], int],
        image_token_index: int,
        *,
        prompt_length: int = sys.maxsize,
        answer_length: int = sys.maxsize,
        max_length: int = sys.maxsize,
        chat: Sequence[str] | None = None,
        spans: bool = False,
        **options: Any,
    ) -> None:
        options |= {"prompt_length": prompt_length, "answer_length": answer_length}
        # How many tokens an image has may depend on the image.
        super().__init__(transform, tokenizer, 1, image_token_index, **options)
        if max_length < 2:
            raise ValueError(
                f"InterleavedCollator: max_length must be at least 2, got {max_length}"
            )
        self.image_tokens, self.max_length, self.spans = image_tokens, max_length, spans
        self.turn: list[list[int]] | None = None
        if chat is not None:
            known = tokenizer.get_vocab()
            if len(chat) != 2 or any(token not in known for token in chat):
                raise ValueError(
                    "InterleavedCollator: chat must be two tokens of the tokenizer, got "
                    f"{list(chat)}"
                )
            self.turn = [[known[token]] for token in chat]
        self.end = self.eos if self.turn is None else self.turn[1]

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Collate for training.

        Raises:
            ValueError: no samples; naming the sample, texts that do not fit its images, a text that
                holds the image token, and rows that would lose a part of an image.
        """
        batch, parts = self._parts(samples)
        rows, labels = [], []
        for number, (before, answer) in enumerate(parts):
            said = [*answer, *self.end]
            row = self._kept(
                [*before, *said], slice(self.max_length), f"sample {number}", "max_length"
            )
            targets = [IGNORE if i == self.image_token_index else i for i in said]
            rows.append(row)
            labels.append([*[IGNORE] * len(before), *targets][: len(row)])
        return {**batch, **self._tables(rows), "labels": self._pad(labels, IGNORE)}

    def prompts(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The same without answers, padded on the left: what ``generate`` takes."""
        batch, parts = self._parts(samples, answers=False)
        return {**batch, **self._tables([before for before, _ in parts], left=True)}

    def answer_ids(self, pairs: Sequence[tuple[Sample, str]]) -> list[list[int]]:
        """The ids that each sample's prompt is followed by if the answer is the one given."""
        samples = [
            {**sample, ("text" if "text" in sample else "answer"): answer}
            for sample, answer in pairs
        ]
        return [[*answer, *self.end] for _, answer in self._parts(samples, pictures=False)[1]]

    def _parts(
        self, samples: Sequence[Sample], *, answers: bool = True, pictures: bool = True
    ) -> tuple[dict[str, Any], list[tuple[list[int], list[int]]]]:
        """The pictures' part of a batch; ids before the answer, and of the answer, a sample.

        Without ``pictures`` they are not prepared, and take no places.
        """
        if not samples:
            raise ValueError("InterleavedCollator: got no samples")
        numbers = [[sample[key] for sample in samples] for key in ("epoch", "index")]
        keys = sample_keys(self.seed, *numbers)
        splits = []
        for row, sample in enumerate(samples):
            front, asked, said = self._split_sample(sample, keys[row : row + 1], row)
            splits.append((front, asked, said if answers else []))
        batch, sizes = self._prepare(splits, keys) if pictures else ({}, [[] for _ in splits])
        rows = []
        for number, (split, own) in enumerate(zip(splits, sizes, strict=True)):
            left = iter(own)
            tokens = self.image_token_index
            front, asked, said = (
                [p if isinstance(p, str) else [tokens] * next(left, 0) for p in pieces]
                for pieces in split
            )
            before, answer = interleave(self.tokenizer, *self._turns(front, asked, said))
            rows.append(self._cut(before, answer, sum(own), number))
        return batch, rows

    def _split_sample(self, sample: Sample, key: Keys, number: int) -> Split:
        if "pieces" in sample:
            return [], list(sample["pieces"]), [sample["answer"]]
        image = sample.get("image")
        if image is None and "text" in sample:
            return [], [], [sample["text"]]
        prompt, answer = self.texts([sample], key)[0]
        images = image if isinstance(image, list) else [] if image is None else [image]
        return with_images(prompt, answer, images, number)

    def _turns(
        self, front: Sequence[Part], asked: Sequence[Part], said: Sequence[Part]
    ) -> tuple[Sequence[Part], Sequence[Part]]:
        """Prompt and answer as turns of a chat, or with a space between them."""
        if self.turn is not None:
            begin, end = self.turn
            mine = [*front, begin, "user\n", *asked, end, "\n", begin, "assistant\n"]
            return mine, said
        last, first = (asked or [""])[-1], (said or [""])[0]
        texts = isinstance(last, str) and isinstance(first, str) and last and first
        space = [" "] if texts and not str(last)[-1].isspace() else []
        return [*front, *asked], [*space, *said]

    def _cut(
        self, before: list[int], answer: list[int], wanted: int, number: int
    ) -> tuple[list[int], list[int]]:
        """Prompt, behind the beginning of a text, and answer, no longer than they may be."""
        count = (before + answer).count(self.image_token_index)
        if count != wanted:
            raise ValueError(
                f"InterleavedCollator: sample {number} has {count} image tokens, its pictures "
                f"become {wanted}: its text holds the id {self.image_token_index}"
            )
        start, end = slice(-self.prompt_length, None), slice(self.answer_length)
        before = self._kept(before, start, f"the prompt of sample {number}", "prompt_length")
        answer = self._kept(answer, end, f"the answer of sample {number}", "answer_length")
        return [*self.bos, *before], answer

    def _kept(self, ids: list[int], part: slice, whose: str, limit: str) -> list[int]:
        """A part of the ids that has all their image tokens."""
        kept, images = ids[part], ids.count(self.image_token_index)
        if lost := images - kept.count(self.image_token_index):
            raise ValueError(
                f"InterleavedCollator: {whose} has {len(ids)} tokens; cut to {limit} "
                f"{getattr(self, limit)} it would lose {lost} of its {images} image tokens"
            )
        return kept

    def _prepare(
        self, splits: Sequence[Split], keys: Keys
    ) -> tuple[dict[str, Any], list[list[int]]]:
        """``pixel_values`` and ``image_counts`` of a batch; tokens of each sample's pictures."""
        images = [
            [piece for pieces in split for piece in pieces if not isinstance(piece, str)]
            for split in splits
        ]
        counts = [len(own) for own in images]
        batch: dict[str, Any] = {} if self.spans else {"image_counts": torch.tensor(counts)}
        if not sum(counts):
            return batch, [[] for _ in splits]
        # A key of its own for each picture of a sample.
        each = [sample_keys(int(k), 0, range(n)) for k, n in zip(keys, counts, strict=True) if n]
        flat = [picture for own in images for picture in own]
        batch["pixel_values"] = self._pictures(flat, np.concatenate(each))
        sizes = iter([self.image_tokens(*p.shape[1:]) for p in batch["pixel_values"]])
        return batch, [[next(sizes) for _ in own] for own in images]

    def _pictures(self, pictures: list[Any], keys: Keys) -> Tensor | list[Tensor]:
        """Those of one size are prepared together."""
        groups: dict[Any, list[int]] = {}
        for place, picture in enumerate(pictures):
            size = tuple(picture.shape) if isinstance(picture, Tensor) else None
            groups.setdefault(size, []).append(place)
        if len(groups) == 1:
            return self.transform.batch(pictures, keys)
        found: list[Any] = [None] * len(pictures)
        for places in groups.values():
            ready = self.transform.batch([pictures[i] for i in places], keys[places])
            for place, picture in zip(places, ready, strict=True):
                found[place] = picture
        return found

    def _tables(self, rows: Sequence[Sequence[int]], left: bool = False) -> dict[str, Any]:
        ids = self._pad(rows, self.pad, left)
        found: dict[str, Any] = {"input_ids": ids, "attention_mask": self._mask(rows, left)}
        if self.spans:
            found["spans"] = VisualSpans.from_mask(ids == self.image_token_index)
        return found
