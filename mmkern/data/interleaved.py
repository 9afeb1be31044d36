"""Texts with pictures in any places, as batches: what InternLM-XComposer reads.

A sample has ``pieces``, texts and pictures in order, and an ``answer``, which is trained on. Those
of other data sets are turned into such: a picture with a caption or a question is
``[picture, prompt]`` with its answer, and a lone ``text`` is an answer without a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkern.data.language import IGNORE, CausalCollator
from mmkern.data.randomness import Keys, sample_keys

__all__ = ["InterleavedCollator"]

Sample = Mapping[str, Any]


class InterleavedCollator(CausalCollator):
    """``[bos][pieces][answer][eos][pads]``, any number of pictures a sample, none too.

    Gives ``input_ids``, ``attention_mask`` and ``labels`` int64 [B, L], ``image_counts`` int64 [B],
    and ``pixel_values`` [all pictures, 3, H, W] in order of samples and places; without a picture
    in the batch there are no ``pixel_values``. A picture takes ``image_tokens`` positions.

    Arguments are :class:`CausalCollator`'s. ``prompt_length`` counts the positions of pictures too:
    of a longer prompt the beginning is cut, but never a picture.
    """

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Collate for training.

        Raises:
            ValueError: no samples; a text that holds the image token; a prompt so long that a
                picture would be cut, naming sample, positions and ``prompt_length``.
        """
        batch, parts = self._parts(samples)
        rows = [[*before, *answer, *self.eos] for before, answer in parts]
        labels = [[*[IGNORE] * len(before), *answer, *self.eos] for before, answer in parts]
        return {
            **batch,
            "input_ids": self._pad(rows, self.pad),
            "attention_mask": self._mask(rows),
            "labels": self._pad(labels, IGNORE),
        }

    def prompts(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """The same without answers, padded on the left: what ``generate`` takes."""
        batch, parts = self._parts(samples, answers=False)
        rows = [before for before, _ in parts]
        return {
            **batch,
            "input_ids": self._pad(rows, self.pad, left=True),
            "attention_mask": self._mask(rows, left=True),
        }

    def answer_ids(self, pairs: Sequence[tuple[Sample, str]]) -> list[list[int]]:
        """The ids that each sample's prompt is followed by if the answer is the one given."""
        samples = [
            {**sample, ("text" if "text" in sample else "answer"): answer}
            for sample, answer in pairs
        ]
        return [[*answer, *self.eos] for _, answer in self._parts(samples, pictures=False)[1]]

    def _parts(
        self, samples: Sequence[Sample], *, answers: bool = True, pictures: bool = True
    ) -> tuple[dict[str, Tensor], list[tuple[list[int], list[int]]]]:
        """The pictures' part of a batch; ids before the answer, and of the answer, a sample."""
        if not samples:
            raise ValueError("InterleavedCollator: got no samples")
        numbers = [[sample[key] for sample in samples] for key in ("epoch", "index")]
        keys = sample_keys(self.seed, *numbers)
        pieces, ends = [], []
        for row, sample in enumerate(samples):
            own, answer = self._pieces(sample, keys[row : row + 1])
            tail = own.pop() if own and isinstance(own[-1], str) else ""
            pieces.append(own)
            ends.append((tail, answer if answers else ""))
        rows = []
        for number, (last, said) in enumerate(self._whole_prompts(ends)):
            rows.append((self._before(number, pieces[number], last), said))
        return (self._pictures(pieces, keys) if pictures else {}), rows

    def _pieces(self, sample: Sample, key: Keys) -> tuple[list[Any], str]:
        if "pieces" in sample:
            return list(sample["pieces"]), sample["answer"]
        if "image" not in sample and "text" in sample:
            return [], sample["text"]
        prompt, answer = self.texts([sample], key)[0]
        return ([sample["image"], prompt] if "image" in sample else [prompt]), answer

    def _before(self, number: int, pieces: Sequence[Any], tail: Sequence[int]) -> list[int]:
        """The ids of a prompt, cut to its length."""
        ids: list[int] = []
        texts = [piece for piece in pieces if isinstance(piece, str)]
        found = iter(
            self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            if texts
            else ()
        )
        for piece in pieces:
            ids += next(found) if isinstance(piece, str) else self.image
        ids += tail
        wanted = sum(not isinstance(piece, str) for piece in pieces) * len(self.image)
        if (count := ids.count(self.image_token_index)) != wanted:
            raise ValueError(
                f"InterleavedCollator: sample {number} has {count} image tokens, its pictures "
                f"become {wanted}: its text holds the id {self.image_token_index}"
            )
        excess = max(0, len(ids) - self.prompt_length)
        if self.image_token_index in ids[:excess]:
            raise ValueError(
                f"InterleavedCollator: the prompt of sample {number} takes {len(ids)} positions, "
                f"prompt_length is {self.prompt_length}: cutting it would cut a picture, which "
                f"takes {len(self.image)}"
            )
        return [*self.bos, *ids[excess:]]

    def _pictures(self, pieces: Sequence[Sequence[Any]], keys: Keys) -> dict[str, Tensor]:
        """``image_counts``, and ``pixel_values`` if there are any."""
        images = [[piece for piece in own if not isinstance(piece, str)] for own in pieces]
        counts = [len(own) for own in images]
        batch = {"image_counts": torch.tensor(counts)}
        if sum(counts):
            # A key of its own for each picture of a sample.
            own = [sample_keys(int(k), 0, range(n)) for k, n in zip(keys, counts, strict=True) if n]
            flat = [picture for of in images for picture in of]
            batch["pixel_values"] = self.transform.batch(flat, np.concatenate(own))
        return batch
