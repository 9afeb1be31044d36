"""Ranks and answer sets: what every accuracy here rests on."""

import pytest
import torch

from mmkern.eval.ranking import answer_mask, answer_sets, best_rank


def test_tie_counts_against_the_right_answer():
    """A model that scores everything alike would be reported as perfect."""
    right = torch.tensor([[False, True, False, False]])
    assert best_rank(torch.ones(1, 4), right).tolist() == [3]


def test_any_right_answer_counts_and_right_ones_do_not_block_each_other():
    """One picture under two names would cost a model that found one of them."""
    scores = torch.tensor([[3.0, 3.0, 1.0, 2.0]])
    right = torch.tensor([[True, True, False, False]])
    assert best_rank(scores, right).tolist() == [0]


@pytest.mark.parametrize("column", [0, 1], ids=["wrong is NaN", "right is NaN"])
def test_nan_never_earns_a_place(column):
    """A diverged model would show a good accuracy."""
    scores = torch.tensor([[0.0, 1.0]])
    scores[0, column] = torch.nan
    assert best_rank(scores, torch.tensor([[False, True]])).tolist() == [1]


def test_minus_infinity_ties_too():
    """Scores masked to -inf would be handed the first place."""
    scores = torch.full((1, 3), -torch.inf)
    assert best_rank(scores, torch.tensor([[True, False, False]])).tolist() == [2]


def test_row_without_right_answer_is_an_error():
    """A picture with no name among the candidates would silently count as wrong."""
    with pytest.raises(ValueError, match="row 1 has no right"):
        best_rank(torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]))


@pytest.mark.parametrize(
    "answers",
    [
        torch.tensor([2, 0]),
        torch.tensor([[False, False, True], [True, False, False]]),
        [2, 0],
        [[2], [0]],
    ],
    ids=["indices", "mask", "list", "sets"],
)
def test_answers_in_every_form(answers):
    """One of the accepted forms of answers would be read as another."""
    assert answer_sets(answers, 3) == [[2], [0]]
    assert answer_mask([[2], [0, 1]], 3, torch.device("cpu")).int().tolist() == [
        [0, 0, 1],
        [1, 1, 0],
    ]


@pytest.mark.parametrize("answers", [[3], [-1], [[]], torch.zeros(1, 4, dtype=torch.bool)])
def test_impossible_answers_are_errors(answers):
    """An index that wraps around would mark a wrong name as right."""
    with pytest.raises(ValueError, match="answers"):
        answer_sets(answers, 3)
