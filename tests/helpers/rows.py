"""Rows of a cache, fed one token after the other."""

import pytest
import torch
from tiny_generators import build

from lenvm_lightning.decoding.model_runner import ModelRunner


@pytest.fixture(scope="module")
def exact():
    """A text model in float64."""
    return ModelRunner(build("tiny-text", torch.float64))


def start(decoder, cache, row, ids):
    """Fill a row with all but the last of the ids."""
    cache.fill([row], decoder.prefill([ids[:-1]]), [0], len(ids) - 1)


def feed(cache, sequences):
    """The last token of the sequence of each row."""
    ids = torch.zeros(cache.rows, 1, dtype=torch.long)
    for row, sequence in sequences.items():
        ids[row, 0] = sequence[-1]
    return ids


def next_logits(model, ids):
    """What the whole sequence gives, without any cache."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
