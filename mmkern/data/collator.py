"""From samples to the batch that a contrastive model takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mmkern.data.pairs import Sample
from mmkern.data.randomness import Keys, Stream, sample_keys, uniform

__all__ = ["BatchTransform", "ContrastiveCollator"]


class BatchTransform(Protocol):
    """What prepares pictures: ``ClipTransform`` for PIL images, ``PixelTransform`` for tensors."""

    def batch(self, pictures: Any, keys: Keys, /) -> Tensor:
        """float32 [B, 3, H, W] from B pictures and a key for each one's random choices."""


class ContrastiveCollator:
    """Collates samples into {"pixel_values": float32 [B, 3, H, W], "input_ids": int64 [B, L]}.

    Pictures are augmented, and a caption template is chosen, by (seed, epoch, index) of the sample:
    the batch does not depend on the worker that makes it, nor on what was made before it.

    Args:
        transform: ``ClipTransform`` or ``PixelTransform``, or any object with their ``batch``.
        tokenizer: texts to int64 [B, L].
        seed: of augmentation and templates.
        templates: each text is put in the place of "{}" in one of them, e.g.
            ("{}", "an emoji of {}").

    Raises:
        ValueError: no template, or one without exactly one "{}".
    """

    def __init__(
        self,
        transform: BatchTransform,
        tokenizer: Callable[[list[str]], Tensor],
        seed: int = 0,
        *,
        templates: Sequence[str] = ("{}",),
    ) -> None:
        if not templates or any(template.count("{}") != 1 for template in templates):
            raise ValueError(
                f"ContrastiveCollator: templates must have one '{{}}' each, got {list(templates)}"
            )
        self.transform = transform
        self.tokenizer = tokenizer
        self.seed = seed
        self.templates = tuple(templates)
        self._token_rows: dict[str, int] = {}
        self._tokens: Tensor | None = None

    def pretokenize(self, texts: Iterable[str]) -> None:
        """Tokenize these texts in every template once, for data with few distinct captions."""
        captions = {
            self._fill(t, text): None for text in dict.fromkeys(texts) for t in self.templates
        }
        self._tokens = self.tokenizer(list(captions))
        self._token_rows = {caption: row for row, caption in enumerate(captions)}

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Collate samples of any of the data sets here.

        Raises:
            ValueError: no samples.
        """
        if not samples:
            raise ValueError("ContrastiveCollator: got no samples")
        keys = sample_keys(
            self.seed,
            [sample["epoch"] for sample in samples],
            [sample["index"] for sample in samples],
        )
        return {
            "pixel_values": self.transform.batch([sample["image"] for sample in samples], keys),
            "input_ids": self._tokenize(self._captions(samples, keys)),
        }

    def _captions(self, samples: Sequence[Sample], keys: Keys) -> list[str]:
        choices = uniform(keys, 1, Stream.TEMPLATE)[:, 0] * len(self.templates)
        return [
            self._fill(self.templates[choice], sample["text"])
            for choice, sample in zip(choices.astype(int).tolist(), samples, strict=True)
        ]

    @staticmethod
    def _fill(template: str, text: str) -> str:
        # Not str.format: braces elsewhere in a template or a text are only braces.
        return template.replace("{}", text)

    def _tokenize(self, captions: list[str]) -> Tensor:
        rows = [self._token_rows.get(caption) for caption in captions]
        if self._tokens is None or None in rows:
            return self.tokenizer(captions)
        return self._tokens[torch.tensor(rows)]
