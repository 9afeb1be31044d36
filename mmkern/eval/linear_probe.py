"""Linear probe: logistic regression on frozen features (CLIP, arXiv 2103.00020, appendix A.3).

scikit-learn's L-BFGS with at most 1,000 iterations on the image tower's features *before* the
projection into the shared space. The L2 strength is chosen on a validation split among 96 values,
8 a decade from 1e-6 to 1e6: first the coarse grid of 7 (two decades apart), then the interval
around the best is halved until the step is an eighth of a decade. Then the classifier is fitted
again on training and validation rows together.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

COARSE_EXPONENTS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
FINEST_STEP = 1 / 8


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe.

    ``strength`` is the chosen L2 weight λ (scikit-learn's ``C`` is 1/λ); ``curve`` the pairs
    (λ, validation accuracy) that were tried, sorted by λ; ``unconverged`` how many of the fits
    stopped at the iteration limit; ``accuracy`` the test accuracy, None without test rows.
    """

    strength: float
    curve: list[tuple[float, float]]
    accuracy: float | None
    unconverged: int
    classifier: Any = field(repr=False)

    def score(self, features: Tensor, labels: Tensor) -> float:
        """Accuracy of the fitted probe on other rows, [N, D] and [N]."""
        return float(self.classifier.score(_array(features), _array(labels)))


def linear_probe(
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor] | None = None,
    *,
    max_iter: int = 1000,
    coarse: tuple[float, ...] = COARSE_EXPONENTS,
    finest_step: float = FINEST_STEP,
) -> LinearProbe:
    """Fit a linear probe with the L2 strength chosen on a validation split.

    Args:
        train: features [N, D] and integer labels [N].
        validation: rows that choose λ; they join the training rows for the final fit.
        test: rows that are only scored.
        max_iter: limit of L-BFGS iterations of each fit.
        coarse: exponents of ten tried first, evenly spaced.
        finest_step: the search stops at this step between exponents.

    Raises:
        ValueError: features and labels that do not fit, or fewer than two classes.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    for name, part in (("train", train), ("validation", validation), ("test", test)):
        if part is None:
            continue
        if part[0].ndim != 2 or part[1].ndim != 1 or len(part[0]) != len(part[1]):
            raise ValueError(
                f"linear_probe: expected {name} features [N, D] and labels [N], "
                f"got {tuple(part[0].shape)} and {tuple(part[1].shape)}"
            )
    if len(train[1].unique()) < 2:
        raise ValueError("linear_probe: expected at least two classes in train, got one")
    unconverged = 0

    def accuracy(exponent: float) -> float:
        nonlocal unconverged
        classifier, converged = fit_logistic(*train, 10.0**exponent, max_iter)
        unconverged += not converged
        return float(classifier.score(_array(validation[0]), _array(validation[1])))

    tried = {exponent: accuracy(exponent) for exponent in coarse}
    step = coarse[1] - coarse[0]
    while step > finest_step:
        step /= 2
        peak = _best(tried)
        for exponent in (peak - step, peak + step):
            if exponent not in tried and coarse[0] <= exponent <= coarse[-1]:
                tried[exponent] = accuracy(exponent)
    strength = 10.0 ** _best(tried)
    features = torch.cat([train[0], validation[0]])
    labels = torch.cat([train[1], validation[1]])
    classifier, converged = fit_logistic(features, labels, strength, max_iter)
    unconverged += not converged
    return LinearProbe(
        strength=strength,
        curve=[(10.0**e, a) for e, a in sorted(tried.items())],
        accuracy=None
        if test is None
        else float(classifier.score(_array(test[0]), _array(test[1]))),
        unconverged=unconverged,
        classifier=classifier,
    )


def fit_logistic(
    features: Tensor, labels: Tensor, strength: float, max_iter: int = 1000
) -> tuple[Any, bool]:
    """Multinomial logistic regression with L2 weight λ: ``Σ_i CE_i + λ/2 ‖W‖²``.

    Returns:
        scikit-learn's fitted classifier, and whether L-BFGS converged within ``max_iter``.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    classifier = LogisticRegression(C=1 / strength, max_iter=max_iter, solver="lbfgs")
    # NumPy's threads are not torch's, and would not heed torch.set_num_threads.
    with warnings.catch_warnings(), threadpool_limits(torch.get_num_threads()):
        # Reported as `unconverged`: a sweep over twelve decades meets the limit at its weak end.
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(_array(features), _array(labels))
    return classifier, bool(classifier.n_iter_.max() < max_iter)


def _best(tried: dict[float, float]) -> float:
    """The exponent with the highest accuracy; of equals, the strongest regularisation."""
    return max(tried, key=lambda exponent: (tried[exponent], exponent))


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().float().numpy() if tensor.is_floating_point() else tensor.numpy()
