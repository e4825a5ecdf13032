"""The simulated server of `benchmarks/scheduling.py`, on paper."""

import math
import sys

import numpy as np
import pytest
import torch
from places import BENCHMARKS

from lenvm_lightning.distributions.length_distribution import from_quantiles, lognormal

sys.path.append(str(BENCHMARKS))
from scheduling_simulation import POLICIES, Arrival, Known, cvar, gaps_of, simulate, tail_inflated

LONG, MIDDLE, SHORT = Arrival(0, 5), Arrival(1, 3), Arrival(2, 1)


def keyed(*arrivals):
    return [Arrival(one.at, one.tokens, one.prompt_tokens, one.tokens) for one in arrivals]


def test_one_row_as_they_come():
    """They end at 5, 8 and 9, having come at 0, 1 and 2."""
    outcome = simulate([LONG, MIDDLE, SHORT], rows=1)
    assert outcome.latency.tolist() == [5, 7, 7]
    assert outcome.makespan == 9
    summary = outcome.summary()
    assert summary["mean_latency"] == pytest.approx(19 / 3)
    assert summary["latency_a_token"] == pytest.approx((5 / 5 + 7 / 3 + 7 / 1) / 3)
    assert summary["throughput"] == pytest.approx(9 / 9)
    assert summary["p99_latency"] == 7


def test_one_row_short_ones_first():
    """The long one has begun; then the shortest ends at 6 and the middle one at 9."""
    assert simulate(keyed(LONG, MIDDLE, SHORT), rows=1).latency.tolist() == [5, 8, 4]


def test_two_rows():
    """At 0 long, at 1 middle beside it, which ends at 4; short then ends at 5, together with long."""
    for arrivals in ([LONG, MIDDLE, SHORT], keyed(LONG, MIDDLE, SHORT)):
        outcome = simulate(arrivals, rows=2)
        assert outcome.latency.tolist() == [5, 3, 3]
        assert outcome.makespan == 5


def test_prompts_stop_all_rows():
    """Half a step a token: A begins at 1, writes one token until 2, waits for B's prompt until 4, ends at 5; B at 6."""
    outcome = simulate([Arrival(0, 2, 2), Arrival(1.5, 2, 4)], rows=2, prefill=0.5)
    assert outcome.latency.tolist() == [5, 4.5]


def test_an_idle_server_waits_for_the_next_request():
    outcome = simulate([Arrival(3, 2), Arrival(10.5, 2)], rows=4)
    assert outcome.latency.tolist() == [2, 2]
    assert outcome.makespan == 9.5
    assert simulate([Arrival(0, 4), Arrival(1.5, 2)], rows=2).latency.tolist() == [
        4,
        2.5,
    ]  # it begins with a step, at 2


def test_who_waits_comes_nearer_to_its_turn():
    """One row is busy until 10. With patience 2 the 5 tokens of 1 count 11: before 4 tokens of 6, after 4 of 2."""
    first = Arrival(0, 10, key=0)
    for came, patience, latencies in ((6, 2, [14, 13]), (2, 2, [18, 12]), (6, 100, [18, 8]), (6, None, [18, 8])):
        arrivals = [first, Arrival(1, 5, key=5), Arrival(came, 4, key=4)]
        assert simulate(arrivals, rows=1, patience=patience).latency.tolist() == [10, *latencies]


def test_arrivals_have_their_rate_and_their_variation():
    for shape, variation in (("poisson", 1.0), ("bursty", 2.5)):
        gaps = gaps_of(shape, 200_000, 0.25, np.random.default_rng(0))
        assert gaps.mean() == pytest.approx(4, rel=0.03)  # 2.5 / √200,000 is .6%
        assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.03)
    assert gaps_of("at once", 3, 0.25, np.random.default_rng(0)).tolist() == [0, 0, 0]


def test_cvar_and_the_inflated_mean_by_hand():
    """Uniform between 0 and 100: the worst tenth is 95 in the mean. Of an exponential tail: its level and its mean."""
    levels = torch.linspace(0.01, 0.999, 990, dtype=torch.float64)
    uniform = from_quantiles((100 * levels)[None], levels)
    assert cvar(uniform) == pytest.approx([95], abs=0.1)
    assert tail_inflated(uniform) == pytest.approx([145], abs=1)
    exponential = from_quantiles(-20 * torch.log(1 - levels[None]), levels)
    assert cvar(exponential) == pytest.approx([20 * math.log(10) + 20], rel=0.01)


def test_what_a_scheduler_is_told():
    lengths = lognormal(torch.tensor([10.0, 30.0], dtype=torch.float64), 0.5)
    rows = [
        {
            "tokens": 7 + k,
            "prompt_tokens": 3,
            "quantiles": {str(q): float(lengths.quantile(q)[k]) for q in (0.1, 0.5, 0.9)},
        }
        for k in range(2)
    ]
    known = Known.of(rows)
    assert POLICIES["oracle"](known).tolist() == [7, 8]
    assert POLICIES["as they come"](known).tolist() == [0, 0]
    assert POLICIES["quantile .5"](known) == pytest.approx([10, 30])
    assert POLICIES["expected"](known) == pytest.approx(known.lengths.mean().tolist())
    assert (POLICIES["longest first"](known) == -known.expected).all()
    given = Known.of([{**row, "expected": 5.0 - k} for k, row in enumerate(rows)])
    assert POLICIES["expected"](given).tolist() == [5, 4]
    assert (POLICIES["CVaR .9"](known) > POLICIES["quantile .9"](known)).all()
