"""Batches of conversations: what LLaVA reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkern.data.collator import BatchTransform
from mmkern.data.conversations import CONVERSATIONS, Turn
from mmkern.data.epochs import EpochAware
from mmkern.data.language import IGNORE, Texts, _LanguageCollator
from mmkern.data.randomness import Keys, sample_keys

__all__ = ["ConversationCollator"]

Sample = Mapping[str, Any]


class ConversationCollator(EpochAware, _LanguageCollator):
    """``[bos]`` and the rounds, ``[question with its pictures][answer][eos]`` each, then pads.

    Gives ``input_ids``, ``attention_mask`` and ``labels`` int64 [B, L], ``image_counts`` int64 [B],
    and ``pixel_values`` [pictures of all samples, 3, H, W] in order of samples and places; without
    a picture in the batch there are no ``pixel_values``. A picture takes ``image_tokens``
    positions. Labels are the ids of answers and of what ends them, -100 elsewhere; of an empty
    answer only the end.

    Samples are conversations (``turns``, ``images``), or what other data sets give: a picture with
    a caption or a question is a conversation of one round.

    A longer text loses its end. One that loses all its answers stays in the batch without labels,
    so it adds nothing, and is counted: ``skipped``, reported once an epoch.

    Args:
        transform, tokenizer, image_tokens, image_token_index, texts, bos, seed: as
            ``CausalCollator`` takes them; ``bos`` begins a conversation.
        template: of :data:`mmkern.data.conversations.CONVERSATIONS`.
        max_length: tokens at most, pictures' among them.

    Raises:
        ValueError: an unknown template, and what ``CausalCollator`` raises.
    """

    def __init__(
        self,
        transform: BatchTransform,
        tokenizer: Any,
        image_tokens: int,
        image_token_index: int,
        *,
        template: str = "v1",
        texts: Texts | None = None,
        max_length: int = 2048,
        bos: int | None = None,
        seed: int = 0,
    ) -> None:
        EpochAware.__init__(self)
        _LanguageCollator.__init__(
            self, transform, tokenizer, image_tokens, image_token_index, texts=texts, bos=bos,
            seed=seed,
        )  # fmt: skip
        if template not in CONVERSATIONS:
            raise ValueError(
                f"ConversationCollator: template must be one of {sorted(CONVERSATIONS)}, got "
                f"{template!r}"
            )
        if max_length < 1:
            raise ValueError(
                f"ConversationCollator: max_length must be at least 1, got {max_length}"
            )
        self.template, self.max_length = CONVERSATIONS[template], max_length
        self._end = self.eos if self.template.eos else []
        if not self.template.eos:
            # What the model is to stop at.
            self.eos = self._tokenize([self.template.after])[0][0]

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Collate for training.

        Raises:
            ValueError: no samples; naming the sample: other numbers of tags than pictures, a text
                that holds the image token, a text so long that its cut would go through a picture.
        """
        conversations, keys = self._conversations(samples)
        rows, labels = [], []
        for number, parts in enumerate(self._rounds([turns for turns, _ in conversations])):
            row, label = self._row(parts)
            self._check_row(number, row, len(conversations[number][1]))
            if len(row) > self.max_length:
                row, label = self._cut(number, row, label)
            rows.append(row)
            labels.append(label)
        return {
            "input_ids": self._pad(rows, self.pad),
            "attention_mask": self._mask(rows),
            "labels": self._pad(labels, IGNORE),
            **self._pictures([images for _, images in conversations], keys),
        }

    def prompts(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """The same without the last answer, padded on the left: what ``generate`` takes."""
        conversations, keys = self._conversations(samples)
        rows = []
        for number, parts in enumerate(self._rounds([turns for turns, _ in conversations])):
            *before, (prompt, _) = parts
            row = [*self._row(before)[0], *self._begin_of(len(before)), *prompt]
            self._check_row(number, row, len(conversations[number][1]))
            rows.append(row)
        return {
            "input_ids": self._pad(rows, self.pad, left=True),
            "attention_mask": self._mask(rows, left=True),
            **self._pictures([images for _, images in conversations], keys),
        }

    def answer_ids(self, pairs: Sequence[tuple[Sample, str]]) -> list[list[int]]:
        """The ids that each sample's prompt is followed by if the last answer is the one given."""
        conversations, _ = self._conversations([sample for sample, _ in pairs])
        turns = [
            [*own[:-1], own[-1]._replace(answer=answer)]
            for (own, _), (_, answer) in zip(conversations, pairs, strict=True)
        ]
        return [[*parts[-1][1], *self._end] for parts in self._rounds(turns)]

    def _conversations(
        self, samples: Sequence[Sample]
    ) -> tuple[list[tuple[list[Turn], list[Any]]], Keys]:
        """Rounds and pictures of each sample, and its key."""
        if not samples:
            raise ValueError("ConversationCollator: got no samples")
        keys = sample_keys(self.seed, *([s[name] for s in samples] for name in ("epoch", "index")))
        found: list[tuple[list[Turn], list[Any]]] = []
        for number, sample in enumerate(samples):
            if "turns" in sample:
                turns, images = list(sample["turns"]), list(sample["images"])
            else:
                prompt, answer = self.texts([sample], keys[number : number + 1])[0]
                images = [sample["image"]] if "image" in sample else []
                turns = [Turn(prompt, answer, len(images))]
            tags = sum(turn.images for turn in turns)
            if not turns or tags != len(images):
                raise ValueError(
                    f"ConversationCollator: sample {number} has {len(images)} pictures, its "
                    f"{len(turns)} rounds have places for {tags}"
                )
            found.append((turns, images))
        return found, keys

    def _tokenize(self, texts: list[str]) -> tuple[list[list[int]], list[Any]]:
        """Ids of each text, and their character offsets."""
        found = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True
        )
        return found["input_ids"], found["offset_mapping"]

    def _rounds(
        self, conversations: Sequence[Sequence[Turn]]
    ) -> list[list[tuple[list[int], list[int]]]]:
        """Ids of (prompt with its pictures, answer) of each round of each conversation."""
        written = [
            [self.template.round(number, turn) for number, turn in enumerate(turns)]
            for turns in conversations
        ]
        texts: list[str] = []
        for rounds in written:
            for before, prompt, answer in rounds:
                texts += [*before, prompt + answer]
        found = iter(zip(*self._tokenize(texts), strict=True))
        result = []
        for rounds in written:
            parts = []
            for before, prompt, _ in rounds:
                asked: list[int] = []
                for _ in before:
                    asked += [*next(found)[0], *self.image]
                ids, offsets = next(found)
                # A token that spans the border belongs to the answer.
                border = len(prompt)
                first = next((i for i, (_, end) in enumerate(offsets) if end > border), len(ids))
                parts.append(([*asked, *ids[:first]], ids[first:]))
            result.append(parts)
        return result

    def _begin_of(self, number: int) -> list[int]:
        return self.bos if number == 0 or self.template.bos_each else []

    def _row(self, parts: Sequence[tuple[list[int], list[int]]]) -> tuple[list[int], list[int]]:
        """Ids and labels of a conversation."""
        row: list[int] = []
        labels: list[int] = []
        for number, (asked, said) in enumerate(parts):
            before, said = [*self._begin_of(number), *asked], [*said, *self._end]
            row += before + said
            labels += [IGNORE] * len(before) + said
        return row, labels

    def _check_row(self, number: int, row: Sequence[int], images: int) -> None:
        count, expected = row.count(self.image_token_index), images * len(self.image)
        if count != expected:
            raise ValueError(
                f"ConversationCollator: sample {number} has {count} image tokens, its {images} "
                f"pictures become {expected}: its text holds the id {self.image_token_index}"
            )

    def _cut(self, number: int, row: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        """A row and its labels without what is too much, never a part of a picture."""
        if self.image_token_index in row[self.max_length :]:
            raise ValueError(
                f"ConversationCollator: sample {number} takes {len(row)} positions, max_length is "
                f"{self.max_length}: cutting it would cut a picture, which takes {len(self.image)}"
            )
        labels = labels[: self.max_length]
        if all(label == IGNORE for label in labels):
            self._count_skipped(
                ValueError(f"sample {number}: no answer within {self.max_length} of {len(row)}")
            )
        return row[: self.max_length], labels

    def _pictures(self, images: Sequence[Sequence[Any]], keys: Keys) -> dict[str, Tensor]:
        """``image_counts``, and ``pixel_values`` if there are any."""
        counts = [len(own) for own in images]
        batch = {"image_counts": torch.tensor(counts)}
        if sum(counts):
            # A key of its own for each picture of a sample.
            own = [sample_keys(int(k), 0, range(n)) for k, n in zip(keys, counts, strict=True) if n]
            flat = [picture for of in images for picture in of]
            batch["pixel_values"] = self.transform.batch(flat, np.concatenate(own))
        return batch
