"""Tables of the small real runs of BLIP-2 and what follows it, from their ``metrics.json``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.tables import NO_ROWS, markdown, percent

# System -> the key of metrics.json that only its runs have.
# (the first that fits).
MARKS = {
    "blip2-stage1": "rerank",
    "blip2-stage2": "captions",
    "xcomposer2": "text_loss",
    "instructblip": "questions",
}
WAYS = {"image_to_text": "image to text", "text_to_image": "text to image"}
MATCHING = {
    "contrast": "contrast",
    "reranked": "best {rerank} ranked again",
    "shuffled": "contrast, shuffled pictures",
    "majority": "always one answer",
    "chance": "chance",
}
ANSWERS = {
    "exact": "exact match",
    "shuffled_exact": "shuffled pictures",
    "majority": "majority answer",
    "ranked": "ranked",
    "shuffled_ranked": "ranked, shuffled pictures",
    "chance": "chance",
}


def system(metrics: dict[str, Any]) -> str | None:
    """The system whose run these metrics are of."""
    found = [name for name, mark in MARKS.items() if mark in metrics]
    return found[0] if found else None


def _matching(run: dict[str, Any]) -> str:
    header = ["", *(f"{way}, R@{k}" for way in WAYS.values() for k in (1, 5))]
    body = [
        [
            f"{title}: {label.format(rerank=run['rerank'])}",
            *(percent(scores[name].get(f"{way}_r{k}")) for way in WAYS for k in (1, 5)),
        ]
        for title, scores in run["retrieval"].items()
        for name, label in MATCHING.items()
    ]
    return markdown(header, body)


def _captions(run: dict[str, Any]) -> str:
    rows = {f"{title}, captions": scores for title, scores in run["captions"].items()}
    return _answers(rows)


def _questions(run: dict[str, Any]) -> str:
    held_out = run["held_out"]
    rows = {
        f"{title}, {kind}" + (", never trained" if kind in held_out else ""): scores
        for title, kinds in run["questions"].items()
        for kind, scores in kinds.items()
    }
    return _answers(rows)


def _with_text(run: dict[str, Any]) -> str:
    before, after = (run["text_loss"][when] for when in ("before", "after"))
    return f"{_questions(run)}\n\nLoss of plain text: {before!r} before training, {after!r} after."


def _answers(rows: dict[str, dict[str, float]]) -> str:
    header = ["", *ANSWERS.values(), "questions"]
    body = [
        [label, *(percent(scores[key]) for key in ANSWERS), f"{scores['questions']:,.0f}"]
        for label, scores in rows.items()
    ]
    return markdown(header, body)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "blip2-stage1": _matching,
    "blip2-stage2": _captions,
    "instructblip": _questions,
    "xcomposer2": _with_text,
}


def table(name: str, runs: list[dict[str, Any]]) -> str:
    """The last recorded run of a system on each device."""
    mine = [run for run in runs if system(run) == name]
    parts = []
    for run in {(run["device"], run["threads"]): run for run in mine}.values():
        changes = " with local changes" if run["dirty"] else ""
        parts.append(
            f"{TABLES[name](run)}\n\n"
            f"{run['steps']:,} steps in {run['train_seconds']:,.0f} s, measured in "
            f"{run['eval_seconds']:,.0f} s; {run['device']}, {run['threads']} threads; commit "
            f"{run['commit']}{changes}; {run['date'][:10]}."
        )
    return "\n\n".join(parts) or NO_ROWS
