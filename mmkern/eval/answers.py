"""Captions and answers of a language model, scored without judges.

Two scores. *Exact match*: what the model generates, against the right answers, after lowercasing
and removing articles. *Ranking*: which of several candidates the model finds likeliest,
``argmax_c Σ log p(c_t | picture, prompt, c_<t)``, the end of the answer included. Beside them stand
the dull baselines: chance, the most frequent answer, and the same model shown other pictures.

Works for any model here with ``generate``, ``embed`` and a ``language_model`` of transformers, and
any collator with ``prompts`` and ``answer_ids``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Answerer",
    "exact_match",
    "majority",
    "normalise",
    "shuffled_pictures",
]

Sample = Mapping[str, Any]
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"'})


def normalise(text: str) -> str:
    """Lower case, no articles, no full stop at the end, straight quotes, single spaces.

    A text of an article alone ("A", a key's name) stays.
    """
    text = " ".join(text.translate(_QUOTES).lower().split()).rstrip(".").strip()
    bare = " ".join(_ARTICLES.sub(" ", text).split())
    return bare or text


def exact_match(said: Sequence[str], right: Sequence[Sequence[str]]) -> float:
    """Share of texts that equal one of their right answers, both normalised.

    Raises:
        ValueError: numbers that differ, or none.
    """
    if len(said) != len(right) or not said:
        raise ValueError(
            f"exact_match: expected as many sets of answers as texts, at least one, got "
            f"{len(right)} and {len(said)}"
        )
    hits = [
        normalise(text) in {normalise(answer) for answer in answers}
        for text, answers in zip(said, right, strict=True)
    ]
    return sum(hits) / len(hits)


def majority(right: Sequence[Sequence[str]]) -> float:
    """Exact match of always giving the answer that is right most often."""
    counts = Counter(answer for answers in right for answer in {normalise(a) for a in answers})
    return max(counts.values()) / len(right)


def shuffled_pictures(samples: Sequence[Sample], seed: int = 0) -> list[dict[str, Any]]:
    """The same questions, each with another one's picture (a random cycle)."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    after = dict(zip(order, order[1:] + order[:1], strict=True))
    return [{**sample, "image": samples[after[i]]["image"]} for i, sample in enumerate(samples)]


class Answerer:
    """A model with its collator: generates answers, ranks candidates; in eval mode.

    Args:
        model: of the second stage of BLIP-2, InstructBLIP, or any with their interface.
        collator: of :mod:`mmkern.data.language`.
        batch_size: samples at once.
        max_new_tokens: of generated answers.
        options: further ones of ``generate`` (``num_beams``, ``length_penalty``).
    """

    def __init__(
        self,
        model: Any,
        collator: Any,
        *,
        batch_size: int = 64,
        max_new_tokens: int = 16,
        **options: Any,
    ) -> None:
        self.model, self.collator, self.batch_size = model.eval(), collator, batch_size
        self.options = {"max_new_tokens": max_new_tokens, "do_sample": False, **options}
        self.seq2seq: bool = model.language_model.config.is_encoder_decoder
        tokenizer = collator.tokenizer
        self.options.setdefault("pad_token_id", collator.pad)
        self.options.setdefault("eos_token_id", collator.eos[-1])
        self.decode = tokenizer.batch_decode

    def _prompts(self, samples: Sequence[Sample]) -> dict[str, Any]:
        batch = self.collator.prompts(samples)
        device = self.model.device
        return {
            name: [v.to(device) for v in value] if isinstance(value, list) else value.to(device)
            for name, value in batch.items()
        }

    @torch.no_grad()
    def generate(self, samples: Sequence[Sample]) -> list[str]:
        """An answer to each."""
        said: list[str] = []
        for start in range(0, len(samples), self.batch_size):
            batch = self._prompts(samples[start : start + self.batch_size])
            ids = self.model.generate(**batch, **self.options)
            new = ids if self.seq2seq else ids[:, batch["input_ids"].shape[1] :]
            said += [text.strip() for text in self.decode(new, skip_special_tokens=True)]
        return said

    @torch.no_grad()
    def rank(self, samples: Sequence[Sample], candidates: Sequence[Sequence[str]]) -> list[Tensor]:
        """Log-likelihood of each sample's candidates, the end of the answer included.

        A prompt is computed once for all its candidates.

        Raises:
            ValueError: numbers that differ, or a sample without candidates.
        """
        if len(samples) != len(candidates) or not all(candidates):
            raise ValueError(
                f"rank: every sample needs candidates, got {len(candidates)} lists for "
                f"{len(samples)} samples"
            )
        scores: list[Tensor] = []
        for start in range(0, len(samples), self.batch_size):
            stop = start + self.batch_size
            scores += self._rank(samples[start:stop], candidates[start:stop])
        return scores

    def _rank(self, samples: Sequence[Sample], candidates: Sequence[Sequence[str]]) -> list[Tensor]:
        counts = [len(of) for of in candidates]
        pairs = [(s, c) for s, of in zip(samples, candidates, strict=True) for c in of]
        rows = self.collator.answer_ids(pairs)
        width = max(map(len, rows))
        labels = torch.full((len(rows), width), -100)
        for number, row in enumerate(rows):
            labels[number, : len(row)] = torch.tensor(row)
        owner = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(counts))
        device = self.model.device
        labels, owner = labels.to(device), owner.to(device)
        batch = self._prompts(samples)
        score = self._decoder if self.seq2seq else self._continuation
        logits = score(batch, labels, owner).float()
        found = -torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
        )
        return list(found.view(labels.shape).sum(1).cpu().split(counts))

    def _embeddings(self, batch: dict[str, Tensor]) -> Tensor:
        names = ("pixel_values", "qformer_input_ids", "qformer_attention_mask")
        features = self.model.image_features(*(batch[name] for name in names if name in batch))
        return self.model.embed(batch["input_ids"], features)

    def _decoder(self, batch: dict[str, Tensor], labels: Tensor, owner: Tensor) -> Tensor:
        """Logits [R, T, V] of an encoder-decoder; the encoder runs once a prompt."""
        language = self.model.language_model
        mask = batch["attention_mask"]
        encoded = language.get_encoder()(
            inputs_embeds=self._embeddings(batch), attention_mask=mask
        ).last_hidden_state
        return language(
            encoder_outputs=(encoded[owner],), attention_mask=mask[owner], labels=labels
        ).logits

    def _continuation(self, batch: dict[str, Tensor], labels: Tensor, owner: Tensor) -> Tensor:
        """Logits [R, T, V] of a decoder: those after the prompt, then after each token but one."""
        language, mask = self.model.language_model, batch["attention_mask"]
        place = (mask.cumsum(1) - 1).clamp(min=0)
        spans = {"spans": batch["spans"]} if "spans" in batch else {}
        before = language(
            inputs_embeds=self._embeddings(batch),
            **spans,
            attention_mask=mask,
            position_ids=place,
            use_cache=True,
            logits_to_keep=1,
        )
        first = before.logits[owner]
        if labels.shape[1] == 1:
            return first
        cache = before.past_key_values
        cache.batch_select_indices(owner)
        ids = labels[:, :-1].clamp(min=0)
        steps = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        after = language(
            input_ids=ids,
            attention_mask=torch.cat([mask[owner], torch.ones_like(ids)], 1),
            position_ids=place[owner, -1:] + steps,
            past_key_values=cache,
            use_cache=True,
        )
        return torch.cat([first, after.logits], 1)
