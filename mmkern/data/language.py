"""From pictures with words to the batches of BLIP-2 and InstructBLIP.

What is trained on is decided by character offsets: prompt and answer are tokenised once, as one
text, and the tokens that lie in the answer are labelled. (Tokenising the prompt again to count its
tokens is wrong wherever a token spans the border.) Image tokens are put in as ids and counted for
each sample. Prompts that are too long lose their beginning, never the question's end, an image
token or the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from mmkern.data.collator import BatchTransform
from mmkern.data.instructions import TEMPLATES, check_templates, fill
from mmkern.data.randomness import Keys, Stream, sample_keys, uniform

__all__ = [
    "IGNORE",
    "CausalCollator",
    "PretrainingCollator",
    "Seq2SeqCollator",
    "Texts",
    "text_id",
]

IGNORE = -100


def text_id(text: str) -> int:
    """A number that equal texts share: int64, from a hash."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


@dataclass(frozen=True)
class Texts:
    """How samples become a prompt and an answer.

    A caption (a sample with ``text``) has the fixed prompt and is put into one of ``captions``; a
    question (``kind``, ``subject``, ``answer``) has one of the kind's templates. Which one depends
    on (seed, epoch, index).

    Attributes:
        prompt: before captions, e.g. "a picture of"; "" for none.
        captions: each with one "{}".
        instructions: kind -> templates.
        first: always take the first of them, as tests of a model do.

    Raises:
        ValueError: templates that cannot be filled.
    """

    prompt: str = ""
    captions: Sequence[str] = ("{}",)
    instructions: Mapping[str, Sequence[str]] | None = None
    first: bool = False

    def __post_init__(self) -> None:
        check_templates({"caption text": self.captions, **(self.instructions or {})})
        if "{}" not in self.captions[0]:
            raise ValueError(f"Texts: captions need a '{{}}', got {list(self.captions)}")

    def __call__(self, samples: Sequence[Mapping[str, Any]], keys: Keys) -> list[tuple[str, str]]:
        """Prompt and answer of each sample.

        Raises:
            ValueError: a kind without templates.
        """
        draws = uniform(keys, 1, Stream.TEMPLATE)[:, 0].tolist()
        return [self._pair(*pair) for pair in zip(samples, draws, strict=True)]

    def _pair(self, sample: Mapping[str, Any], draw: float) -> tuple[str, str]:
        if "text" in sample:
            return self.prompt, fill(self._choose(self.captions, draw), sample["text"])
        instructions = TEMPLATES if self.instructions is None else self.instructions
        if sample["kind"] not in instructions:
            raise ValueError(
                f"no templates for questions of kind {sample['kind']!r}; there are "
                f"{sorted(instructions)}"
            )
        template = self._choose(instructions[sample["kind"]], draw)
        return fill(template, sample["subject"]), sample["answer"]

    def _choose(self, templates: Sequence[str], draw: float) -> str:
        return templates[0 if self.first else int(draw * len(templates))]


class _Collator:
    """Pictures and keys, which all collators here prepare in one way."""

    def __init__(self, transform: BatchTransform, texts: Texts, seed: int) -> None:
        self.transform, self.texts, self.seed = transform, texts, seed

    def _begin(
        self, samples: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, Tensor], Keys, list[tuple[str, str]]]:
        if not samples:
            raise ValueError(f"{type(self).__name__}: got no samples")
        epochs, indices = ([sample[key] for sample in samples] for key in ("epoch", "index"))
        keys = sample_keys(self.seed, epochs, indices)
        pictures = self.transform.batch([sample["image"] for sample in samples], keys)
        return {"pixel_values": pictures}, keys, self.texts(samples, keys)


