"""Distributions of what remains: by-hand numbers of curves, and what heads predict and learn."""

import math

import pytest
import torch

from lenvm_lightning.distributions.length_distribution import LengthDistribution, from_quantiles, lognormal

DOUBLE = torch.float64


def halves() -> LengthDistribution:
    """0 tokens with 1/4, 1 to 2 with 1/2, 3 to 6 with 1/8, more than 6 with 1/8, 8 more in the mean."""
    tokens = torch.tensor([-1.0, 0.0, 2.0, 6.0], dtype=DOUBLE)
    return LengthDistribution(tokens, torch.tensor([1.0, 0.75, 0.25, 0.125], dtype=DOUBLE), 8.0)


def test_survival_is_read_off_the_curve_and_falls_exponentially_beyond_it():
    curve = halves()
    asked = [-2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 6.0, 14.0]
    expected = [1.0, 1.0, 0.75, 0.5, 0.25, 0.1875, 0.125, 0.125 / math.e]
    assert [float(curve.survival(t)) for t in asked] == pytest.approx(expected, abs=1e-15)
    assert float(curve.cdf(2.0)) == 0.75


def test_quantiles_invert_survival():
    curve = halves()
    assert float(curve.median()) == 1.0
    assert float(curve.quantile(0.1)) == 0.0  # no length is negative
    assert float(curve.quantile(0.8125)) == pytest.approx(4.0)
    assert float(curve.quantile(1 - 0.125 / math.e)) == pytest.approx(14.0)
    assert float(curve.quantile(1.0)) == math.inf
    level = torch.linspace(0.3, 0.99, 50, dtype=DOUBLE)
    many = LengthDistribution(curve.tokens, curve.longer.expand(50, 4), 8.0)
    torch.testing.assert_close(many.cdf(many.quantile(level)), level)


def test_the_mean_counts_whole_numbers():
    # 1/4 · 0 + 1/2 · (1 + 2)/2 + 1/8 · (3 + 4 + 5 + 6)/4 + 1/8 · 14
    assert float(halves().mean()) == 0.75 + 0.5625 + 1.75


def test_states_keep_apart_and_share_what_they_share():
    longer = torch.tensor([[1.0, 0.75, 0.25, 0.125], [1.0, 0.5, 0.0, 0.0]], dtype=DOUBLE)
    curve = LengthDistribution(halves().tokens, longer, torch.tensor([8.0, 1.0], dtype=DOUBLE))
    assert curve.survival(1.0).tolist() == [0.5, 0.25]
    assert curve.survival(torch.tensor([2.0, 0.0], dtype=DOUBLE)).tolist() == [0.25, 0.5]
    assert curve.mean().tolist() == [3.0625, 0.75]
    assert curve.quantile(0.999)[1] == pytest.approx(2.0, abs=0.01)


def test_a_curve_through_quantiles_has_these_quantiles_and_goes_on_as_it_fell():
    curve = from_quantiles(torch.tensor([[3.0, 5.0, 9.0]], dtype=DOUBLE), torch.tensor([0.25, 0.5, 0.75], dtype=DOUBLE))
    assert [float(curve.quantile(q)) for q in (0.25, 0.5, 0.75)] == [3.0, 5.0, 9.0]
    assert float(curve.quantile(0.875)) == pytest.approx(13.0)  # halved every 4 tokens, as from 5 to 9
    assert float(curve.survival(17.0)) == pytest.approx(0.0625)


def test_log_normal_has_its_median_where_the_prediction_is():
    curve = lognormal(torch.tensor([0.0, 9.0, 99.0], dtype=DOUBLE), sigma=0.5)
    torch.testing.assert_close(curve.median(), torch.tensor([0.0, 9.0, 99.0], dtype=DOUBLE))
    above = torch.special.ndtr(torch.tensor(math.log(120.0 / 100.0) / 0.5, dtype=DOUBLE))
    assert float(curve.cdf(119.0)[2]) == pytest.approx(float(above), abs=0.003)
