"""Does CLIP lose less than ordinary models when the style of the pictures changes?

The task is closed: name a picture among the animals, plants, food and drinks. Every model sees only
the training vendors. In distribution is the share of their pictures that was kept from all training
(``EmojiData.reserved_view``); the shift is a vendor that nobody trained on. Ordinary models
(nearest pixels and logistic regression on pixels, at several sizes and strengths) give the line;
CLIP stands beside it zero-shot, with a linear probe, and with its whole tower fine-tuned.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkern.data.emoji import EmojiView
from mmkern.eval.emoji import EmojiEncoder
from mmkern.eval.linear_probe import fit_logistic, linear_probe
from mmkern.eval.robustness import (
    RobustnessPoint,
    classification_accuracy,
    effective_robustness,
    fine_tune,
    plot_robustness,
    prediction_accuracy,
)

CATEGORIES = ("Animals & Nature", "Food & Drink")
PIXEL_SIZES = (1, 2, 4, 8, 16, 32)
PIXEL_STRENGTHS = (1.0, 10.0, 100.0)
ITERATIONS = 50  # of L-BFGS in each fit: minutes are short here


@dataclass(frozen=True)
class ClosedSet:
    """Pictures of the closed task: [n, 3, S, S], labels [n] and right classes [n, C]."""

    pixels: Tensor
    labels: Tensor
    answers: Tensor


def closed_names(view: EmojiView) -> Tensor:
    """Indices of the names that belong to the closed task."""
    inside = torch.tensor([c in CATEGORIES for c in view.categories] + [False])
    return inside[view.category_ids].nonzero().flatten()


def closed_set(encoder: EmojiEncoder, view: EmojiView) -> ClosedSet:
    """The part of a view that belongs to the closed task."""
    names = closed_names(view)
    label_of = torch.full((len(view.names),), -1)
    label_of[names] = torch.arange(len(names))
    labels = label_of[view.name_ids]
    rows = labels >= 0
    return ClosedSet(encoder.pixels(view)[rows], labels[rows], view.answer_matrix()[rows][:, names])


class _UnitTower(nn.Module):
    """The image tower with its projection, unit rows: what the zero-shot classifier reads."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.visual(pixels), dim=-1)


def measure(
    encoder: EmojiEncoder,
    train_view: EmojiView,
    reserved: EmojiView,
    tests: dict[str, EmojiView],
    classifier: Tensor,
    directory: Path,
    *,
    titles: dict[str, str],
    epochs: int = 6,
) -> dict[str, Any]:
    """Points, effective robustness and a plot for each shift.

    Args:
        encoder: the trained model.
        train_view: the pictures that the model was trained on.
        reserved: pictures of the same vendors that were kept from training.
        tests: key prefix -> view of a vendor that was never trained on.
        classifier: [D, all names], zero-shot.
        directory: where ``<prefix>robustness.png`` goes.
        titles: key prefix -> what the plot calls the vendor.
        epochs: of the fine-tuning.

    Returns:
        For each prefix the models' accuracies in distribution and shifted, and how far each of
        CLIP's stands above the line of the ordinary models.
    """
    train, here = closed_set(encoder, train_view), closed_set(encoder, reserved)
    shifted = {prefix: closed_set(encoder, view) for prefix, view in tests.items()}
    head = classifier[:, closed_names(train_view)]
    rows = [
        *((name, True, score) for name, score in _pixel_models(train, [here, *shifted.values()])),
        *(
            (name, False, score)
            for name, score in _clip_models(encoder, train, [here, *shifted.values()], head, epochs)
        ),
    ]
    result: dict[str, Any] = {"names": head.shape[1], "in_distribution_pictures": len(here.labels)}
    for place, prefix in enumerate(tests, start=1):
        points = [
            RobustnessPoint(name, score[0], score[place], ordinary, len(here.labels))
            for name, ordinary, score in rows
        ]
        fit = plot_robustness(
            points,
            directory / f"{prefix}robustness.png",
            here="kept pictures of the training vendors",
            shift=f"{titles[prefix]}, never trained on",
        )
        result[f"{prefix}pictures"] = len(shifted[prefix].labels)
        result[f"{prefix}models"] = {
            point.name: {
                "in_distribution": point.in_distribution,
                "shifted": point.shifted,
                "effective_robustness": effective_robustness(point, fit),
                "baseline": point.baseline,
            }
            for point in points
        }
    return result


def _pixel_models(train: ClosedSet, tests: list[ClosedSet]) -> Iterator[tuple[str, list[float]]]:
    """Nearest neighbour and logistic regression on pixels: name, accuracy on each test."""
    for size in PIXEL_SIZES:
        known = _small(train.pixels, size)
        scores = []
        for test in tests:
            nearest = torch.cdist(_small(test.pixels, size), known).argmin(1)
            scores.append(prediction_accuracy(train.labels[nearest], test.answers))
        yield f"nearest pixels, {size} px", scores
    known = _small(train.pixels, 8)
    for strength in PIXEL_STRENGTHS:
        classifier, _ = fit_logistic(known, train.labels, strength, ITERATIONS)
        guesses = [torch.from_numpy(classifier.predict(_small(t.pixels, 8).numpy())) for t in tests]
        yield (
            f"logistic regression on pixels, λ = {strength:g}",
            [prediction_accuracy(g, t.answers) for g, t in zip(guesses, tests, strict=True)],
        )


def _small(pixels: Tensor, size: int) -> Tensor:
    return F.adaptive_avg_pool2d(pixels, size).flatten(1)


@torch.no_grad()
def _features(tower: nn.Module, pixels: Tensor, **options: Any) -> Tensor:
    device = next(tower.parameters()).device
    return torch.cat([tower(part.to(device), **options).cpu() for part in pixels.split(256)])


def _clip_models(
    encoder: EmojiEncoder, train: ClosedSet, tests: list[ClosedSet], head: Tensor, epochs: int
) -> Iterator[tuple[str, list[float]]]:
    """Zero-shot, linear probe, whole tower fine-tuned: name, accuracy on each test."""
    visual = encoder.model.visual
    scores = []
    for test in tests:
        guess = (_features(visual, test.pixels) @ head).argmax(1)
        scores.append(prediction_accuracy(guess, test.answers))
    yield "CLIP zero-shot", scores

    features = _features(visual, train.pixels, project=False)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    held, fitted = order[: len(order) // 6], order[len(order) // 6 :]
    probe = linear_probe(
        (features[fitted], train.labels[fitted]),
        (features[held], train.labels[held]),
        coarse=(-4.0, -2.0, 0.0, 2.0),
        finest_step=1.0,
        max_iter=ITERATIONS,
    )
    scores = []
    for test in tests:
        guess = probe.classifier.predict(_features(visual, test.pixels, project=False).numpy())
        scores.append(prediction_accuracy(torch.from_numpy(guess), test.answers))
    yield "CLIP, linear probe", scores

    scale = encoder.model.logit_scale.exp().item()
    tuned = fine_tune(
        _UnitTower(visual),
        train.pixels,
        train.labels,
        classes=head.shape[1],
        head=head * scale,
        epochs=epochs,
        lr=3e-4,
    )
    yield (
        "CLIP, whole tower fine-tuned",
        [classification_accuracy(tuned, test.pixels, test.answers) for test in tests],
    )