class PretrainingCollator(_Collator):
    """BLIP-2's first stage: a picture, its caption in BERT's word pieces, who shares a caption.

    Gives ``pixel_values`` [B, 3, H, W], ``input_ids`` and ``attention_mask`` int64 [B, L], and
    ``image_ids`` int64 [B]: samples with one id (``group`` of the sample if it has one, else the
    hash of its text) count as matching in the contrastive loss and are no negatives in the
    matching loss.

    Args:
        transform: as ``ContrastiveCollator`` takes it.
        tokenizer: a fast tokenizer of transformers.
        texts: captions and their templates.
        length: L, with [CLS] and [SEP]; longer captions lose their end. Ranks exchange texts, so it
            is one for all batches.
        seed: of augmentation and templates.
    """

    def __init__(
        self,
        transform: BatchTransform,
        tokenizer: Any,
        *,
        texts: Texts | None = None,
        length: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(transform, texts or Texts(), seed)
        self.tokenizer, self.length = tokenizer, length

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate.

        Raises:
            ValueError: no samples.
        """
        batch, _, pairs = self._begin(samples)
        found = self.tokenizer(
            [answer for _, answer in pairs],
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        groups = [
            sample["group"] if "group" in sample else text_id(sample["text"]) for sample in samples
        ]
        return {
            **batch,
            "input_ids": found["input_ids"],
            "attention_mask": found["attention_mask"],
            "image_ids": torch.tensor(groups),
        }


class _LanguageCollator(_Collator):
    """What the two kinds of language models share.

    Args:
        transform: as ``ContrastiveCollator`` takes it.
        tokenizer: the language model's, fast.
        image_tokens: queries that a picture becomes.
        image_token_index: the id that stands for each; may lie outside the vocabulary.
        texts: prompts and answers.
        qformer_tokenizer: the Q-Former's (InstructBLIP): the batch then has ``qformer_input_ids``
            and ``qformer_attention_mask``, the prompt in its tokens.
        prompt_length, answer_length: tokens at most; of a longer prompt the end is kept, of a
            longer answer the beginning.
        bos: the beginning-of-sequence id, put after the image tokens; None for none.
        eos: the ids that end an answer; the tokenizer's end of sequence if not given.
        seed: of augmentation, templates and prefixes.

    Raises:
        ValueError: a tokenizer that gives no offsets, no end of sequence, lengths below 1.
    """

    def __init__(
        self,
        transform: BatchTransform,
        tokenizer: Any,
        image_tokens: int,
        image_token_index: int,
        *,
        texts: Texts | None = None,
        qformer_tokenizer: Any = None,
        prompt_length: int = 128,
        answer_length: int = 256,
        bos: int | None = None,
        eos: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(transform, texts or Texts(), seed)
        name = type(self).__name__
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{name}: labels need character offsets, that is a fast tokenizer")
        if min(prompt_length, answer_length, image_tokens) < 1:
            raise ValueError(
                f"{name}: image_tokens, prompt_length and answer_length must be at least 1, got "
                f"{image_tokens}, {prompt_length} and {answer_length}"
            )
        end = [tokenizer.eos_token_id] if eos is None else list(eos)
        if not end or None in end:
            raise ValueError(f"{name}: the tokenizer has no end of sequence; give eos")
        self.tokenizer, self.qformer_tokenizer = tokenizer, qformer_tokenizer
        self.image = [image_token_index] * image_tokens
        self.image_token_index = image_token_index
        self.prompt_length, self.answer_length = prompt_length, answer_length
        self.bos = [] if bos is None else [bos]
        self.eos: list[int] = end
        pad = tokenizer.pad_token_id
        self.pad: int = end[-1] if pad is None else pad

    def _split(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Ids of prompt and answer of each pair, cut to their lengths, from one tokenisation."""
        whole, borders = [], []
        for prompt, answer in pairs:
            space = " " if prompt and answer and not prompt[-1].isspace() else ""
            whole.append(f"{prompt}{space}{answer}")
            borders.append(len(prompt))
        found = self.tokenizer(
            whole, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True
        )
        rows = []
        for ids, offsets, border in zip(
            found["input_ids"], found["offset_mapping"], borders, strict=True
        ):
            # A token that spans the border belongs to the answer.
            first = next((i for i, (_, end) in enumerate(offsets) if end > border), len(ids))
            rows.append((ids[:first][-self.prompt_length :], ids[first:][: self.answer_length]))
        return rows

    def answer_ids(self, pairs: Sequence[tuple[Mapping[str, Any], str]]) -> list[list[int]]:
        """The ids that each sample's prompt is followed by if the answer is the one given."""
        samples = [
            {**sample, ("text" if "text" in sample else "answer"): answer}
            for sample, answer in pairs
        ]
        keys = sample_keys(self.seed, *([s[name] for s in samples] for name in ("epoch", "index")))
        return [[*answer, *self.eos] for _, answer in self._split(self.texts(samples, keys))]

    def _check(self, rows: Sequence[Sequence[int]]) -> None:
        """Every sample must have exactly its picture's tokens."""
        for number, row in enumerate(rows):
            if (count := row.count(self.image_token_index)) != len(self.image):
                raise ValueError(
                    f"{type(self).__name__}: sample {number} has {count} image tokens, its picture "
                    f"becomes {len(self.image)}: its text holds the id {self.image_token_index}"
                )

    def _pad(self, rows: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
        width = max(map(len, rows))
        table = torch.full((len(rows), width), value)
        for number, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(0, len(row))
            table[number, place] = torch.tensor(row, dtype=torch.long)
        return table

    def _mask(self, rows: Sequence[Sequence[int]], left: bool = False) -> Tensor:
        return self._pad([[1] * len(row) for row in rows], 0, left)

    def _qformer(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        if self.qformer_tokenizer is None:
            return {}
        tokenizer = self.qformer_tokenizer
        found = tokenizer(list(prompts), add_special_tokens=False, split_special_tokens=True)
        kept = [ids[-(self.prompt_length - 2) :] for ids in found["input_ids"]]
        rows = [[tokenizer.cls_token_id, *ids, tokenizer.sep_token_id] for ids in kept]
        return {
            "qformer_input_ids": self._pad(rows, tokenizer.pad_token_id),
            "qformer_attention_mask": self._mask(rows),
        }


class CausalCollator(_LanguageCollator):
    """Pictures with words for a decoder: ``[image tokens][bos][prompt][answer][eos][pads]``.

    Gives ``pixel_values``, ``input_ids``, ``attention_mask`` and ``labels`` int64 [B, L]; labels
    are the ids of the answer and its end, -100 elsewhere; with ``label_bos`` the bos too, which
    BLIP-2 with OPT learns to give after the picture. Arguments: those that both kinds have, and
    ``label_bos``.
    """

    def __init__(self, *arguments: Any, label_bos: bool = False, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.label_bos = label_bos and bool(self.bos)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate for training.

        Raises:
            ValueError: no samples; a text that holds the image token.
        """
        batch, _, pairs = self._begin(samples)
        rows, labels = [], []
        for prompt, answer in self._split(pairs):
            before = [*self.image, *self.bos, *prompt]
            rows.append([*before, *answer, *self.eos])
            ignored = [IGNORE] * len(before)
            if self.label_bos:
                ignored[len(self.image)] = self.bos[0]
            labels.append([*ignored, *answer, *self.eos])
        self._check(rows)
        return {
            **batch,
            "input_ids": self._pad(rows, self.pad),
            "attention_mask": self._mask(rows),
            "labels": self._pad(labels, IGNORE),
            **self._qformer([prompt for prompt, _ in pairs]),
        }

    def prompts(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The same without answers, padded on the left: what ``generate`` takes."""
        batch, _, pairs = self._begin(samples)
        prompts = [(prompt, "") for prompt, _ in pairs]
        rows = [[*self.image, *self.bos, *prompt] for prompt, _ in self._split(prompts)]
        self._check(rows)
        return {
            **batch,
            "input_ids": self._pad(rows, self.pad, left=True),
            "attention_mask": self._mask(rows, left=True),
            **self._qformer([prompt for prompt, _ in pairs]),
        }


class Seq2SeqCollator(_LanguageCollator):
    """Pictures with words for an encoder, ``[image tokens][prompt][eos]``, and a decoder's target.

    Gives ``pixel_values``, ``input_ids``, ``attention_mask`` [B, L] and ``labels`` [B, M], -100 on
    pads. Captions without a prompt are split for the prefix language modelling loss: the first p
    words are the prompt, the others the answer, p uniform from 1 to half of the words (at least 1),
    drawn from (seed, epoch, index); a caption of one word has no prefix. Arguments: those that both
    kinds have.
    """

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate for training.

        Raises:
            ValueError: no samples; a text that holds the image token.
        """
        batch, keys, pairs = self._begin(samples)
        draws = uniform(keys, 1, Stream.PREFIX)[:, 0].tolist()
        pairs = [
            _prefix(answer, draw) if not prompt and "text" in sample else (prompt, answer)
            for sample, (prompt, answer), draw in zip(samples, pairs, draws, strict=True)
        ]
        split = self._split(pairs)
        labels = [[*answer, *self.eos] for _, answer in split]
        return {
            **batch,
            **self._encoder([prompt for prompt, _ in split]),
            "labels": self._pad(labels, IGNORE),
            **self._qformer([prompt for prompt, _ in pairs]),
        }

    def prompts(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The same without answers: what ``generate`` takes."""
        batch, _, pairs = self._begin(samples)
        split = self._split([(prompt, "") for prompt, _ in pairs])
        return {
            **batch,
            **self._encoder([prompt for prompt, _ in split]),
            **self._qformer([prompt for prompt, _ in pairs]),
        }

    def _encoder(self, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        rows = [[*self.image, *self.bos, *prompt, *self.eos] for prompt in prompts]
        self._check(rows)
        return {"input_ids": self._pad(rows, self.pad), "attention_mask": self._mask(rows)}


def _prefix(caption: str, draw: float) -> tuple[str, str]:
    """A caption's first words and the others."""
    words = caption.split()
    if len(words) < 2:
        return "", caption
    border = 1 + int(draw * max(1, len(words) // 2))
    return " ".join(words[:border]), " ".join(words[border:])
