"""Few-shot naming by a Flamingo: accuracy by the number of shots, beside what needs no picture.

A query's name is ranked among candidates by ``Σ log p(token | pictures, shots, tokens before)``,
the end of the chunk included. The candidates hold the names of the shots. Beside the model stand
chance, the most frequent answer, the same model shown another query's picture, and the language
model alone, which reads the shots' names but sees nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmkern.data.emoji import EmojiData, EmojiView
from mmkern.data.emoji_episodes import PROMPT, EmojiEpisodes
from mmkern.data.randomness import Stream, permutation, sample_keys, uniform
from mmkern.eval.emoji import VENDOR_TITLES
from mmkern.eval.rices import Rices

__all__ = ["evaluate", "rank", "table"]

Sample = Mapping[str, Any]


@torch.no_grad()
def rank(
    model: Any,
    collator: Any,
    samples: Sequence[Sample],
    candidates: Sequence[Sequence[str]],
    *,
    pictures: bool = True,
    batch_size: int = 16,
) -> list[Tensor]:
    """Log-likelihood of each sample's candidates behind its prompt; the prompt is computed once.

    Args:
        model: a Flamingo, in eval mode.
        collator: an ``DocumentCollator``.
        samples: with ``texts`` whose last is a prompt.
        candidates: texts, one list a sample.
        pictures: False: the language model alone.
        batch_size: prompts at once.
    """
    found: list[Tensor] = []
    for start in range(0, len(samples), batch_size):
        part = slice(start, start + batch_size)
        found += _rank(model, collator, samples[part], candidates[part], pictures)
    return found


def _rank(
    model: Any,
    collator: Any,
    samples: Sequence[Sample],
    candidates: Sequence[Sequence[str]],
    pictures: bool,
) -> list[Tensor]:
    device, language = model.device, model.language_model
    batch = {k: v.to(device) for k, v in collator.prompts(samples).items()}
    ids, mask = batch["input_ids"], batch["attention_mask"]
    counts = [len(of) for of in candidates]
    texts = [f" {text}" for of in candidates for text in of]
    rows = collator.tokenizer(texts, add_special_tokens=False)["input_ids"]
    width = max(map(len, rows)) + 1
    labels = torch.full((len(rows), width), -100)
    for number, row in enumerate(rows):
        labels[number, : len(row) + 1] = torch.tensor([*row, collator.end])
    labels = labels.to(device)
    owner = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(counts)).to(device)
    media = model.media(batch.get("pixel_values"), ids, batch["image_index"], keep=True)
    layers = model.gated_cross_attn_layers
    with layers.reading(media) if pictures else nullcontext():
        place = (mask.cumsum(1) - 1).clamp(min=0)
        before = language(
            input_ids=ids,
            attention_mask=mask,
            position_ids=place,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = before.past_key_values
        cache.batch_select_indices(owner)
        media.rows = owner
        new = labels[:, :-1].clamp(min=0)
        steps = torch.arange(1, new.shape[1] + 1, device=device)
        after = language(
            input_ids=new,
            attention_mask=torch.cat([mask[owner], torch.ones_like(new)], 1),
            position_ids=place[owner, -1:] + steps,
            past_key_values=cache,
            use_cache=True,
        )
    logits = torch.cat([before.logits[owner], after.logits], 1).float()
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
    )
    scores = -losses.view(labels.shape).sum(1)
    return list(scores.cpu().split(counts))


def evaluate(
    model: Any,
    collator: Any,
    size: int,
    *,
    trained: Sequence[str],
    vendors: Sequence[str],
    shots: Sequence[int] = (0, 2, 4),
    episodes: int = 60,
    candidates: int = 10,
    rices: bool = True,
    batch_size: int = 16,
    progress: Any = None,
) -> dict[str, Any]:
    """Episodes whose shots are of the trained vendors and whose query is of another.

    Returns:
        Keys for ``metrics.json``: ``vendors`` and ``episodes``: vendor -> shots -> scores, with
        "4, nearest" for shots that RICES chose instead (the name need not be among them).
    """
    say = progress or (lambda line: None)
    model = model.eval()
    data = EmojiData.load(size)
    support = data.view(trained)
    found: dict[str, Any] = {}
    for vendor in vendors:
        view = data.test_view(vendor)
        order = permutation(0, 0, len(view), Stream.QUESTION)[:episodes].tolist()
        of_vendor = found.setdefault(VENDOR_TITLES[vendor], {})
        for k in shots:
            say(f"{k} shots on {VENDOR_TITLES[vendor]}")
            made = EmojiEpisodes(support, view, shots=(k,))
            samples = [made[row] for row in order]
            of_vendor[str(k)] = _scores(model, collator, samples, view, candidates, batch_size)
        if rices and max(shots):
            say(f"nearest shots on {VENDOR_TITLES[vendor]}")
            samples = _nearest(model, collator, support, view, order, max(shots))
            scores = _scores(model, collator, samples, view, candidates, batch_size)
            of_vendor[f"{max(shots)}, nearest"] = scores
    return {"vendors": [VENDOR_TITLES[v] for v in vendors], "episodes": found}


def _nearest(
    model: Any,
    collator: Any,
    support: EmojiView,
    view: EmojiView,
    order: Sequence[int],
    k: int,
) -> list[dict[str, Any]]:
    """Episodes whose shots are nearest to the query in the frozen tower."""
    index = Rices(_features(model, collator, support.pictures))
    nearest = index.shots(_features(model, collator, view.pictures[list(order)]), k)
    plain = EmojiEpisodes(support, view, shots=(0,))
    names = [support.names[i] for i in support.name_ids.tolist()]
    samples = []
    for row, chosen in zip(order, nearest.tolist(), strict=True):
        query = plain[row]
        texts = ["", *(f"{PROMPT} {names[i]}" for i in chosen), *query["texts"][1:]]
        images = [*(support.pictures[i] for i in chosen), *query["images"]]
        samples.append({**query, "images": images, "texts": texts})
    return samples


@torch.no_grad()
def _features(model: Any, collator: Any, pictures: Tensor, chunk: int = 256) -> Tensor:
    """Mean of the tower's patches, [N, W]."""
    parts = []
    for start in range(0, len(pictures), chunk):
        part = pictures[start : start + chunk]
        pixels = collator.transform.batch(part, sample_keys(0, 0, range(len(part))))
        parts.append(model.vision_model(pixels.to(model.device)).mean(1).cpu())
    return torch.cat(parts)


