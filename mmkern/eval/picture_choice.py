"""Which of four pictures belongs into a text, on vendors that were never trained on.

The model's answer is the option whose letter is likeliest as the next token, from one forward. The
dull baselines stand beside it: chance, always the letter that is right most often, and the same
texts with other questions' pictures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkern.compose.emoji import EmojiChoice
from mmkern.compose.steps import LETTERS
from mmkern.data.emoji import EmojiData
from mmkern.data.randomness import Stream, permutation
from mmkern.eval.emoji import VENDOR_TITLES

__all__ = ["accuracy", "evaluate", "other_pictures", "table"]

Sample = Mapping[str, Any]


def other_pictures(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The same texts, each with the pictures of the next sample, in their order.

    Raises:
        ValueError: fewer than two samples, or samples with different numbers of pictures.
    """
    pictures = [[p for p in sample["pieces"] if not isinstance(p, str)] for sample in samples]
    if len(samples) < 2 or len({len(own) for own in pictures}) > 1:
        raise ValueError("other_pictures: needs two samples or more, with equally many pictures")
    changed = []
    for sample, others in zip(samples, [*pictures[1:], pictures[0]], strict=True):
        rest = iter(others)
        pieces = [piece if isinstance(piece, str) else next(rest) for piece in sample["pieces"]]
        changed.append({**sample, "pieces": pieces})
    return changed


@torch.no_grad()
def accuracy(model: Any, collator: Any, samples: Sequence[Sample], batch_size: int = 64) -> float:
    """Share of samples whose right letter has the largest logit; of equals none is right.

    Args:
        model: ``XComposer``.
        collator: its ``InterleavedCollator``.
        samples: of :class:`~mmkern.compose.emoji.EmojiChoice`.
        batch_size: samples at once.

    Raises:
        ValueError: no samples; letters that do not have one id each in the tokenizer.
    """
    if not samples:
        raise ValueError("accuracy: got no samples")
    model.eval()
    hits = 0
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        ids = [collator.answer_ids([(part[0], letter)])[0] for letter in LETTERS]
        first = [row[0] for row in ids]
        if len(set(first)) < len(LETTERS) or any(len(row) != len(ids[0]) for row in ids):
            raise ValueError(f"accuracy: the letters {LETTERS} have no ids of their own: {ids}")
        batch = {name: value.to(model.device) for name, value in collator.prompts(part).items()}
        logits = model(**batch, logits_to_keep=1).logits[:, -1, first].float().cpu()
        right = torch.tensor([LETTERS.index(sample["answer"]) for sample in part])
        hits += int(_wins(logits, right).sum())
    return hits / len(samples)


def _wins(logits: Tensor, right: Tensor) -> Tensor:
    own = logits.gather(1, right[:, None])
    return ((logits >= own) | logits.isnan()).sum(1) == 1


def evaluate(
    model: Any,
    collator: Any,
    size: int,
    *,
    vendors: Sequence[str],
    choices: int = 400,
    batch_size: int = 64,
    progress: Any = None,
) -> dict[str, Any]:
    """Accuracy on each vendor; keys for ``metrics.json``: ``vendors`` and ``picture_choice``.

    Args:
        model, collator, batch_size: as for :func:`accuracy`; no augmentation.
        size: edge of the pictures.
        vendors: to test.
        choices: at most so many, a fixed random selection.
        progress: called with a line of text before each part.
    """
    say = progress or (lambda line: None)
    data = EmojiData.load(size)
    found = {}
    for vendor in vendors:
        asked = EmojiChoice(data.test_view(vendor))
        rows = permutation(0, 0, len(asked), Stream.QUESTION)[:choices].tolist()
        samples = [asked[row] for row in rows]
        say(f"choices of pictures on {VENDOR_TITLES[vendor]}, {len(samples)} texts")
        letters = Counter(sample["answer"] for sample in samples)
        found[VENDOR_TITLES[vendor]] = {
            "texts": len(samples),
            "right": accuracy(model, collator, samples, batch_size),
            "shuffled": accuracy(model, collator, other_pictures(samples), batch_size),
            "majority": max(letters.values()) / len(samples),
            "chance": 1 / len(LETTERS),
        }
    return {"vendors": [VENDOR_TITLES[v] for v in vendors], "picture_choice": found}


def table(metrics: Mapping[str, Any]) -> str:
    """The results as text, baselines beside the model."""
    columns = ("right", "shuffled", "majority", "chance")
    lines = [f"{'one picture of four':<32}" + "".join(f"{name:>10}" for name in columns)]
    for title in metrics["vendors"]:
        scores = metrics["picture_choice"][title]
        cells = "".join(f"{100 * scores[name]:>9.1f}%" for name in columns)
        lines.append(f"{title + ', never trained on':<32}{cells}")
    return "\n".join(lines)
