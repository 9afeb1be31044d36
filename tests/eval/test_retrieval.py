"""Recall at k in both directions."""

import pytest
import torch
import torch.nn.functional as F

from mmkern.eval.retrieval import recall_at_k, recall_from_scores


def dense_recall(image, text, image_ids, text_ids, k):
    """The same figure from the whole similarity matrix and a sort."""
    scores = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    found = text_ids[scores.argsort(1, descending=True)[:, :k]]
    return (found == image_ids[:, None]).any(1).double().mean().item()


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_five_captions_a_picture_match_a_dense_sort(chunk):
    """Recall on COCO-like sets would be wrong, or depend on the chunk."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(20, 6, generator=generator)
    text_ids = torch.arange(20).repeat_interleave(5)[torch.randperm(100, generator=generator)]
    text = image[text_ids] + 1.5 * torch.randn(100, 6, generator=generator)
    got = recall_at_k(image, text, text_ids=text_ids, chunk=chunk)
    ids = torch.arange(20)
    for k in (1, 5, 10):
        assert got[f"image_to_text_r{k}"] == pytest.approx(
            dense_recall(image, text, ids, text_ids, k)
        )
        assert got[f"text_to_image_r{k}"] == pytest.approx(
            dense_recall(text, image, text_ids, ids, k)
        )
    assert 0 < got["text_to_image_r1"] < got["text_to_image_r10"]


def test_directions_are_not_swapped():
    """The two directions would be reported under each other's name."""
    image = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    text = torch.tensor([[1.0, 0.0], [1.0, 0.05]])
    got = recall_at_k(image, text, ks=(1,))
    assert got == {"image_to_text_r1": 1.0, "text_to_image_r1": 0.5}


def test_collapsed_embeddings_recall_nothing():
    """A tower that maps everything to one point would have perfect recall."""
    got = recall_at_k(torch.ones(30, 4), torch.ones(30, 4))
    assert set(got.values()) == {0.0}


def test_shared_ids_make_any_of_them_right():
    """Pictures of one name would count as errors for each other."""
    image = torch.eye(3)
    text = torch.eye(3)[[1, 0, 2]]
    ids = torch.tensor([7, 7, 9])
    assert recall_at_k(image, text, ks=(1,))["image_to_text_r1"] == pytest.approx(1 / 3)
    assert recall_at_k(image, text, image_ids=ids, text_ids=ids, ks=(1,))["image_to_text_r1"] == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"text_ids": torch.tensor([0, 1, 5])},
        {"text_ids": torch.tensor([0, 1])},
        {"chunk": 0},
    ],
    ids=["a picture without caption", "ids of another length", "no chunk"],
)
def test_impossible_sets_are_errors(arguments):
    """A picture without captions would lower recall instead of being reported."""
    with pytest.raises(ValueError, match="recall_at_k"):
        recall_at_k(torch.eye(3), torch.eye(3), **arguments)


def test_recall_from_scores_equals_that_of_embeddings():
    """Re-ranked results would be counted in another way than those before."""
    generator = torch.Generator().manual_seed(2)
    image, text = torch.randn(2, 12, 4, generator=generator)
    scores = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    assert recall_from_scores(scores, scores, torch.eye(12).bool()) == recall_at_k(image, text)
    worst = torch.zeros_like(scores)
    found = recall_from_scores(scores, worst, torch.eye(12).bool(), (1,))
    assert found["text_to_image_r1"] == 0 and found["image_to_text_r1"] > 0
    with pytest.raises(ValueError, match="one shape"):
        recall_from_scores(scores, scores[:3], torch.eye(12).bool())
