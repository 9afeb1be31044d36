"""Images between text, as InternLM-XComposer2 reads them.

A row is [bos][text with images in it][end]: ``<ImageHere>`` in the text becomes as many image
tokens as the image has, everything else is tokenised between them, and what the model says is
labelled by character offsets, as everywhere here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from torch import Tensor

from mmkern.data.language import IGNORE, _LanguageCollator
from mmkern.data.randomness import sample_keys
from mmkern.layout import VisualSpans

__all__ = ["IMAGE", "InterleavedCollator", "interleave", "with_images"]

IMAGE = "<ImageHere>"

# Text or ids, and whether the model is trained to say them.
Part = tuple[str | Sequence[int], bool]


def with_images(parts: Sequence[Part], images: Sequence[Sequence[int]], sample: int) -> list[Part]:
    """Parts of text with the ids of the images in the places of ``<ImageHere>``.

    One image without a place stands before everything.

    Raises:
        ValueError: naming the sample, another number of places than images.
    """
    texts = [text for text, _ in parts if isinstance(text, str)]
    places = sum(text.count(IMAGE) for text in texts)
    if places == 0 and len(images) == 1:
        return [(images[0], False), *parts]
    if places != len(images):
        raise ValueError(
            f"interleave: sample {sample} has {places} times {IMAGE} in its text, but "
            f"{len(images)} images"
        )
    left, found = iter(images), list[Part]()
    for text, trained in parts:
        if not isinstance(text, str):
            found.append((text, trained))
            continue
        first, *others = text.split(IMAGE)
        found.append((first, trained))
        for after in others:
            found += [(next(left), False), (after, trained)]
    return found


def interleave(
    tokenizer: Any,
    parts: Sequence[Part],
    *,
    image_token_index: int,
    max_length: int,
    sample: int = 0,
) -> tuple[list[int], list[int]]:
    """Ids and labels of one row; labels are the ids that are trained, -100 elsewhere.

    Texts that follow each other are tokenised as one; a token over the border of two belongs to
    the second. A row that is too long loses its end.

    Raises:
        ValueError: naming the sample, a row that would lose image tokens.
    """
    ids: list[int] = []
    labels: list[int] = []
    for is_text, run in groupby(parts, key=lambda part: isinstance(part[0], str)):
        pieces = list(run)
        if not is_text:
            for numbers, trained in pieces:
                ids += numbers
                labels += numbers if trained else [IGNORE] * len(numbers)
            continue
        ends = [0]
        for text, _ in pieces:
            ends.append(ends[-1] + len(text))
        found = tokenizer(
            "".join(str(text) for text, _ in pieces),
            add_special_tokens=False,
            return_offsets_mapping=True,
            split_special_tokens=True,
        )
        for token, (_, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
            owner = next((i for i, stop in enumerate(ends[1:]) if end <= stop), len(pieces) - 1)
            ids.append(token)
            labels.append(token if pieces[owner][1] else IGNORE)
    lost = ids[max_length:].count(image_token_index)
    if lost:
        raise ValueError(
            f"interleave: sample {sample} has {len(ids)} tokens; cut to max_length {max_length} it "
            f"would lose {lost} of its {ids.count(image_token_index)} image tokens"
        )
    return ids[:max_length], labels[:max_length]


class InterleavedCollator(_LanguageCollator):
    """Pictures between words for InternLM-XComposer2: ``[bos][image][prompt][answer][end][pads]``.

    Gives ``pixel_values`` (absent without pictures; a list where their sizes differ),
    ``input_ids``, ``attention_mask`` and ``labels`` int64 [B, L], and ``spans``: the image tokens'
    rows, which all layers share. A sample has one ``image``, a list of them for as many
    ``<ImageHere>`` in its text, or none.

    Args:
        transform: as ``ContrastiveCollator`` takes it; may give a list of tensors.
        tokenizer: the language model's, fast.
        image_tokens: tokens of an image of so many pixels (height, width).
        image_token_index: the id that stands for each.
        max_length: of a row.
        chat: the tokens that begin and end a turn: prompts and answers are then turns of "user" and
            "assistant", as InternLM2's chat models take them.
        options: ``texts``, ``bos``, ``eos``, ``seed`` as the other language collators take them.

    Raises:
        ValueError: a tokenizer without offsets, an end, or the tokens of ``chat``.
    """

    def __init__(
        self,
        transform: Any,
        tokenizer: Any,
        image_tokens: Callable[[int, int], int],
        image_token_index: int,
        *,
        max_length: int = 4096,
        chat: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        # How many tokens an image has depends on the image.
        super().__init__(transform, tokenizer, 1, image_token_index, **options)
        if max_length < 2:
            raise ValueError(
                f"InterleavedCollator: max_length must be at least 2, got {max_length}"
            )
        self.image_tokens, self.max_length = image_tokens, max_length
        self.turn: list[list[int]] | None = None
        if chat is not None:
            known = tokenizer.get_vocab()
            if len(chat) != 2 or any(token not in known for token in chat):
                raise ValueError(
                    "InterleavedCollator: chat must be two tokens of the tokenizer, got "
                    f"{list(chat)}"
                )
            self.turn = [[known[token]] for token in chat]

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate for training.

        Raises:
            ValueError: no samples; naming the sample, texts that do not fit its images, and rows
                that would lose a part of an image.
        """
        batch, images, pairs = self._prepare(samples)
        rows, labels = [], []
        for number, (prompt, answer) in enumerate(pairs):
            parts = [*self._asked(prompt), *self._answered(prompt, answer)]
            ids, targets = self._row(parts, images[number], number)
            rows.append(ids)
            labels.append(targets)
        return {**batch, **self._tables(rows), "labels": self._pad(labels, IGNORE)}

    def prompts(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The same without answers, padded on the left: what ``generate`` takes."""
        batch, images, pairs = self._prepare(samples)
        rows = [
            self._row(self._asked(prompt), images[number], number)[0]
            for number, (prompt, _) in enumerate(pairs)
        ]
        return {**batch, **self._tables(rows, left=True)}

    def answer_ids(self, pairs: Sequence[tuple[Mapping[str, Any], str]]) -> list[list[int]]:
        """The ids that each sample's prompt is followed by if the answer is the one given."""
        samples = [
            {**sample, ("text" if "text" in sample else "answer"): answer}
            for sample, answer in pairs
        ]
        keys = sample_keys(self.seed, *([s[name] for s in samples] for name in ("epoch", "index")))
        found = []
        for number, (prompt, answer) in enumerate(self.texts(samples, keys)):
            asked = prompt.replace(IMAGE, "")
            parts = [*self._asked(asked), *self._answered(asked, answer)]
            labels = self._row(parts, [], number)[1]
            found.append([label for label in labels if label != IGNORE])
        return found

    def _asked(self, prompt: str) -> list[Part]:
        if self.turn is None:
            return [(prompt, False)]
        begin, end = ((ids, False) for ids in self.turn)
        return [
            begin,
            (f"user\n{prompt}", False),
            end,
            ("\n", False),
            begin,
            ("assistant\n", False),
        ]

    def _answered(self, prompt: str, answer: str) -> list[Part]:
        if self.turn is not None:
            return [(answer, True), (self.turn[1], True)]
        space = " " if prompt and answer and not prompt[-1].isspace() else ""
        return [(f"{space}{answer}", True), (self.eos, True)]

    def _row(
        self, parts: Sequence[Part], images: Sequence[int], number: int
    ) -> tuple[list[int], list[int]]:
        tokens = [[self.image_token_index] * count for count in images]
        return interleave(
            self.tokenizer,
            [(self.bos, False), *with_images(parts, tokens, number)],
            image_token_index=self.image_token_index,
            max_length=self.max_length,
            sample=number,
        )

    def _prepare(
        self, samples: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, Any], list[list[int]], list[tuple[str, str]]]:
        """Pictures, tokens of each sample's images, prompts with answers."""
        if not samples:
            raise ValueError("InterleavedCollator: got no samples")
        epochs, indices = ([sample[key] for sample in samples] for key in ("epoch", "index"))
        keys = sample_keys(self.seed, epochs, indices)
        pictures, owners = [], []
        for number, sample in enumerate(samples):
            given = sample.get("image")
            given = [] if given is None else given if isinstance(given, list) else [given]
            pictures += given
            owners += [number] * len(given)
        prepared: Any = self._pictures(pictures, keys[owners]) if pictures else []
        images: list[list[int]] = [[] for _ in samples]
        for owner, picture in zip(owners, prepared, strict=True):
            images[owner].append(self.image_tokens(*picture.shape[1:]))
        batch = {"pixel_values": prepared} if pictures else {}
        return batch, images, self.texts(samples, keys)

    def _pictures(self, pictures: list[Any], keys: Any) -> Tensor | list[Tensor]:
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
        return {
            "input_ids": ids,
            "attention_mask": self._mask(rows, left),
            "spans": VisualSpans.from_mask(ids == self.image_token_index),
        }
