"""Captions of emoji and answers to questions about them, on vendors that were never trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmkern.data.emoji import EmojiData, EmojiView
from mmkern.data.emoji_grids import GRID_KINDS, EmojiGrids
from mmkern.data.emoji_questions import HELD_OUT_KINDS, KINDS, EmojiQuestions
from mmkern.data.randomness import Stream, permutation, sample_keys, uniform
from mmkern.eval.answers import Answerer, exact_match, majority, shuffled_pictures
from mmkern.eval.emoji import VENDOR_TITLES, check_vendors

CANDIDATES = 20  # names among which a caption is ranked
# What may be asked; grids are twice as high and wide, and not every system takes them.
ASKED = (*KINDS, "caption", *GRID_KINDS)


@dataclass(frozen=True)
class Task:
    """Samples with their right answers and, for ranking, candidates."""

    samples: list[Any]
    right: list[list[str]]
    candidates: list[list[str]]


def captions(view: EmojiView, count: int, candidates: int = CANDIDATES, seed: int = 0) -> Task:
    """Pictures to be named; a random choice of them, the same each time.

    Candidates are the picture's name and others that are wrong, drawn from the view's names. Names
    with the very same picture are all right.
    """
    rows = permutation(seed, 0, len(view), Stream.QUESTION)[:count].tolist()
    answers = view.answer_matrix()
    names = sorted({view.names[i] for i in view.name_ids.tolist()})
    samples, right, lists = [], [], []
    draws = uniform(sample_keys(seed, 0, rows), 3 * candidates, Stream.ANSWER)
    for row, draw in zip(rows, draws, strict=True):
        own = view.names[int(view.name_ids[row])]
        allowed = [view.names[i] for i in answers[row].nonzero().flatten().tolist()]
        others = dict.fromkeys(names[int(d * len(names))] for d in draw.tolist())
        wrong = [name for name in others if name not in allowed][: candidates - 1]
        samples.append(view[row])
        right.append([own, *(name for name in allowed if name != own)])
        lists.append([own, *wrong])
    return Task(samples, right, lists)


def questions(view: EmojiView, kind: str, count: int, seed: int = 0) -> Task:
    """Questions of one kind; candidates are all its answers.

    Those of ``name`` and ``caption`` are some names, of ``either`` the two, of ``place`` the four
    in the grid.
    """
    if kind == "caption":
        return captions(view, count, seed=seed)
    if kind in GRID_KINDS:
        grids = EmojiGrids(view, kind, seed)
        order = permutation(seed, 0, len(grids), Stream.QUESTION)[:count].tolist()
        chosen = [grids[row] for row in order]
        return Task(chosen, [[s["answer"]] for s in chosen], [s["candidates"] for s in chosen])
    asked = EmojiQuestions(view, kind, seed)
    rows = permutation(seed, 0, len(asked), Stream.QUESTION)[:count].tolist()
    if kind == "name":
        named = captions(view, count, seed=seed)
        first = {"kind": kind, "subject": ""}
        samples = [
            {**{k: v for k, v in sample.items() if k != "text"}, **first, "answer": right[0]}
            for sample, right in zip(named.samples, named.right, strict=True)
        ]
        return Task(samples, named.right, named.candidates)
    samples = [dict(asked[row]) for row in rows]
    lists = [
        sample["subject"].split(" or ") if kind == "either" else list(asked.answers)
        for sample in samples
    ]
    return Task(samples, [[sample["answer"]] for sample in samples], lists)


def measure(answerer: Answerer, task: Task) -> dict[str, float]:
    """Exact match and ranking, each with the right and with other pictures, beside baselines.

    Keys: ``exact``, ``ranked``, their ``shuffled_`` forms, ``chance`` of ranking, ``majority``, and
    how many ``questions``.
    """
    scores: dict[str, float] = {"questions": len(task.samples)}
    for prefix, samples in (("", task.samples), ("shuffled_", shuffled_pictures(task.samples))):
        scores[f"{prefix}exact"] = exact_match(answerer.generate(samples), task.right)
        ranked = answerer.rank(samples, task.candidates)
        best = [of[int(s.argmax())] for of, s in zip(task.candidates, ranked, strict=True)]
        scores[f"{prefix}ranked"] = exact_match(best, task.right)
    scores["chance"] = float(np.mean([1 / len(of) for of in task.candidates]))
    scores["majority"] = majority(task.right)
    return scores


def check_options(options: Mapping[str, Any], trained: Sequence[str], known: set[str]) -> None:
    """Refuse what cannot be measured, before anything is loaded.

    Raises:
        ValueError: unknown options, kinds or vendors, or a vendor that was trained on.
    """
    if unknown := set(options) - known:
        raise ValueError(f"evaluation.options: expected {sorted(known)}, got {sorted(unknown)}")
    check_vendors(options.get("vendors", ()), trained)
    if unknown := set(options.get("kinds", KINDS)) - set(ASKED):
        raise ValueError(f"evaluation.options.kinds: expected {ASKED}, got {sorted(unknown)}")


def evaluate_captions(
    answerer: Answerer,
    size: int,
    *,
    vendors: Sequence[str],
    categories: Sequence[str] | None = None,
    pictures: int = 600,
    candidates: int = CANDIDATES,
    progress: Any = None,
) -> dict[str, Any]:
    """Captions on each vendor; keys for ``metrics.json``: ``vendors`` and ``captions``.

    ``categories`` are the only ones to test, None all; of their pictures at most ``pictures``.
    """
    say = progress or (lambda line: None)
    data = EmojiData.load(size)
    found = {}
    for vendor in vendors:
        say(f"captions on {VENDOR_TITLES[vendor]}")
        task = captions(data.test_view(vendor, categories), pictures, candidates)
        found[VENDOR_TITLES[vendor]] = measure(answerer, task)
    titles = [VENDOR_TITLES[v] for v in vendors]
    return {"vendors": titles, "categories": list(categories or ()), "captions": found}


def evaluate_questions(
    answerer: Answerer,
    size: int,
    *,
    trained: Sequence[str],
    vendors: Sequence[str],
    categories: Sequence[str] | None = None,
    kinds: Sequence[str] = KINDS,
    questions_each: int = 200,
    progress: Any = None,
) -> dict[str, Any]:
    """Questions of each kind on each vendor; keys: ``vendors``, ``questions``, ``held_out``.

    Args:
        answerer: the model.
        size: edge of its pictures.
        trained: the kinds that were trained; the others are held out.
        vendors, kinds: to test.
        categories: the only ones whose pictures are asked about; None is all.
        questions_each: at most so many of a kind.
        progress: called with a line of text before each part.
    """
    say = progress or (lambda line: None)
    data = EmojiData.load(size)
    found: dict[str, dict[str, Any]] = {}
    for vendor in vendors:
        view = data.test_view(vendor, categories)
        of_vendor = found.setdefault(VENDOR_TITLES[vendor], {})
        for kind in kinds:
            say(f"{kind} questions on {VENDOR_TITLES[vendor]}")
            of_vendor[kind] = measure(answerer, questions(view, kind, questions_each))
    held_out = [kind for kind in kinds if kind not in trained]
    titles = [VENDOR_TITLES[v] for v in vendors]
    return {
        "vendors": titles,
        "categories": list(categories or ()),
        "questions": found,
        "held_out": held_out,
    }


_COLUMNS = {
    "exact": "exact",
    "shuffled_exact": "shuffled",
    "majority": "majority",
    "ranked": "ranked",
    "shuffled_ranked": "shuffled",
    "chance": "chance",
}


def table(metrics: Mapping[str, Any]) -> str:
    """The results as text, baselines beside the model."""
    lines = []
    for title in metrics["vendors"]:
        lines += [f"{title}, never trained on", _row("", _COLUMNS.values())]
        if "captions" in metrics:
            lines.append(_scores("captions", metrics["captions"][title]))
        held_out = metrics.get("held_out", HELD_OUT_KINDS)
        for kind, scores in metrics.get("questions", {}).get(title, {}).items():
            lines.append(_scores(kind + (", never trained" if kind in held_out else ""), scores))
        lines.append("")
    if "text_loss" in metrics:
        before, after = (metrics["text_loss"][when] for when in ("before", "after"))
        lines.append(
            f"loss of plain text: {before:.6f} before training, {after:.6f} after"
            + (", the same to the last bit" if before == after else "")
        )
    return "\n".join(lines).rstrip()


def _scores(label: str, scores: Mapping[str, float]) -> str:
    return _row(label, (f"{100 * scores[key]:.1f}%" for key in _COLUMNS))


def _row(label: str, cells: Any) -> str:
    return f"{label:<24}" + "".join(f"{cell:>10}" for cell in cells)
