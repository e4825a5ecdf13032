"""The order in which a client sends a batch."""

import pytest
import torch

from lenvm_lightning.distributions.length_distribution import from_quantiles
from lenvm_lightning.serving.start_order import start_order


def test_short_ones_first_or_long_ones_and_equals_as_they_came():
    lengths = [120.0, 3.0, 80.0, 3.0, 120.0]
    assert start_order(lengths) == [1, 3, 2, 0, 4]
    assert start_order(lengths, "longest") == [0, 4, 2, 1, 3]
    assert start_order(torch.tensor(lengths)) == [1, 3, 2, 0, 4]
    assert start_order([]) == []
    assert start_order([float("inf"), 5]) == [1, 0]


def test_a_quantile_counts_where_the_risk_does():
    """Two prompts of the same median; the mean and the 90% quantile of the first are larger. A third lies between."""
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    tokens = torch.tensor([[5.0, 50.0, 400.0], [40.0, 50.0, 60.0], [45.0, 55.0, 65.0]], dtype=torch.float64)
    lengths = from_quantiles(tokens, levels)
    assert start_order(lengths, quantile=0.5) == [0, 1, 2]
    assert start_order(lengths, quantile=0.1) == [0, 1, 2]
    assert start_order(lengths, quantile=0.9) == [1, 2, 0]
    assert start_order(lengths) == [1, 2, 0]
    assert start_order(lengths, "longest", quantile=0.9) == [0, 2, 1]


def test_what_has_no_order_is_refused():
    with pytest.raises(ValueError, match="1 of 2 lengths are no numbers, the first is that of prompt 1"):
        start_order([1.0, float("nan")])
    with pytest.raises(ValueError, match=r"lengths of shape \(1, 2\): one number a prompt"):
        start_order(torch.ones(1, 2))
    with pytest.raises(ValueError, match="expected lengths have none"):
        start_order([1.0], quantile=0.9)
    with pytest.raises(ValueError, match="quantile=1 is none"):
        start_order(from_quantiles(torch.ones(1, 2).cumsum(-1), torch.tensor([0.3, 0.6])), quantile=1.0)
