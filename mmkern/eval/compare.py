"""Several systems side by side on the same held-out pictures and questions.

What ``mmkern eval`` wrote of each run is put into one table: a row is one task (captions, or a kind
of question) on one vendor with so many questions, and only runs that were measured on the very same
are in it. CLIP writes no text; it is asked the same tasks here, and its answer is the candidate
whose prompt lies nearest to the picture. It is not asked what neither a name nor a kind of thing
answers ("yes").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmkern.data.emoji import EmojiData
from mmkern.data.randomness import sample_keys
from mmkern.eval.answers import exact_match, shuffled_pictures
from mmkern.eval.emoji import VENDOR_TITLES, EmojiEncoder
from mmkern.eval.emoji_answers import CANDIDATES, Task, captions, questions
from mmkern.eval.plots import agg_figure
from mmkern.eval.zero_shot import build_classifier

__all__ = ["Key", "clip_scores", "figure", "rows", "table"]

CAPTIONS = "captions"
NOT_FOR_CLIP = ("yes_no",)
_BASELINES = ("chance", "majority")
_SCORES = {"ranked": "shuffled_ranked", "exact": "shuffled_exact"}


class Key(NamedTuple):
    """What runs must share to be compared: vendor's title, task, number of questions, categories
    (none: all)."""

    vendor: str
    task: str
    questions: int
    categories: tuple[str, ...] = ()


def rows(metrics: Mapping[str, Any]) -> dict[Key, dict[str, float]]:
    """The tasks that a run's ``metrics.json`` has scores of; CLIP's has none."""
    found: dict[Key, dict[str, float]] = {}
    of = tuple(metrics.get("categories", ()))
    for vendor, scores in metrics.get("captions", {}).items():
        found[Key(vendor, CAPTIONS, int(scores["questions"]), of)] = scores
    for vendor, kinds in metrics.get("questions", {}).items():
        for kind, scores in kinds.items():
            found[Key(vendor, kind, int(scores["questions"]), of)] = scores
    return found


def clip_scores(
    encoder: EmojiEncoder, keys: Sequence[Key], templates: Sequence[str]
) -> dict[Key, dict[str, float]]:
    """A CLIP's ranking of the same tasks' candidates, and with other pictures.

    Args:
        encoder: the model.
        keys: tasks that other runs were measured on.
        templates: prompts that candidates are put into and averaged over.
    """
    data = EmojiData.load(encoder.model.config.image_size)
    codes = {title: code for code, title in VENDOR_TITLES.items()}
    found = {}
    for key in keys:
        if key.task in NOT_FOR_CLIP:
            continue
        view = data.test_view(codes[key.vendor], key.categories or None)
        task = (
            captions(view, key.questions, CANDIDATES)
            if key.task == CAPTIONS
            else questions(view, key.task, key.questions)
        )
        found[key] = {
            "ranked": _ranked(encoder, task, task.samples, templates),
            "shuffled_ranked": _ranked(encoder, task, shuffled_pictures(task.samples), templates),
        }
    return found


def _ranked(
    encoder: EmojiEncoder, task: Task, samples: Sequence[Any], templates: Sequence[str]
) -> float:
    model = encoder.model
    pictures = [sample["image"] for sample in samples]
    pixels = encoder.transform.batch(pictures, sample_keys(0, 0, range(len(pictures))))
    names = sorted({name for of in task.candidates for name in of})
    place = {name: column for column, name in enumerate(names)}
    classifier = build_classifier(encoder.texts, names, templates)
    best = []
    for start in range(0, len(pixels), encoder.batch_size):
        part = pixels[start : start + encoder.batch_size].to(model.device)
        logits = model.visual(part).detach().cpu() @ classifier
        lists = task.candidates[start : start + encoder.batch_size]
        for row, of in zip(logits, lists, strict=True):
            best.append(of[int(row[[place[name] for name in of]].argmax())])
    return exact_match(best, task.right)


def table(systems: Mapping[str, Mapping[Key, Mapping[str, float]]]) -> str:
    """The comparison as text: a row a task and score, the dull baselines first.

    Args:
        systems: run -> tasks -> scores, in the order of the columns.

    Raises:
        ValueError: no task that two runs share.
    """
    names = list(systems)
    width = max(10, *(len(name) + 2 for name in names))
    lines = []
    vendor = ""
    for key in shared(systems):
        if key.vendor != vendor:
            vendor = key.vendor
            lines += ["", f"{vendor}, never trained on"]
            lines.append(_line("", [*_BASELINES, *names], width))
        for score, other in _SCORES.items():
            of = {name: systems[name].get(key, {}) for name in names}
            baseline = _baselines(list(of.values()), score)
            label = f"{key.task}, {score} ({key.questions})"
            cells = [_cell(baseline[b]) for b in _BASELINES]
            lines.append(_line(label, [*cells, *(_cell(s.get(score)) for s in of.values())], width))
            other_cells = [_cell(s.get(other)) for s in of.values()]
            lines.append(_line("  other pictures", ["", "", *other_cells], width))
    return "\n".join(lines).strip("\n")


def shared(systems: Mapping[str, Mapping[Key, Any]]) -> list[Key]:
    """Tasks that at least two runs were measured on, by vendor.

    Raises:
        ValueError: none.
    """
    counts: dict[Key, int] = {}
    for of in systems.values():
        for key in of:
            counts[key] = counts.get(key, 0) + 1
    vendors = list(dict.fromkeys(key.vendor for key in counts))
    found = [key for key, count in counts.items() if count > 1]
    if not found:
        raise ValueError(
            "compare: no task was measured on the same pictures by two of the runs; they have "
            + "; ".join(
                f"{name}: {', '.join(sorted({f'{k.task} ({k.questions})' for k in of})) or 'none'}"
                for name, of in systems.items()
            )
        )
    return sorted(found, key=lambda key: vendors.index(key.vendor))


def figure(systems: Mapping[str, Mapping[Key, Mapping[str, float]]], path: str | Path) -> None:
    """The rankings as bars, chance as a line across each task, a panel a vendor; a PNG."""
    keys = shared(systems)
    vendors = list(dict.fromkeys(key.vendor for key in keys))
    longest = max(sum(key.vendor == vendor for key in keys) for vendor in vendors)
    drawn = agg_figure(2.5 + 1.5 * longest, 3.2 * len(vendors))
    for number, vendor in enumerate(vendors, 1):
        axes = drawn.add_subplot(len(vendors), 1, number)
        own = [key for key in keys if key.vendor == vendor]
        step = 0.8 / len(systems)
        for place, (name, of) in enumerate(systems.items()):
            columns = [x for x, key in enumerate(own) if "ranked" in of.get(key, {})]
            heights = [100 * of[own[x]]["ranked"] for x in columns]
            left = -0.4 + step * (place + 0.5)
            axes.bar([x + left for x in columns], heights, step, label=name, color=f"C{place}")
        for x, key in enumerate(own):
            chance = _baselines([of.get(key, {}) for of in systems.values()], "ranked")["chance"]
            if chance is not None:
                axes.plot([x - 0.4, x + 0.4], 2 * [100 * chance], color="0.3", linestyle=":")
        axes.set_xticks(range(len(own)), [f"{key.task}\n{key.questions}" for key in own])
        axes.set(ylabel="right, ranked, %", ylim=(0, 100), title=f"{vendor}, never trained on")
        if number == 1:
            axes.legend(fontsize=8)
    drawn.tight_layout()
    drawn.savefig(path, dpi=110)


def _baselines(scores: Sequence[Mapping[str, float]], score: str) -> dict[str, float | None]:
    """Chance of ranking; the most frequent answer. The same for every run of a task."""
    first = next((of for of in scores if "chance" in of), {})
    majority = first.get("majority")
    return {"chance": first.get("chance") if score == "ranked" else None, "majority": majority}


def _cell(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def _line(label: str, cells: Sequence[str], width: int) -> str:
    return (f"{label:<28}" + "".join(f"{cell:>{width}}" for cell in cells)).rstrip()
