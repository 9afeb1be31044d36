"""The rank of the right answer, with ties counted against the model."""

from collections.abc import Sequence

import torch
from torch import Tensor

Answers = Tensor | Sequence[int] | Sequence[Sequence[int]]


def best_rank(scores: Tensor, right: Tensor) -> Tensor:
    """How many wrong candidates stand before the best right one, in each row.

    ``rank_i = #{j wrong : not (s_ij < max over right j' of s_ij')}``. A wrong candidate with the
    same score stands before the right one, so a model that gives every candidate one score gets the
    worst rank, not the best; a score of NaN counts as ahead, so a diverged model scores nothing.

    Args:
        scores: [N, C], floating.
        right: [N, C] bool, the candidates that count as right; at least one in each row.

    Returns:
        [N] int64, 0 is the first place.

    Raises:
        ValueError: shapes differ, or a row has no right candidate.
    """
    if scores.ndim != 2 or scores.shape != right.shape:
        raise ValueError(
            f"best_rank: expected scores and right of one shape [N, C], "
            f"got {tuple(scores.shape)} and {tuple(right.shape)}"
        )
    lacking = ~right.any(1)
    if lacking.any():
        row = int(lacking.nonzero()[0])
        raise ValueError(f"best_rank: row {row} has no right candidate")
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return (~right & ~(scores < best)).sum(1)


def answer_sets(answers: Answers, count: int) -> list[list[int]]:
    """Right candidates of each query as lists of indices.

    Args:
        answers: [N] integers (one right candidate each), [N, count] bool, or a sequence of
            integers or of sequences of integers (several right candidates).
        count: number of candidates.

    Raises:
        ValueError: an index outside [0, count), an empty set, or a mask of another width.
    """
    if isinstance(answers, Tensor) and answers.dtype == torch.bool:
        if answers.ndim != 2 or answers.shape[1] != count:
            raise ValueError(
                f"answers: expected a bool mask [N, {count}], got {tuple(answers.shape)}"
            )
        sets: list[list[int]] = [row.nonzero().flatten().tolist() for row in answers]
    else:
        listed = answers.tolist() if isinstance(answers, Tensor) else answers
        sets = [[int(a)] if not isinstance(a, Sequence) else [int(i) for i in a] for a in listed]
    for query, allowed in enumerate(sets):
        if not allowed:
            raise ValueError(f"answers: query {query} has no right candidate")
        if min(allowed) < 0 or max(allowed) >= count:
            raise ValueError(
                f"answers: query {query} names candidates {allowed}, expected 0 to {count - 1}"
            )
    return sets


def answer_mask(sets: Sequence[Sequence[int]], count: int, device: torch.device) -> Tensor:
    """[len(sets), count] bool mask of ``sets``."""
    rows = [i for i, allowed in enumerate(sets) for _ in allowed]
    columns = [j for allowed in sets for j in allowed]
    mask = torch.zeros(len(sets), count, dtype=torch.bool)
    mask[rows, columns] = True
    return mask.to(device)
