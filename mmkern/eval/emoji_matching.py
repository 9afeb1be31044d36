"""Retrieval of emoji by BLIP-2's first stage: by contrast, and after re-ranking by matching.

Every picture of a vendor that was never trained on is a query for its name among all names that the
vendor has, and every name one for its picture. Names with the very same picture are all right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkern.data.emoji import EmojiData, EmojiView
from mmkern.data.randomness import Stream, permutation, sample_keys
from mmkern.eval.emoji import VENDOR_TITLES
from mmkern.eval.matching import retrieve

KS = (1, 5)


@torch.no_grad()
def evaluate(
    model: Any,
    collator: Any,
    size: int,
    *,
    vendors: Sequence[str],
    template: str,
    rerank: int = 16,
    contrast_weight: float = 1.0,
    pictures: int | None = None,
    batch_size: int = 128,
    progress: Any = None,
) -> dict[str, Any]:
    """Recall on each vendor; keys for ``metrics.json``: ``vendors``, ``retrieval``.

    Args:
        model: ``Blip2ForPretraining``.
        collator: its ``PretrainingCollator``, without augmentation.
        size: edge of the pictures.
        vendors: to test.
        template: the names' prompt.
        rerank, contrast_weight: the candidates of each query that matching scores again, and the
            weight of the contrastive score beside it.
        pictures: how many, a fixed random choice; None is all.
        batch_size: pictures, or pairs, at once.
        progress: called with a line of text before each part.
    """
    say = progress or (lambda line: None)
    model.eval()
    data = EmojiData.load(size)
    found = {}
    for vendor in vendors:
        view = data.test_view(vendor)
        if pictures is not None:
            order = permutation(0, 0, len(view), Stream.QUESTION)[:pictures]
            view = view.subset(torch.from_numpy(order))
        say(f"retrieval on {VENDOR_TITLES[vendor]}, {len(view)} pictures")
        found[VENDOR_TITLES[vendor]] = _vendor(
            model, collator, view, template, rerank, contrast_weight, batch_size
        )
    return {"vendors": [VENDOR_TITLES[v] for v in vendors], "retrieval": found, "rerank": rerank}


def _vendor(
    model: Any,
    collator: Any,
    view: EmojiView,
    template: str,
    rerank: int,
    contrast_weight: float,
    batch_size: int,
) -> dict[str, Any]:
    pixels = collator.transform.batch(view.pictures, sample_keys(0, 0, range(len(view))))
    tokens = torch.cat(
        [model.encode_image(part.to(model.device)).cpu() for part in pixels.split(batch_size)]
    )
    names, first = torch.unique(view.name_ids, return_inverse=True)
    groups = view.group_ids()
    text_groups = torch.empty(len(names), dtype=torch.long)
    text_groups[first] = groups
    texts = collator.tokenizer(
        [template.replace("{}", view.names[i]) for i in names.tolist()],
        padding=True,
        return_tensors="pt",
    )
    match = groups[:, None] == text_groups[None]
    return {
        "pictures": len(view),
        **retrieve(
            model,
            tokens,
            texts["input_ids"],
            texts["attention_mask"],
            match,
            rerank,
            contrast_weight,
            batch_size,
            KS,
        ),
        "chance": _chance(match),
        # One name for every picture, and one picture for every name.
        "majority": {
            "image_to_text_r1": match.double().mean(0).max().item(),
            "text_to_image_r1": match.double().mean(1).max().item(),
        },
    }


def _chance(match: Tensor) -> dict[str, float]:
    """Of k candidates drawn at random, for small k: k times the share that is right."""
    shares = {"image_to_text": match.double().mean(1), "text_to_image": match.double().mean(0)}
    return {
        f"{way}_r{k}": (1 - (1 - share) ** k).mean().item()
        for way, share in shares.items()
        for k in KS
    }


def table(metrics: Mapping[str, Any]) -> str:
    """The results as text, baselines beside the model."""
    keys = [f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in KS]
    heads = ["image to text", "", "text to image", ""]
    lines = []
    for title in metrics["vendors"]:
        scores = metrics["retrieval"][title]
        lines += [
            f"{title}, never trained on, {scores['pictures']:,} pictures",
            _row("", heads),
            _row("", [f"R@{k}" for k in KS] * 2),
        ]
        rows = {
            "contrast": "contrast",
            f"{metrics['rerank']} best ranked again": "reranked",
            "shuffled pictures": "shuffled",
            "always one answer": "majority",
            "chance": "chance",
        }
        for label, name in rows.items():
            cells = [f"{100 * scores[name][k]:.2f}%" if k in scores[name] else "" for k in keys]
            lines.append(_row(label, cells))
        lines.append("")
    return "\n".join(lines).rstrip()


def _row(label: str, cells: Sequence[str]) -> str:
    return f"{label:<28}" + "".join(f"{cell:>15}" for cell in cells)
