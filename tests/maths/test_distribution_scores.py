"""Scores of distributions: by-hand numbers, and what the best prediction gets."""

import math

import pytest
import torch

from lenvm_lightning.distributions.length_distribution import LengthDistribution, lognormal
from lenvm_lightning.distributions.scores import concordance, covered, crps, pinball, pit_histogram

DOUBLE = torch.float64


def between(low: float, high: float) -> LengthDistribution:
    """Any number of tokens between both alike."""
    curve = torch.tensor([[low, high]], dtype=DOUBLE)
    return LengthDistribution(curve, torch.tensor([[1.0, 0.0]], dtype=DOUBLE), 1.0)


def test_pinball_costs_what_is_too_short_by_the_level():
    assert float(pinball(torch.tensor(10.0), torch.tensor(14.0), 0.9)) == pytest.approx(3.6)
    assert float(pinball(torch.tensor(14.0), torch.tensor(10.0), 0.9)) == pytest.approx(0.4)


def test_crps_of_a_certain_prediction_is_its_error():
    certain = between(9.999, 10.0)
    assert float(crps(certain, torch.tensor([17]))) == pytest.approx(7.0, abs=0.01)
    assert float(crps(certain, torch.tensor([17]), left=torch.tensor([12]))) == pytest.approx(7.0, abs=0.01)
    assert float(crps(certain, torch.tensor([8]), left=torch.tensor([8]))) == pytest.approx(0.0, abs=0.01)


def test_crps_of_a_uniform_prediction_by_hand():
    """Uniform from 0 to 60, true 30: the integral of (F - 1{t >= 30})^2 is 2 · 60 · (1/2)^3 / 3 = 5."""
    assert float(crps(between(0.0, 60.0), torch.tensor([30]))) == pytest.approx(5.0, abs=0.05)


def test_crps_is_least_for_the_truth():
    generator = torch.Generator().manual_seed(0)
    true = torch.expm1(4.0 + 0.5 * torch.randn(20_000, generator=generator, dtype=DOUBLE)).clamp(min=0)
    median = torch.full_like(true, math.exp(4.0) - 1)
    score = {sigma: float(crps(lognormal(median, sigma), true).mean()) for sigma in (0.25, 0.5, 1.0)}
    assert score[0.5] < min(score[0.25], score[1.0])


def test_coverage_is_cut_at_the_limit():
    lower, upper = torch.tensor([5.0, 5.0, 50.0]), torch.tensor([20.0, 20.0, math.inf])
    remaining, left = torch.tensor([10, 30, 30]), torch.tensor([30, 30, 30])
    assert covered(lower, upper, remaining).tolist() == [True, False, False]
    assert covered(lower, upper, remaining, left).tolist() == [True, False, True]


def test_the_histogram_spreads_truncated_completions_over_what_they_may_be():
    score = torch.tensor([0.05, 0.55, 0.76, 0.5])
    truncated = torch.tensor([False, False, False, True])
    assert pit_histogram(score, truncated, bins=4).tolist() == pytest.approx([1 / 4, 0, 1.5 / 4, 1.5 / 4])
    even = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    uniform = pit_histogram(even, torch.zeros(100_000).bool())
    assert uniform.tolist() == pytest.approx([0.1] * 10, abs=0.005)


def test_concordance_counts_pairs_whose_order_is_known():
    remaining = torch.tensor([10, 20, 20, 30])
    truncated = torch.tensor([False, False, True, False])
    # Known pairs: 10 before each of three, 20 before the truncated 20 and before 30.
    assert concordance(torch.tensor([1.0, 2.0, 3.0, 4.0]), remaining, truncated) == 1.0
    assert concordance(torch.tensor([1.0, 3.0, 3.0, 2.0]), remaining, truncated) == pytest.approx((3 + 0.5) / 5)
    assert concordance(torch.ones(4), remaining, truncated) == 0.5
    assert concordance(torch.ones(2), torch.tensor([5, 5]), torch.tensor([True, True])) is None
    many = torch.arange(3000)
    assert concordance(-many.double(), many, torch.zeros(3000).bool()) == 0.0
