"""The emoji run's report: numbers for ``metrics.json``, pictures, and a table to read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkern.data.emoji import EmojiData
from mmkern.eval import emoji_robustness
from mmkern.eval.emoji import (
    VENDOR_TITLES,
    EmojiEncoder,
    best_names,
    category_probe,
    check_vendors,
    prompt_rows,
    retrieval,
    vendor_accuracy,
)
from mmkern.eval.plots import plot_predictions
from mmkern.eval.zero_shot import build_classifier

PARTS = ("prompts", "retrieval", "probe", "robustness")
GRID = 24


def check_options(
    options: Mapping[str, Any], trained: Sequence[str], reserve: Mapping[str, float] | None
) -> None:
    """Refuse what cannot be measured, before anything is loaded.

    Args:
        options: ``vendors`` to test on, and optionally ``parts`` of ``PARTS``.
        trained: the vendors of the training pictures.
        reserve: what was kept from training.

    Raises:
        ValueError: unknown options, parts or vendors, a vendor that was trained on, or robustness
            without reserved pictures.
    """
    if unknown := set(options) - {"vendors", "parts"}:
        raise ValueError(f"evaluation.options: expected vendors and parts, got {sorted(unknown)}")
    if unknown := set(options.get("parts", PARTS)) - set(PARTS):
        raise ValueError(f"evaluation.options.parts: expected {PARTS}, got {sorted(unknown)}")
    check_vendors(options.get("vendors", ()), trained)
    if "robustness" in options.get("parts", PARTS) and not reserve:
        raise ValueError(
            "evaluation.options.parts: robustness needs data.options.reserve, which this run does "
            "not have; leave it out"
        )


def evaluate(
    encoder: EmojiEncoder,
    directory: Path,
    *,
    trained: Sequence[str],
    vendors: Sequence[str],
    templates: Sequence[str],
    reserve: Mapping[str, float] | None = None,
    parts: Sequence[str] = PARTS,
    progress: Any = None,
) -> dict[str, Any]:
    """Measure a model on vendors that it was not trained on, and draw what it answers.

    Args:
        encoder: the model.
        directory: for ``pictures.png`` and ``robustness.png``, with a prefix for each vendor but
            the first.
        trained: the vendors of the training pictures.
        vendors: the vendors to test on; the first has keys without a prefix.
        templates: the prompts of the zero-shot classifier.
        reserve: what was kept from training, as ``EmojiData.view`` takes it.
        parts: of ``PARTS``; accuracy and pictures are always there.
        progress: called with a line of text before each part.

    Returns:
        Keys for ``metrics.json``: ``top1``, ``top5``, ``chance_top1``, ``chance_top5``,
        ``pixel_top1`` and ``pictures`` for each vendor, and a mapping for each part.
    """
    say = progress or (lambda line: None)
    check_options({"vendors": vendors, "parts": parts}, trained, reserve)
    data = EmojiData.load(encoder.model.config.image_size)
    train = data.view(trained, reserve=reserve)
    prefixes = {v: "" if v == vendors[0] else f"{VENDOR_TITLES[v].lower()}_" for v in vendors}
    tests = {prefixes[vendor]: data.test_view(vendor) for vendor in vendors}
    titles = {prefixes[vendor]: VENDOR_TITLES[vendor] for vendor in vendors}
    classifier = build_classifier(encoder.texts, data.names, templates)

    metrics: dict[str, Any] = {"vendors": titles, "names": len(data.names)}
    for prefix, test in tests.items():
        say(f"accuracy on {titles[prefix]}, among {len(data.names)} names")
        row = vendor_accuracy(encoder, train, test, classifier)
        metrics.update({f"{prefix}{key}": value for key, value in row.items()})
        pictures, best, right = best_names(encoder, test, classifier, GRID)
        plot_predictions(
            pictures,
            best,
            right,
            directory / f"{prefix}pictures.png",
            title=f"{titles[prefix]}, never trained on: five best of {len(data.names)} names",
        )
    if "prompts" in parts:
        say("prompt wordings")
        metrics["prompts"] = {
            titles[prefix]: prompt_rows(encoder, test, templates) for prefix, test in tests.items()
        }
    if "retrieval" in parts:
        say("retrieval")
        metrics["retrieval"] = {
            titles[prefix]: retrieval(encoder, test) for prefix, test in tests.items()
        }
    if "probe" in parts:
        say("linear probe")
        metrics["linear_probe"] = category_probe(encoder, train, tests)
    if "robustness" in parts:
        say("robustness")
        metrics["robustness"] = emoji_robustness.measure(
            encoder,
            train,
            data.reserved_view(trained, reserve or {}),
            tests,
            classifier,
            directory,
            titles=titles,
        )
    return metrics


def table(metrics: Mapping[str, Any]) -> str:
    """The results as text, baselines beside the model."""
    titles: dict[str, str] = metrics["vendors"]
    seconds = round(metrics.get("train_seconds", 0))
    lines = [
        f"CLIP from scratch on {metrics.get('pairs', 0):,} pairs in {seconds // 60} min "
        f"{seconds % 60:02d} s, loss by {metrics.get('backend', '?')}; vendors never seen, "
        f"{metrics['names']:,} names to choose from",
        "",
        _row("", [title for title in titles.values() for _ in "15"]),
        _row("", ["top-1", "top-5"] * len(titles)),
        _row("chance", [metrics[f"{p}chance_top{k}"] for p in titles for k in (1, 5)]),
        _row(
            "nearest training pixels", [v for p in titles for v in (metrics[f"{p}pixel_top1"], "")]
        ),
        _row("CLIP zero-shot", [metrics[f"{p}top{k}"] for p in titles for k in (1, 5)]),
    ]
    if prompts := metrics.get("prompts"):
        lines += ["", "prompt wording"]
        for label in next(iter(prompts.values())):
            rows = [prompts[title][label] for title in titles.values()]
            lines.append(_row(f"  {label}", [row[f"top{k}"] for row in rows for k in (1, 5)]))
    if found := metrics.get("retrieval"):
        lines += ["", _row("retrieval", ["R@1", "R@5", "R@10"])]
        for title in titles.values():
            for way in ("image_to_text", "text_to_image"):
                values = [found[title][f"{way}_r{k}"] for k in (1, 5, 10)]
                lines.append(_row(f"  {title}, {way.replace('_', ' ')}", values))
    if probe := metrics.get("linear_probe"):
        lines += ["", _row("linear probe, nine categories", ["accuracy", "majority"])]
        for prefix, title in titles.items():
            values = [probe[f"{prefix}accuracy"], probe[f"{prefix}majority"]]
            lines.append(_row(f"  {title}", values))
    if robust := metrics.get("robustness"):
        lines += _robustness_rows(robust, titles)
    return "\n".join(lines)


def _robustness_rows(robust: Mapping[str, Any], titles: Mapping[str, str]) -> list[str]:
    heads = ["same vendors", *(head for t in titles.values() for head in (t, "effective"))]
    lines = ["", _row(f"robustness, {robust['names']} animals, plants, foods", heads)]
    for name, first in robust["models"].items():
        values: list[Any] = [first["in_distribution"]]
        for prefix in titles:
            model = robust[f"{prefix}models"][name]
            values += [model["shifted"], f"{100 * model['effective_robustness']:+.1f}"]
        lines.append(_row(f"  {name}", values))
    return lines


def _row(label: str, values: Sequence[float | str]) -> str:
    cells = [v if isinstance(v, str) else f"{100 * v:.2f}%" if v < 0.01 else f"{100 * v:.1f}%"
             for v in values]  # fmt: skip
    return f"{label:<42}" + "".join(f"{cell:>13}" for cell in cells)
