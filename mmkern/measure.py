"""What ``mmkern eval`` measures: by the system that a run trained, and by its data."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmkern.train.recipe import Recipe, RecipeError
from mmkern.train.systems import system


def measure(directory: Path, recipe: Recipe, model: Any) -> dict[str, Any]:
    """Measure a run's model; pictures are drawn into ``directory``.

    Raises:
        RecipeError: options that cannot be measured.
    """
    return _MEASURES[system(recipe).name, recipe.data.source == "emoji"](directory, recipe, model)


def report(recipe: Recipe, metrics: dict[str, Any]) -> str:
    """What was measured, as text."""
    trained, of_emoji = system(recipe).name, recipe.data.source == "emoji"
    if of_emoji and trained == "clip":
        from mmkern.eval.emoji_report import table

        return table(metrics)
    if of_emoji:
        from mmkern.eval import emoji_answers, emoji_matching, picture_choice

        if "picture_choice" in metrics:
            return picture_choice.table(metrics)
        if trained == "flamingo":
            from mmkern.eval import episodes

            return episodes.table(metrics)
        return (emoji_matching if trained == "blip2-stage1" else emoji_answers).table(metrics)
    if "text_loss" in metrics:
        return f"loss {metrics['loss']:.3f}, of the language model alone {metrics['text_loss']:.3f}"
    rows = metrics.get("answers", metrics.get("retrieval", {})).items()
    return "\n".join(f"{name:<20}{100 * value:6.1f}%" for name, value in rows)


def compare(runs: Sequence[Path], folder: Path) -> str:
    """Measured runs side by side, as text; ``compare.json`` and ``compare.png`` in ``folder``.

    Columns are named by the runs' directories.

    Raises:
        RecipeError: runs of one name, one that is not of emoji or was not measured, or no task that
            two of them share.
        CheckpointError: not a run.
    """
    from mmkern.eval import compare as side_by_side
    from mmkern.train.recipe import load_recipe
    from mmkern.train.run import METRICS_FILE, RECIPE_FILE, load_run

    scores: dict[str, Any] = {}
    clips: dict[str, tuple[Recipe, Any]] = {}
    for run in runs:
        name = run.resolve().name
        if name in scores:
            raise RecipeError(f"compare: two runs are called {name!r}")
        recipe = load_recipe(run / RECIPE_FILE)
        if recipe.data.source != "emoji":
            raise RecipeError(f"compare: {run} was not trained on emoji")
        path = run / METRICS_FILE
        metrics = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        scores[name] = side_by_side.rows(metrics)
        if system(recipe).name == "clip":
            clips[name] = load_run(run)
        elif not scores[name]:
            raise RecipeError(f"compare: {run} has no captions or questions; mmkern eval {run}")
    keys = list(dict.fromkeys(key for of in scores.values() for key in of))
    for name, (recipe, model) in clips.items():
        _say(f"the same questions with {name}")
        templates = recipe.evaluation.templates or ("{}",)
        scores[name] = side_by_side.clip_scores(_encoder(recipe, model), keys, templates)
    try:
        text = side_by_side.table(scores)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    side_by_side.figure(scores, folder / "compare.png")
    plain = {
        name: [{**key._asdict(), **values} for key, values in of.items()]
        for name, of in scores.items()
    }
    (folder / "compare.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    return text


def loss_history(directory: Path) -> list[tuple[float, float]]:
    from mmkern.train.checkpoint import STATE, complete_checkpoints

    state = complete_checkpoints(directory)[-1] / STATE
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    return [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]


def _measure_emoji(directory: Path, recipe: Recipe, model: Any) -> dict[str, Any]:
    """Zero-shot on held-out vendors and all that goes with it; draws into ``directory``."""
    from mmkern import data
    from mmkern.eval import emoji_report
    from mmkern.eval.plots import plot_losses

    source, options = recipe.data, recipe.evaluation.options
    trained = source.options.get("vendors", data.emoji.VENDORS)
    try:
        emoji_report.check_options(options, trained, source.options.get("reserve"))
    except ValueError as error:
        raise RecipeError(f"recipe: {error}") from error
    encoder = _encoder(recipe, model)
    if history := loss_history(directory):  # none yet if the run was killed early
        chance = math.log(recipe.train.batch_size)
        plot_losses(history, directory / "losses.png", chance=chance)
    return emoji_report.evaluate(
        encoder,
        directory,
        trained=trained,
        templates=recipe.evaluation.templates or ("{}",),
        reserve=source.options.get("reserve"),
        progress=_say,
        **options,
    )


def _encoder(recipe: Recipe, model: Any) -> Any:
    from mmkern import data
    from mmkern.eval.emoji import EmojiEncoder

    source = recipe.data
    return EmojiEncoder(
        model,
        data.ClipTokenizer(source.vocabulary, model.config.context_length),
        data.PixelTransform(source.mean or data.MEAN, source.std or data.STD),
        batch_size=recipe.evaluation.batch_size,
    )


def _measure_pairs(directory: Path, recipe: Recipe, model: Any) -> dict[str, Any]:
    """Retrieval both ways on the pairs of ``evaluation.options.path``."""
    from torch.utils.data import DataLoader

    from mmkern.eval.retrieval import encode_pairs, recall_at_k
    from mmkern.train.batches import build_data

    options = recipe.evaluation.options
    if recipe.evaluation.templates:
        raise RecipeError("evaluation.templates: only emoji are tested zero-shot, not pairs")
    _check_options(options, {"path", "pairs"}, "pairs to test on, stored as the training data is")
    source = dataclasses.replace(recipe.data, path=options["path"], augment=None)
    pairs = build_data(dataclasses.replace(recipe, data=source), model)
    loader = DataLoader(pairs.dataset, recipe.evaluation.batch_size, collate_fn=pairs.collator)
    image, text = encode_pairs(model, loader, options.get("pairs", 5000))
    return {"retrieval": recall_at_k(image, text), "retrieval_pairs": len(image)}


def _measure_emoji_matching(directory: Path, recipe: Recipe, model: Any) -> dict[str, Any]:
    """BLIP-2's first stage on vendors that were never trained on."""
    from mmkern.eval import emoji_matching
    from mmkern.train.batches import build_collator, image_size

    options = _emoji_options(recipe, {"vendors", "rerank", "contrast_weight", "pictures"})
    return emoji_matching.evaluate(
        model,
        build_collator(recipe, model, test=True),
        image_size(model),
        template=recipe.data.templates[0],
        batch_size=recipe.evaluation.batch_size,
        progress=_say,
        **options,
    )


