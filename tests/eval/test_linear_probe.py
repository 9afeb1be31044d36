"""Linear probe: the sweep of the L2 strength, and what it returns."""

import math

import pytest
import torch

from mmkern.eval import linear_probe as module
from mmkern.eval.linear_probe import linear_probe


def blobs(count, seed, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = 2 * torch.eye(3, 12)
    return centres[labels] + noise * torch.randn(count, 12, generator=generator), labels


def test_probe_learns_separable_features():
    """The probe would report chance on features that hold the answer."""
    probe = linear_probe(blobs(120, 0), blobs(60, 1), blobs(90, 2), max_iter=100)
    assert probe.accuracy > 0.7
    assert probe.score(*blobs(90, 2)) == probe.accuracy


def test_sweep_visits_the_papers_values_and_ends_at_an_eighth_of_a_decade(monkeypatch):
    """The chosen strength would not be one of the 96 values, or the search would miss the peak."""
    peak = 1.375
    tried = []

    class Stub:
        def __init__(self, exponent):
            self.exponent = exponent

        def score(self, features, labels):
            return 1 - abs(self.exponent - peak) / 12

    def fit(features, labels, strength, max_iter):
        tried.append(math.log10(strength))
        return Stub(tried[-1]), True

    monkeypatch.setattr(module, "fit_logistic", fit)
    probe = linear_probe(blobs(9, 0), blobs(9, 1))
    assert math.log10(probe.strength) == pytest.approx(peak)
    assert tried[:7] == pytest.approx([-6, -4, -2, 0, 2, 4, 6])
    assert len(tried) == 7 + 2 * 4 + 1
    assert all(abs(8 * e - round(8 * e)) < 1e-9 and -6 <= e <= 6 for e in tried)
    assert [s for s, _ in probe.curve] == sorted(s for s, _ in probe.curve)


def test_strength_is_regularisation_not_its_inverse():
    """The sweep would run backwards: the reported λ would be 1/λ."""
    weak, _ = module.fit_logistic(*blobs(60, 0), 1e-3, 200)
    strong, _ = module.fit_logistic(*blobs(60, 0), 1e3, 200)
    assert abs(strong.coef_).max() < 0.1 * abs(weak.coef_).max()


def test_fits_that_hit_the_limit_are_counted():
    """A probe that never converged would look like one that did."""
    probe = linear_probe(blobs(60, 0), blobs(30, 1), max_iter=1)
    assert probe.unconverged > 0
    assert probe.accuracy is None


def test_mismatched_rows_are_errors():
    """Labels of another split would be paired with the wrong features."""
    features, labels = blobs(12, 0)
    with pytest.raises(ValueError, match="train features"):
        linear_probe((features, labels[:5]), (features, labels))
    with pytest.raises(ValueError, match="two classes"):
        linear_probe((features, torch.zeros(12, dtype=torch.long)), (features, labels))
