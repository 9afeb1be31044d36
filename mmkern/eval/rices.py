"""Retrieval of in-context examples by similarity (RICES).

Yang et al., "An Empirical Study of GPT-3 for Few-Shot Knowledge-Based VQA" (arXiv 2109.05014),
as Flamingo uses it (arXiv 2204.14198, section 3.4): shots are the support pictures whose CLIP
features are nearest to the query's, the most similar last, next to the query.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Rices"]


class Rices:
    """An exact index of support pictures by the cosine of their features.

    Args:
        features: [S, D] of the support, of any norm.

    Raises:
        ValueError: another shape, or none.
    """

    def __init__(self, features: Tensor) -> None:
        if features.dim() != 2 or not len(features):
            raise ValueError(f"Rices: features must be [support, D], got {list(features.shape)}")
        self.features = F.normalize(features.float(), dim=-1)

    def shots(
        self, queries: Tensor, k: int, exclude: Tensor | None = None, *, chunk: int = 1024
    ) -> Tensor:
        """int64 [Q, k]: the k nearest of each query [Q, D], the most similar last.

        Of equal similarities the lower index counts as nearer.

        Args:
            queries: [Q, D].
            k: how many.
            exclude: bool [Q, S], those that a query may not have (itself); None: none.
            chunk: queries compared at a time.

        Raises:
            ValueError: shapes, or fewer than k left for a query.
        """
        support, width = self.features.shape
        if queries.dim() != 2 or queries.shape[1] != width:
            raise ValueError(f"Rices: queries must be [Q, {width}], got {list(queries.shape)}")
        if exclude is not None and tuple(exclude.shape) != (len(queries), support):
            raise ValueError(
                f"Rices: exclude must be [{len(queries)}, {support}], got {list(exclude.shape)}"
            )
        left = support if exclude is None else int((~exclude).sum(1).min())
        if not 0 <= k <= left:
            raise ValueError(f"Rices: k must be 0 to the {left} that a query may have, got {k}")
        found = []
        for start in range(0, len(queries), chunk):
            part = F.normalize(queries[start : start + chunk].float(), dim=-1) @ self.features.T
            if exclude is not None:
                part = part.masked_fill(exclude[start : start + chunk], -torch.inf)
            found.append(part.argsort(dim=1, descending=True, stable=True)[:, :k].flip(1))
        return torch.cat(found) if found else queries.new_zeros(0, k, dtype=torch.int64)