def _measure_matching(directory: Path, recipe: Recipe, model: Any) -> dict[str, Any]:
    """Retrieval by BLIP-2's first stage on the pairs of ``evaluation.options.path``."""
    import torch
    from torch.utils.data import DataLoader

    from mmkern.eval.matching import retrieve
    from mmkern.train.batches import build_data

    options = recipe.evaluation.options
    allowed = {"path", "pairs", "rerank", "contrast_weight"}
    _check_options(options, allowed, "pairs, stored as the training data is")
    source = dataclasses.replace(recipe.data, path=options["path"], augment=None)
    pairs = build_data(dataclasses.replace(recipe, data=source), model)
    loader = DataLoader(pairs.dataset, recipe.evaluation.batch_size, collate_fn=pairs.collator)
    batches, count, limit = [], 0, options.get("pairs", 5000)
    for batch in loader:
        tokens = model.encode_image(batch["pixel_values"].to(model.device)).detach().cpu()
        batches.append((tokens, batch["input_ids"], batch["attention_mask"], batch["image_ids"]))
        count += len(tokens)
        if count >= limit:
            break
    tokens, ids, mask, groups = (torch.cat(part)[:limit] for part in zip(*batches, strict=True))
    match = groups[:, None] == groups[None]
    again = {key: options[key] for key in ("rerank", "contrast_weight") if key in options}
    size = recipe.evaluation.batch_size
    found = retrieve(model, tokens, ids, mask, match, batch_size=size, **again)
    rows = {f"{how}_{k}": v for how, scores in found.items() for k, v in scores.items()}
    return {"retrieval": rows, "retrieval_pairs": len(tokens)}