def _scores(
    model: Any,
    collator: Any,
    samples: Sequence[Sample],
    view: EmojiView,
    candidates: int,
    batch_size: int,
) -> dict[str, float]:
    lists = _candidates(samples, view, candidates)
    asked = [{**s, "texts": [*s["texts"][:-1], PROMPT]} for s in samples]
    cycle = [*range(1, len(asked)), 0]
    wrong = [
        {**s, "images": [*s["images"][:-1], asked[j]["images"][-1]]}
        for s, j in zip(asked, cycle, strict=True)
    ]
    common: dict[str, Any] = {"batch_size": batch_size}
    seen = rank(model, collator, asked, lists, **common)
    other = rank(model, collator, wrong, lists, **common)
    blind = rank(model, collator, asked, lists, pictures=False, **common)
    counts = Counter(s["answer"] for s in samples)

    def right(scores: Sequence[Tensor]) -> float:
        # The right one is the first; another with its score counts as better.
        hits = [bool((s[0] > s[1:]).all()) for s in scores]
        return sum(hits) / len(hits)

    def loss(scores: Sequence[Tensor]) -> float:
        return -float(torch.stack([s[0] for s in scores]).mean())

    return {
        "episodes": len(samples),
        "accuracy": right(seen),
        "shuffled": right(other),
        "text_only": right(blind),
        "majority": max(counts.values()) / len(samples),
        "chance": sum(1 / len(of) for of in lists) / len(lists),
        "loss": loss(seen),
        "text_loss": loss(blind),
    }


def _candidates(samples: Sequence[Sample], view: EmojiView, count: int) -> list[list[str]]:
    """The right name first, those of the shots, then others, `count` in all."""
    names = sorted({view.names[i] for i in view.name_ids.tolist()})
    lists = []
    for sample in samples:
        shown = [text.removeprefix(f"{PROMPT} ") for text in sample["texts"][1:-1]]
        draws = uniform(sample_keys(0, 0, [sample["index"]]), 3 * count, Stream.ANSWER)[0]
        drawn = [names[int(draw * len(names))] for draw in draws.tolist()]
        lists.append(list(dict.fromkeys([sample["answer"], *shown, *drawn]))[:count])
    return lists


_COLUMNS = ("accuracy", "shuffled", "text_only", "majority", "chance")


def table(metrics: Mapping[str, Any]) -> str:
    """The results as text, baselines beside the model."""
    lines = []
    for title in metrics["vendors"]:
        heads = ("accuracy", "shuffled", "text only", "majority", "chance", "loss", "text only")
        lines += [f"{title}, never trained on", _row("shots", heads)]
        for shots, scores in metrics["episodes"][title].items():
            cells = [f"{100 * scores[key]:.1f}%" for key in _COLUMNS]
            cells += [f"{scores[key]:.2f}" for key in ("loss", "text_loss")]
            lines.append(_row(shots, cells))
        lines.append("")
    return "\n".join(lines).rstrip()


def _row(label: str, cells: Any) -> str:
    return f"{label:<14}" + "".join(f"{cell:>11}" for cell in cells)
