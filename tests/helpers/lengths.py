"""Lengths and prompts of rows, for the tests of batches."""

import itertools

import numpy as np

from lenvm_lightning.training.packing import pack, width_of

BUDGET = 8192
GROUPED = [1, 2, 16, 1000]  # completions of a prompt that stay in a batch


def long_tailed(rows=3000, seed=0):
    """Lengths like completions': median 265 tokens, 99% within 1600."""
    random = np.random.default_rng(seed)
    return np.minimum(20 + random.lognormal(5.5, 0.8, rows), 4096).astype(int).tolist()


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


def of_prompts(rows, seed=0):
    """Prompts of 1 to 31 rows each, which lie anywhere."""
    random = np.random.default_rng(seed)
    return random.permutation(np.repeat(np.arange(rows), random.integers(1, 32, rows))[:rows]).tolist()


def computed(lengths, batch):
    """Positions of a packed batch."""
    sizes = [lengths[row] for row in batch]
    bins = pack(sizes)
    assert sorted(flat(bins)) == list(range(len(sizes)))
    return len(bins) * width_of(bins, sizes)
