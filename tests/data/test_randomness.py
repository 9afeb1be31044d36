"""Numbers from (seed, epoch, index)."""

import numpy as np
import torch

from mmkern.data.randomness import Stream, generator, permutation, sample_keys, uniform

FROZEN_KEYS = [15020427595393229491, 14056738641343212577]
FROZEN_ORDER = [1, 4, 3, 0, 5, 2]


def test_frozen_values():
    """A new release would reorder the data of runs that are resumed with it."""
    keys = sample_keys(1, 2, [3, 4])
    assert keys.tolist() == FROZEN_KEYS
    assert permutation(0, 0, 6, Stream.SAMPLE_ORDER).tolist() == FROZEN_ORDER


def test_numbers_are_uniform_and_independent():
    """Augmentation would favour some values, or repeat with the seed, the epoch or the index."""
    keys = [sample_keys(seed, epoch, range(500)) for seed in range(3) for epoch in range(3)]
    numbers = np.concatenate([uniform(k, 8, stream) for k in keys for stream in (1, 2)])
    assert len(np.unique(numbers)) == numbers.size
    counts = np.histogram(numbers, bins=16, range=(0, 1))[0]
    expected = numbers.size / 16
    # Chi-squared with 15 degrees of freedom: 37.7 in one case of a thousand.
    assert ((counts - expected) ** 2 / expected).sum() < 37.7
    assert np.abs(np.corrcoef(numbers.T) - np.eye(8)).max() < 0.05


def test_numbers_belong_to_the_sample():
    """A sample's numbers would depend on the others in its batch, or on how many are drawn."""
    keys = sample_keys(7, [0, 1, 1], [5, 5, 6])
    assert np.array_equal(keys[1:2], sample_keys(7, 1, [5]))
    assert np.array_equal(uniform(keys, 9, 3)[2:, :4], uniform(keys[2:], 4, 3))
    assert len(set(keys.tolist())) == 3
    # Negative and huge seeds and indices are as good as any.
    assert len(set(sample_keys(-1, 0, [0, -1, 2**63 - 1]).tolist())) == 3


def test_permutations():
    """A shuffle would lose samples or be the same for every epoch."""
    orders = {tuple(permutation(0, epoch, 50, Stream.SAMPLE_ORDER)) for epoch in range(20)}
    assert len(orders) == 20 and all(sorted(order) == list(range(50)) for order in orders)
    assert permutation(0, 0, 0, Stream.SAMPLE_ORDER).tolist() == []


def test_generator():
    """Two samples would share a generator, or the global one would be touched."""
    before = torch.get_rng_state()
    one, two = (generator(key) for key in sample_keys(0, 0, [0, 1]))
    assert not torch.equal(torch.rand(4, generator=one), torch.rand(4, generator=two))
    assert torch.equal(torch.get_rng_state(), before)
