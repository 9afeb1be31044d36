"""Robustness: the baseline line, effective robustness, fine-tuning, the plot."""

import math

import pytest
import torch
from torch import nn

from mmkern.eval.robustness import (
    RobustnessPoint,
    classification_accuracy,
    effective_robustness,
    fine_tune,
    fit_baseline,
    logit,
    plot_robustness,
)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


BASELINES = [
    RobustnessPoint(f"baseline {x}", sigmoid(x), sigmoid(0.8 * x - 0.5), baseline=True, count=10**9)
    for x in (-2.0, -1.0, 0.5, 1.5)
]


def test_line_is_fitted_in_logits_and_only_through_baselines():
    """The model under test would pull the line that it is judged by."""
    clip = RobustnessPoint("CLIP", 0.7, 0.9, count=10**9)
    fit = fit_baseline([*BASELINES, clip])
    assert (fit.slope, fit.intercept) == pytest.approx((0.8, -0.5))
    expected = sigmoid(0.8 * math.log(0.7 / 0.3) - 0.5)
    assert effective_robustness(clip, fit) == pytest.approx(0.9 - expected)
    assert effective_robustness(BASELINES[0], fit) == pytest.approx(0, abs=1e-9)


def test_accuracies_of_zero_and_one_stay_finite():
    """A model that gets everything right would put the line at infinity."""
    assert logit(1.0, 100) == pytest.approx(math.log(199))
    assert logit(0.0, 100) == pytest.approx(-math.log(199))
    with pytest.raises(ValueError, match="accuracy"):
        logit(63.2)


def test_one_baseline_is_not_a_line():
    """A slope of 0/0 would be drawn as a result."""
    with pytest.raises(ValueError, match="two baselines"):
        fit_baseline([BASELINES[0], BASELINES[0], RobustnessPoint("CLIP", 0.5, 0.5)])


def test_plot_is_written(tmp_path):
    """The figure would be missing or fail on logit axes."""
    path = tmp_path / "robustness.png"
    plot_robustness([*BASELINES, RobustnessPoint("zero-shot", 0.0, 1.0, count=50)], path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 3
    pixels = 0.3 * torch.randn(48, 3, 8, 8, generator=generator)
    pixels[torch.arange(48), labels] += 1
    return pixels, labels


def small_tower():
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 16))


def test_fine_tuning_learns_and_leaves_the_tower_alone(pictures):
    """The zero-shot model would be changed by its own fine-tuned comparison."""
    tower = small_tower().requires_grad_(False)
    before = tower[2].weight.clone()
    model = fine_tune(tower, *pictures, classes=3, epochs=20, batch_size=16, lr=0.01)
    assert classification_accuracy(model, *pictures) > 0.9
    assert torch.equal(tower[2].weight, before)
    assert not tower[2].weight.requires_grad
    assert not torch.equal(model.tower[2].weight, before)


def test_fine_tuning_starts_from_the_head_given_and_repeats(pictures):
    """A zero-shot head would be thrown away, or two runs would differ."""
    head = torch.randn(16, 3, generator=torch.Generator().manual_seed(3))
    start = fine_tune(small_tower(), *pictures, classes=3, head=head, epochs=0)
    assert torch.equal(start.head.weight, head.T)
    one, two = (fine_tune(small_tower(), *pictures, classes=3, head=head, epochs=2) for _ in "ab")
    assert torch.equal(one.head.weight, two.head.weight)
    with pytest.raises(ValueError, match="head"):
        fine_tune(small_tower(), *pictures, classes=4, head=head)