def _measure_emoji_answers(directory: Path, recipe: Recipe, model: Any) -> dict[str, Any]:
    """Captions, or questions if those were trained, on vendors that were never trained on."""
    from mmkern.eval import emoji_answers
    from mmkern.train.batches import image_size

    trained, size = recipe.data.mixture, image_size(model)
    # What a model was not taught to name says nothing of how well it was taught.
    categories = recipe.data.options.get("categories")
    if not trained:
        options = _emoji_options(recipe, {"vendors", "pictures", "candidates"})
        answerer = _answerer(recipe, model)
        return emoji_answers.evaluate_captions(
            answerer, size, categories=categories, progress=_say, **options
        )
    options = _emoji_options(recipe, {"vendors", "kinds", "questions_each"})
    answerer = _answerer(recipe, model)
    return emoji_answers.evaluate_questions(
        answerer, size, trained=list(trained), categories=categories, progress=_say, **options
    )


def _measure_emoji_grids(directory: Path, recipe: Recipe, model: Any) -> dict[str, Any]:
    """InternLM-XComposer2: every kind that was trained, and text before and after training."""
    from mmkern.data import TEMPLATES
    from mmkern.eval import emoji_answers
    from mmkern.eval.text_loss import text_loss
    from mmkern.train.batches import image_size, load_tokenizer
    from mmkern.train.run import build_model

    options = _emoji_options(recipe, {"vendors", "kinds", "questions_each"})
    trained = list(recipe.data.mixture) or ["caption"]
    found = emoji_answers.evaluate_questions(
        _answerer(recipe, model),
        image_size(model),
        trained=trained,
        categories=recipe.data.options.get("categories"),
        progress=_say,
        **{"kinds": trained, **options},
    )
    _say("text before and after training")
    tokenizer = load_tokenizer(recipe.data.text.tokenizer)
    texts = [template for kind in sorted(TEMPLATES) for template in TEMPLATES[kind]]
    began = build_model(recipe).to(model.device)
    losses = {"before": text_loss(began, tokenizer, texts)}
    losses["after"] = text_loss(model, tokenizer, texts)
    return {**found, "text_loss": losses}


def _measure_emoji_composer(directory: Path, recipe: Recipe, model: Any) -> dict[str, Any]:
    """Choices of pictures if those were trained, else captions or questions."""
    from mmkern.compose.emoji import PICTURE_CHOICE
    from mmkern.eval import picture_choice
    from mmkern.train.batches import build_collator, image_size

    if PICTURE_CHOICE not in recipe.data.mixture:
        return _measure_emoji_answers(directory, recipe, model)
    options = _emoji_options(recipe, {"vendors", "choices"})
    return picture_choice.evaluate(
        model,
        build_collator(recipe, model, test=True),
        image_size(model),
        batch_size=recipe.evaluation.batch_size,
        progress=_say,
        **options,
    )


def _measure_answers(directory: Path, recipe: Recipe, model: Any) -> dict[str, Any]:
    """Exact match on the questions of ``evaluation.options.path``, beside other pictures'."""
    from mmkern.data import QuestionDataset
    from mmkern.eval.answers import exact_match, majority, shuffled_pictures

    options = recipe.evaluation.options
    _check_options(options, {"path", "kind", "questions"}, "questions in JSON lines")
    asked = QuestionDataset.from_jsonl(options["path"], kind=options.get("kind", "question"))
    count = min(len(asked), options.get("questions", 5000))
    samples = [asked[i] for i in range(count)]
    right = [asked.answers(i) for i in range(count)]
    answerer = _answerer(recipe, model)
    return {
        "questions": count,
        "answers": {
            "exact": exact_match(answerer.generate(samples), right),
            "shuffled pictures": exact_match(answerer.generate(shuffled_pictures(samples)), right),
            "majority": majority(right),
        },
    }


def _measure_llava(directory: Path, recipe: Recipe, model: Any) -> dict[str, Any]:
    """ScienceQA's problems if ``evaluation.options.scienceqa`` names their folder, else answers."""
    from mmkern.eval import scienceqa

    options = recipe.evaluation.options
    if "scienceqa" not in options:
        return _measure_answers(directory, recipe, model)
    if unknown := set(options) - {"scienceqa", "split", "problems"}:
        raise RecipeError(f"evaluation.options: scienceqa does not take {sorted(unknown)}")
    problems = scienceqa.read_problems(options["scienceqa"], options.get("split", "test"))
    problems = problems[: options.get("problems", len(problems))]
    return {"answers": scienceqa.evaluate(_answerer(recipe, model), problems)}


