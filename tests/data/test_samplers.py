"""Batches without repeated labels."""

import numpy as np
import pytest
import torch

from mmkern.data.samplers import GroupedBatchSampler, UniqueBatchSampler

LABELS = torch.arange(200) % 37


def test_batches_have_distinct_labels():
    """Two pictures of one thing in a batch would be each other's negatives."""
    for epoch in range(5):
        sampler = UniqueBatchSampler(LABELS, 16, seed=epoch)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == 200 // 16
        assert all(len(set(LABELS[b].tolist())) == 16 == len(b) for b in batches)
        used = [index for batch in batches for index in batch]
        assert len(set(used)) == len(used) == 192


def test_order_depends_on_seed_and_epoch():
    """A resumed run would train on other batches, or all epochs on the same."""
    orders = set()
    for seed in range(3):
        for epoch in range(3):
            sampler = UniqueBatchSampler(LABELS, 16, seed=seed)
            sampler.set_epoch(epoch)
            order = tuple(map(tuple, sampler))
            assert order == tuple(map(tuple, sampler))
            orders.add(order)
    assert len(orders) == 9


def test_every_sample_takes_its_turn():
    """Some pictures would never be trained on, or company in a batch would always be the same."""
    sampler = UniqueBatchSampler(LABELS, 16)
    used, neighbours = torch.zeros(200), set()
    for epoch in range(40):
        sampler.set_epoch(epoch)
        for batch in sampler:
            used[batch] += 1
            if 0 in batch:
                neighbours.update(batch)
    assert used.min() >= 30 and used.max() <= 40
    assert len(neighbours) > 150


def test_start_inside_an_epoch():
    """A resumed epoch would begin with the wrong batch."""
    sampler = UniqueBatchSampler(LABELS, 16)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.set_epoch(2, start=5)
    assert list(sampler) == whole[5:] and len(sampler) == len(whole) - 5
    sampler.set_epoch(2)
    assert list(sampler) == whole
    with pytest.raises(ValueError, match=r"start must be 0\.\.12 batches"):
        sampler.set_epoch(0, start=13)


def test_ranks_share_a_global_batch():
    """With several ranks a name would meet itself in the gathered batch."""
    whole = list(UniqueBatchSampler(LABELS, 16, seed=4))
    parts = [list(UniqueBatchSampler(LABELS, 4, seed=4, rank=r, world_size=4)) for r in range(4)]
    assert [[*a, *b, *c, *d] for a, b, c, d in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize(
    "labels, size, batches",
    [
        ([0] * 90 + list(range(1, 11)), 4, 3),
        ([0] * 5 + [1] * 5, 2, 5),
        (list(range(7)), 7, 1),
        ([0, 0, 0, 1], 1, 4),
    ],
)
def test_lopsided_labels(labels, size, batches):
    """A label with most of the samples would make batches impossible, or too short."""
    sampler = UniqueBatchSampler(labels, size)
    dealt = list(sampler)
    assert len(dealt) == batches == len(sampler)
    assert all(len({labels[i] for i in batch}) == len(batch) == size for batch in dealt)


def test_impossible_batches():
    """A batch larger than the number of names would hang or repeat one."""
    with pytest.raises(ValueError, match="a batch of 38 needs as many labels, got 37"):
        UniqueBatchSampler(LABELS, 38)
    with pytest.raises(ValueError, match="0 <= rank < world_size"):
        UniqueBatchSampler(LABELS, 4, rank=2, world_size=2)


def grouped(**options):
    lengths = np.random.default_rng(0).integers(5, 100, 103)
    kinds = np.arange(103) % 3 == 0
    return lengths, kinds, GroupedBatchSampler(lengths, kinds, 4, seed=7, stretch=3, **options)


def test_grouped_batches_are_of_one_kind_and_alike_lengths():
    """Texts would wait for pictures, and most of a batch be padding."""
    lengths, kinds, sampler = grouped()
    batches = list(sampler)
    assert len(batches) == len(sampler) == 25
    used = np.concatenate(batches)
    assert len(set(used.tolist())) == 100
    mixed = [batch for batch in batches if len(set(kinds[batch])) > 1]
    assert len(mixed) <= 1
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
    loose = np.mean([np.ptp(lengths[part]) for part in np.split(np.arange(100), 25)])
    assert spread < 0.5 * loose


def test_grouped_order_is_of_seed_and_epoch_and_resumes():
    """A resumed run would see other batches, or every epoch the same."""
    _, _, sampler = grouped()
    first = list(sampler)
    torch.rand(5)
    assert list(grouped()[2]) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0, start=20)
    assert list(sampler) == first[20:] and len(sampler) == 5


def test_grouped_ranks_share_the_global_batch():
    """Ranks would train on the same samples, or one rank on all the long ones."""
    lengths, _, whole = grouped()
    lengths = np.asarray(lengths)
    parts = [list(GroupedBatchSampler(lengths, whole.kinds, 2, seed=7, stretch=3, rank=r,
                                      world_size=2)) for r in range(2)]  # fmt: skip
    for batch, first, second in zip(whole, *parts, strict=True):
        assert sorted(first + second) == sorted(batch)
        gap = abs(int(lengths[first].sum()) - int(lengths[second].sum()))
        assert gap <= np.ptp(lengths[batch])


@pytest.mark.parametrize("options", [{"stretch": 0}, {"rank": 2, "world_size": 2}])
def test_grouped_sampler_refuses_what_it_cannot_do(options):
    """A wrong number would show as an endless or an empty epoch."""
    with pytest.raises(ValueError, match="GroupedBatchSampler"):
        GroupedBatchSampler([1, 2, 3], [0, 0, 0], 2, **options)
    with pytest.raises(ValueError, match="at least 4"):
        GroupedBatchSampler([1, 2, 3], [0, 0, 0], 4)
