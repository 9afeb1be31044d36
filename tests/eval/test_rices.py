"""RICES: exact nearest shots, the most similar last."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmkern.eval.rices import Rices


def test_nearest_are_exact_and_the_most_similar_is_last() -> None:
    """Prompts would hold other examples, or the best one far from the query."""
    generator = torch.Generator().manual_seed(0)
    support = torch.randn(40, 6, generator=generator) * torch.rand(40, 1, generator=generator)
    queries = torch.randn(9, 6, generator=generator)
    found = Rices(support).shots(queries, 5, chunk=4)
    for query, row in zip(queries, found.tolist(), strict=True):
        cosines = F.cosine_similarity(query[None], support)
        assert row == cosines.argsort(descending=True)[:5].flip(0).tolist()


def test_excluded_and_equal_pictures() -> None:
    """A query would be its own example, or ties fall as the sort likes."""
    support = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    exclude = torch.tensor([[True, False, False, False]])
    assert Rices(support).shots(support[:1], 3, exclude).tolist() == [[2, 3, 1]]
    assert Rices(support).shots(support[:1], 0).shape == (1, 0)


def test_errors() -> None:
    """Asking for more than there are would give fewer shots without a word."""
    with pytest.raises(ValueError, match="k must be 0 to the 2"):
        Rices(torch.ones(2, 3)).shots(torch.ones(1, 3), 3)
    with pytest.raises(ValueError, match=r"queries must be \[Q, 3\]"):
        Rices(torch.ones(2, 3)).shots(torch.ones(1, 2), 1)
    with pytest.raises(ValueError, match=r"features must be \[support, D\]"):
        Rices(torch.ones(0, 3))
    with pytest.raises(ValueError, match=r"exclude must be \[1, 2\]"):
        Rices(torch.ones(2, 3)).shots(torch.ones(1, 3), 1, torch.ones(2, 2, dtype=torch.bool))
