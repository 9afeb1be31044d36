"""Robustness: accuracy under a shift that nobody trained on, and how much of it is "effective".

Across ordinary models the accuracy on shifted data follows from the accuracy on data like the
training data: after a logit transform of both, the points lie on a line (Taori et al.,
arXiv 2007.00644). *Effective robustness* is the accuracy above that line. CLIP's figure 13
(arXiv 2103.00020) puts the zero-shot model above it, and its linear probe nearly back on it.

That comparison adapts CLIP by a linear probe only, which leaves the tower as it was pre-trained;
``fine_tune`` adapts the whole tower, so both can be shown.
"""

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkern.eval.plots import agg_figure
from mmkern.eval.ranking import Answers, answer_sets


@dataclass(frozen=True)
class RobustnessPoint:
    """One model: accuracy on data like its training data, and on shifted data, both in [0, 1].

    ``baseline`` marks the ordinary models that define the line. ``count`` is the number of
    in-distribution test pictures and bounds how close to 0 or 1 an accuracy may be believed.
    """

    name: str
    in_distribution: float
    shifted: float
    baseline: bool = False
    count: int = 1000


@dataclass(frozen=True)
class BaselineFit:
    """``logit(shifted) = slope * logit(in_distribution) + intercept``."""

    slope: float
    intercept: float

    def predict(self, in_distribution: float, count: int = 1000) -> float:
        """Shifted accuracy expected of an ordinary model."""
        expected = self.slope * logit(in_distribution, count) + self.intercept
        return 1 / (1 + math.exp(-expected))


def logit(accuracy: float, count: int = 1000) -> float:
    """``ln(p / (1 - p))`` with p kept half a picture of ``count`` away from 0 and 1."""
    if not 0 <= accuracy <= 1:
        raise ValueError(f"logit: expected an accuracy in [0, 1], got {accuracy}")
    p = min(max(accuracy, 0.5 / count), 1 - 0.5 / count)
    return math.log(p / (1 - p))


def fit_baseline(points: Sequence[RobustnessPoint]) -> BaselineFit:
    """Least-squares line through the baseline points, in logits.

    Raises:
        ValueError: fewer than two baselines with different in-distribution accuracy.
    """
    used = [p for p in points if p.baseline]
    x = [logit(p.in_distribution, p.count) for p in used]
    y = [logit(p.shifted, p.count) for p in used]
    if len(set(x)) < 2:
        raise ValueError(
            "fit_baseline: expected at least two baselines with different in-distribution "
            f"accuracy, got {len(set(x))}"
        )
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - mean_x) ** 2 for a in x
    )
    return BaselineFit(slope, mean_y - slope * mean_x)


def effective_robustness(point: RobustnessPoint, fit: BaselineFit) -> float:
    """Shifted accuracy minus what ``fit`` expects at this in-distribution accuracy."""
    return point.shifted - fit.predict(point.in_distribution, point.count)


class TowerClassifier(nn.Module):
    """A tower and a linear head: ``head(tower(pixels))``, [B, C]."""

    def __init__(self, tower: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.tower = tower
        self.head = head

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.tower(pixels))


