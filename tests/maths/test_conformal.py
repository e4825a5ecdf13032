"""Intervals that hold on held-out prompts: by-hand levels, coverage on unseen states, truncated completions."""

import json
import math

import pytest
import torch

from lenvm_lightning.distributions.conformal import (
    LEVELS,
    Calibration,
    calibrate,
    calibration_from_plain,
    calibration_to_plain,
    effective_size,
    kaplan_meier,
)
from lenvm_lightning.distributions.length_distribution import LengthDistribution, lognormal

NONE = torch.zeros


def uniform(top: float, states: int = 1) -> LengthDistribution:
    """Any number of tokens from -1 to `top` alike."""
    curve = torch.tensor([-1.0, top], dtype=torch.float64).expand(states, 2)
    return LengthDistribution(curve, torch.tensor([1.0, 0.0], dtype=torch.float64).expand(states, 2), 1.0)


def test_kaplan_and_meier_by_hand():
    """Scores .2 and .4 known, .4 and .5 truncated, .8 known: 1/5, then 1/4 of what is left, then all of it."""
    score = torch.tensor([0.4, 0.2, 0.5, 0.4, 0.8])
    truncated = torch.tensor([True, False, True, False, False])
    values, share = kaplan_meier(score, truncated)
    assert values.tolist() == pytest.approx([0.2, 0.4, 0.8])
    assert share.tolist() == pytest.approx([0.2, 0.4, 1.0])
    values, share = kaplan_meier(torch.tensor([0.3, 0.6]), torch.tensor([False, True]))
    assert (values.tolist(), share.tolist()) == ([pytest.approx(0.3)], [0.5])


def test_levels_are_order_statistics_a_little_further_out():
    score = torch.arange(1, 101, dtype=torch.float64) / 200  # 100 prompts, scores .005 to .5: predicted far too long
    found = calibrate(score, NONE(100, dtype=torch.bool), NONE(100), torch.arange(100))
    assert found is not None
    assert (found.bands, found.prompts) == ((0,), (100,))
    asked = dict(zip(LEVELS, found.asked[0], strict=True))
    assert asked[0.5] == 0.25
    assert asked[0.95] == 0.48  # the 96th: 95 · 1.01 = 95.95
    assert asked[0.05] == 0.025  # the 5th: 100 - 95.95 = 4.05
    assert float(found.quantile(uniform(99.0), 0.5, 0)) == pytest.approx(24.0)
    assert float(found.quantile(uniform(99.0), 0.625, 0)) == pytest.approx(100 * (0.25 + 0.38) / 2 - 1)  # between


def test_states_count_by_how_much_they_tell():
    score = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert effective_size(score, torch.arange(50)) == pytest.approx(50)
    # Four states a prompt: all alike they tell no more than one; independent ones as much as four.
    assert effective_size(score.repeat(4), torch.arange(50).repeat(4)) == pytest.approx(50)
    many = torch.rand(4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert 3000 < effective_size(many, torch.arange(1000).repeat(4)) <= 4000
    assert effective_size(score[:1], torch.zeros(1)) == 1.0


def test_bands_have_levels_of_their_own_and_small_ones_join_the_one_before():
    generator = torch.Generator().manual_seed(0)
    prompt = torch.arange(60).repeat(3)
    written = torch.tensor([0, 20, 70]).repeat_interleave(60)
    score = torch.rand(180, generator=generator, dtype=torch.float64)
    score[60:120] *= 0.5  # after 20 tokens predictions are too long
    keep = (written < 70) | (prompt < 10)  # only 10 prompts get to 70
    found = calibrate(score[keep], NONE(int(keep.sum()), dtype=torch.bool), written[keep], prompt[keep])
    assert found is not None
    assert (found.bands, found.prompts) == ((0, 16), (60, 60))
    lower, upper = found.interval(uniform(99.0, 3), 0.9, torch.tensor([0, 17, 500]))
    assert upper[0] > 85
    assert upper[1] == upper[2] < 75
    assert bool((lower < upper).all())
    assert calibrate(score[:19], NONE(19, dtype=torch.bool), written[:19], prompt[:19]) is None


@pytest.mark.parametrize("limit", [None, 150.0, 60.0])
def test_intervals_hold_on_states_that_were_not_seen(limit):
    """True lengths are log-normal with half of the predicted median and another width; some are truncated."""
    generator = torch.Generator().manual_seed(1)

    def sample(count: int):
        median = torch.randint(20, 100, (count,), generator=generator).double()
        true = 0.5 * median * torch.exp(0.8 * torch.randn(count, generator=generator, dtype=torch.float64))
        seen = true if limit is None else true.clamp(max=limit)
        return lognormal(median, 0.5, points=129), true, seen, true > seen

    distribution, _, seen, truncated = sample(20_000)
    found = calibrate(distribution.cdf(seen), truncated, NONE(20_000), torch.arange(20_000))
    assert found is not None
    distribution, true, _, truncated = sample(20_000)
    for coverage in (0.5, 0.8, 0.9):
        lower, upper = found.interval(distribution, coverage, 0)
        inside = float(((true >= lower) & (true <= upper)).double().mean())
        below = float((true < lower).double().mean())
        assert below == pytest.approx((1 - coverage) / 2, abs=0.015)
        if not bool(torch.isinf(upper).any()):
            assert inside == pytest.approx(coverage, abs=0.02)
    raw = (true >= distribution.quantile(0.05)) & (true <= distribution.quantile(0.95))
    assert float(raw.double().mean()) < 0.75


def test_where_truncated_completions_leave_no_level_there_is_a_lower_bound_only():
    score = torch.linspace(0.01, 0.6, 100, dtype=torch.float64)
    truncated = torch.arange(100) >= 80  # of the longest nothing is known
    found = calibrate(score, truncated, NONE(100), torch.arange(100))
    assert found is not None
    lower, upper = found.interval(uniform(99.0), 0.9, 0)
    assert float(lower) < 10
    assert float(upper) == math.inf
    assert float(found.quantile(uniform(99.0), 0.75, 0)) < 60
    assert float(found.quantile(uniform(99.0), 0.93, 0)) == math.inf


def test_it_is_written_as_json_and_read():
    found = Calibration((0, 16), (0.1, 0.9), ((0.05, 0.8), (0.2, math.inf)), (50, 40), 0.7)
    plain = json.loads(json.dumps(calibration_to_plain(found), allow_nan=False))
    assert calibration_from_plain(plain) == found
    assert calibration_to_plain(None) == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bands": [1, 16]}, "bands must ascend from 0"),
        ({"bands": [0]}, "a row for each band"),
        ({"levels": [0.9, 0.1]}, "levels must ascend"),
        ({"levels": 3}, "calibration must say"),
        ({"asked": [[0.05, 0.8], [0.9, 0.2]]}, "a row for each band"),
        ({"asked": [[0.05, "x"], [0.2, None]]}, "a row for each band"),
        ({"prompts": [50, "many"]}, "whole numbers"),
        ({"bands": [0, 10**30]}, "bands must ascend from 0"),
        ({"bands": [0, 1.5]}, "whole numbers"),
        ({"spread": 1e308}, "spread must be"),
        ({"spread": -1.0}, "spread must be"),
    ],
)
def test_one_that_means_nothing_is_refused(change, said):
    good = {"bands": [0, 16], "levels": [0.1, 0.9], "asked": [[0.05, 0.8], [0.2, None]], "prompts": [50, 40]}
    good["spread"] = 0.5
    assert calibration_from_plain(good).spread == 0.5
    with pytest.raises(ValueError, match=said):
        calibration_from_plain({**good, **change})