def _measure_episodes(directory: Path, recipe: Recipe, model: Any) -> dict[str, Any]:
    """Few-shot naming of emoji, on vendors that were never trained on."""
    from mmkern.data.emoji import VENDORS
    from mmkern.eval import episodes
    from mmkern.train.batches import build_collator, image_size

    known = {"vendors", "shots", "episodes", "candidates", "rices"}
    return episodes.evaluate(
        model,
        build_collator(recipe, model, test=True),
        image_size(model),
        trained=recipe.data.options.get("vendors", VENDORS),
        batch_size=recipe.evaluation.batch_size,
        progress=_say,
        **_emoji_options(recipe, known),
    )


def _measure_documents(directory: Path, recipe: Recipe, model: Any) -> dict[str, Any]:
    """Loss on the documents of ``evaluation.options.path``, with and without their pictures."""
    import torch

    from mmkern.data import DocumentDataset
    from mmkern.train.batches import build_collator

    options = recipe.evaluation.options
    _check_options(options, {"path", "documents"}, "documents in JSON lines")
    asked = DocumentDataset(options["path"])
    collator = build_collator(recipe, model, test=True)
    count = min(len(asked), options.get("documents", 1000))
    losses = {"loss": 0.0, "text_loss": 0.0}
    total = 0
    for number in range(count):
        batch = {k: v.to(model.device) for k, v in collator([asked[number]]).items()}
        labels = batch.pop("labels")
        batch.pop("loss_weights")
        shifted = labels[:, 1:].flatten()
        total += int((shifted != -100).sum())
        with torch.no_grad():
            text = {k: batch[k] for k in ("input_ids", "attention_mask")}
            for name, logits in (
                ("loss", model(**batch).logits),
                ("text_loss", model.language_model(**text).logits),
            ):
                flat = logits[:, :-1].flatten(0, 1).float()
                losses[name] += float(
                    torch.nn.functional.cross_entropy(flat, shifted, reduction="sum")
                )
    return {"documents": count, **{k: v / max(total, 1) for k, v in losses.items()}}


def _answerer(recipe: Recipe, model: Any) -> Any:
    from mmkern.eval.answers import Answerer
    from mmkern.train.batches import build_collator

    return Answerer(
        model,
        build_collator(recipe, model, test=True),
        batch_size=recipe.evaluation.batch_size,
        max_new_tokens=recipe.data.text.answer_length,
    )


def _emoji_options(recipe: Recipe, known: set[str]) -> dict[str, Any]:
    from mmkern.data.emoji import VENDORS
    from mmkern.eval.emoji_answers import check_options

    options = recipe.evaluation.options
    try:
        check_options(options, recipe.data.options.get("vendors", VENDORS), known)
    except ValueError as error:
        raise RecipeError(f"recipe: {error}") from error
    return options


def _check_options(options: dict[str, Any], known: set[str], path: str) -> None:
    if set(options) - known or "path" not in options:
        raise RecipeError(
            f"evaluation.options needs path ({path}) and takes {', '.join(sorted(known))}, got "
            f"{sorted(options)}"
        )


def _say(line: str) -> None:
    print(f"measuring {line}", file=sys.stderr, flush=True)


# (system, whether it was trained on emoji) -> what is measured.
_MEASURES: dict[tuple[str, bool], Callable[[Path, Recipe, Any], dict[str, Any]]] = {
    ("clip", True): _measure_emoji,
    ("clip", False): _measure_pairs,
    ("blip2-stage1", True): _measure_emoji_matching,
    ("blip2-stage1", False): _measure_matching,
    ("blip2-stage2", True): _measure_emoji_answers,
    ("blip2-stage2", False): _measure_answers,
    ("xcomposer2", True): _measure_emoji_grids,
    ("xcomposer2", False): _measure_answers,
    ("instructblip", True): _measure_emoji_answers,
    ("instructblip", False): _measure_answers,
    ("xcomposer", True): _measure_emoji_composer,
    ("xcomposer", False): _measure_answers,
    ("llava", True): _measure_emoji_answers,
    ("llava", False): _measure_llava,
    ("flamingo", True): _measure_episodes,
    ("flamingo", False): _measure_documents,
}