def fine_tune(
    tower: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    *,
    classes: int,
    head: Tensor | None = None,
    epochs: int = 5,
    batch_size: int = 128,
    lr: float = 1e-4,
    weight_decay: float = 0.1,
    seed: int = 0,
) -> TowerClassifier:
    """Supervised training of a copy of the whole tower with a linear head.

    AdamW on cross-entropy, cosine to zero, batches drawn from (seed, epoch). The tower given is not
    changed.

    Args:
        tower: module from pixels [B, 3, H, W] to features [B, D]; it is trained where it lies.
        pixels: [N, 3, H, W], preprocessed.
        labels: [N] integers in [0, classes).
        classes: number of classes C.
        head: [D, C] columns to start from, such as a zero-shot classifier times the logit scale;
            zeros when absent.
        epochs, batch_size, lr, weight_decay: of the training.
        seed: of the order of pictures.

    Returns:
        The trained classifier, in eval mode.
    """
    if len(pixels) != len(labels) or not len(pixels):
        raise ValueError(
            f"fine_tune: expected as many labels as pictures, at least one, "
            f"got {len(labels)} and {len(pixels)}"
        )
    tower = copy.deepcopy(tower).train().requires_grad_(True)
    device = next(tower.parameters()).device
    pixels, labels = pixels.to(device), labels.to(device)
    with torch.no_grad():
        width = tower(pixels[:1]).shape[-1]
    start = torch.zeros(width, classes) if head is None else head.float()
    if tuple(start.shape) != (width, classes):
        raise ValueError(f"fine_tune: expected head [{width}, {classes}], got {tuple(start.shape)}")
    linear = nn.Linear(width, classes).to(device)
    with torch.no_grad():
        linear.weight.copy_(start.T)
        linear.bias.zero_()
    model = TowerClassifier(tower, linear)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    steps = epochs * math.ceil(len(pixels) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(pixels), generator=generator).to(device)
        for rows in order.split(batch_size):
            loss = F.cross_entropy(model(pixels[rows]), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def classification_accuracy(
    model: nn.Module, pixels: Tensor, answers: Answers, *, batch_size: int = 512
) -> float:
    """Share of pictures whose highest logit is that of a right class.

    Args:
        model: from pixels [B, 3, H, W] to logits [B, C].
        pixels: [N, 3, H, W].
        answers: right classes, as :func:`mmkern.eval.zero_shot.topk_accuracy` takes them.
        batch_size: pictures at a time.
    """
    device = next(model.parameters()).device
    best = [model(part.to(device)).argmax(1) for part in pixels.split(batch_size)]
    return prediction_accuracy(torch.cat(best), answers)


def prediction_accuracy(predicted: Tensor, answers: Answers) -> float:
    """Share of ``predicted`` classes, [N] integers, that are right."""
    if isinstance(answers, Tensor) and answers.dtype == torch.bool:
        return answers[torch.arange(len(predicted)), predicted.cpu()].double().mean().item()
    sets = answer_sets(answers, sys.maxsize)
    hits = [guess in allowed for guess, allowed in zip(predicted.tolist(), sets, strict=True)]
    return sum(hits) / len(hits)


def plot_robustness(
    points: Sequence[RobustnessPoint],
    path: str | Path,
    *,
    here: str = "in distribution",
    shift: str = "shifted",
) -> BaselineFit:
    """Draw points and the baseline line on logit axes (a PNG), as CLIP's figure 13.

    ``here`` and ``shift`` name the two test sets on the axes.

    Returns:
        The fit that was drawn.
    """
    fit = fit_baseline(points)
    figure = agg_figure(6.4, 5.2)
    axes = figure.add_subplot()
    low = min(min(p.in_distribution, p.shifted) for p in points)
    high = max(max(p.in_distribution, p.shifted) for p in points)
    low, high = max(low * 0.7, 0.002), min(high + (1 - high) * 0.3, 0.998)
    grid = [low + (high - low) * i / 200 for i in range(201)]
    axes.plot(grid, grid, ":", color="0.6", label="no loss under the shift")
    axes.plot(grid, [fit.predict(x) for x in grid], "-", color="tab:blue", label="baseline fit")
    ordinary = [p for p in points if p.baseline]
    axes.scatter(
        [p.in_distribution for p in ordinary],
        [p.shifted for p in ordinary],
        color="tab:blue",
        label="ordinary models",
        zorder=3,
    )
    judged = [p for p in points if not p.baseline]
    for index, point in enumerate(judged, start=1):
        # C0 is the blue of the ordinary models.
        axes.scatter(
            [point.in_distribution],
            [point.shifted],
            color=f"C{1 + index % 9}",
            marker="*",
            s=140,
            label=point.name,
            zorder=4,
        )
    axes.set(
        xscale="logit", yscale="logit", xlim=(low, high), ylim=(low, high),
        xlabel=f"accuracy, {here}",
        ylabel=f"accuracy, {shift}",
        title="Effective robustness: height above the blue line",
    )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter("")
        axis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return fit
