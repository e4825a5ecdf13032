"""What heads predict of lengths and how they learn it: by-hand losses, and distributions that are found again."""

import dataclasses
import math

import pytest
import torch

from lenvm_lightning.distributions.heads import (
    Bins,
    Discounts,
    HeadConfig,
    Quantiles,
    log_spaced_edges,
    make_rule,
    rule_from_plain,
    rule_to_plain,
)

NOT = torch.zeros(1, 1, dtype=torch.bool)
YES = ~NOT
KINDS = ("bins", "quantiles", "discounts")


def one(tokens: int) -> torch.Tensor:
    return torch.tensor([[tokens]])


def test_edges_are_whole_numbers_as_alike_in_log_as_may_be():
    assert log_spaced_edges(6, 100) == (0, 1, 3, 10, 32, 100)
    assert log_spaced_edges(8, 3) == (0, 1, 2, 3)
    edges = log_spaced_edges(31, 1024)
    assert len(edges) == 31
    assert edges[-1] == 1024
    assert edges == tuple(sorted(set(edges)))


def bins() -> Bins:
    """{0}, {1, 2}, {3 … 6}, more; shares .1, .2, .3, .4."""
    return Bins(edges=(0, 2, 6), tail=8.0)


SHARES = torch.log(torch.tensor([[[0.1, 0.2, 0.3, 0.4]]]))


@pytest.mark.parametrize(("tokens", "share"), [(0, 0.1), (1, 0.2), (2, 0.2), (3, 0.3), (6, 0.3), (7, 0.4), (999, 0.4)])
def test_bins_learn_the_share_of_the_range_that_a_length_is_in(tokens, share):
    assert float(bins().losses(SHARES, one(tokens), NOT, one(tokens))) == pytest.approx(-math.log(share))


@pytest.mark.parametrize(
    ("seen", "share"), [(0, 0.9), (1, 0.8), (2, 0.7), (3, 0.625), (5, 0.475), (6, 0.4), (7, 0.4), (999, 0.4)]
)
def test_bins_learn_of_truncated_completions_that_more_follows(seen, share):
    loss = bins().losses(SHARES, one(seen), YES, one(seen))
    assert float(loss) == pytest.approx(-math.log(share))
    if seen <= 6:
        assert float(bins().distribution(SHARES).survival(float(seen))) == pytest.approx(share)


def test_gradients_of_bins_are_finite_where_a_range_is_ruled_out():
    outputs = SHARES.clone().requires_grad_()
    bins().losses(outputs, one(6), YES, one(6)).sum().backward()
    assert outputs.grad is not None
    torch.testing.assert_close(outputs.grad[0, 0], torch.tensor([0.1, 0.2, 0.3, -0.6]))


def test_quantiles_learn_by_the_pinball_loss_in_log_tokens():
    rule = Quantiles((0.25, 0.75))
    tokens = torch.tensor([3.0, 15.0])
    gaps = torch.diff(torch.log1p(tokens), prepend=torch.zeros(1))
    outputs = torch.log(torch.expm1(gaps))[None, None]
    torch.testing.assert_close(rule.distribution(outputs).quantile(0.25), torch.tensor([[3.0]]))
    short, long = math.log(8 / 4), math.log(8 / 16)
    assert float(rule.losses(outputs, one(7), NOT, one(7))) == pytest.approx((0.25 * short - 0.25 * long) / 2)
    assert float(rule.losses(outputs, one(7), YES, one(7))) == pytest.approx(0.25 * short / 2)


def test_discounts_learn_the_transform_of_the_length():
    rule = Discounts((0.5, 0.9), (0, 1, 10), 5.0)
    outputs = torch.zeros(1, 1, 2)
    assert float(rule.losses(outputs, one(3), NOT, one(3))) == pytest.approx(math.log(2))
    # The best prediction for lengths of 1 and of 3 alike is the mean of 1 - gamma ** length.
    best = torch.logit(torch.tensor([1 - (0.5 + 0.125) / 2, 1 - (0.9 + 0.729) / 2]))[None, None].requires_grad_()
    sum(rule.losses(best, one(n), NOT, one(n)) for n in (1, 3)).backward()
    assert best.grad is not None
    assert float(best.grad.abs().max()) < 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_head_predicts_a_geometric_length(kind):
    rule = make_rule(kind, 32, 2000, 100.0)
    assert rule is not None
    found = rule.distribution(rule.start(60.0)[None, None])
    assert float(found.median()) == pytest.approx(60 * math.log(2), rel=0.1)
    assert float(found.mean()) == pytest.approx(60, rel=0.1)
    assert float(found.survival(120.0)) == pytest.approx(math.exp(-2), abs=0.03)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [None, 80])
def test_training_finds_a_mixture_of_short_and_long(kind, cut):
    """Without an input: 3 of 4 lengths about 20, 1 of 4 about 200, or, truncated at 80, more than 80."""
    torch.manual_seed(0)
    short = torch.randint(15, 26, (900,))
    lengths = torch.cat([short, torch.randint(180, 221, (300,))])
    rule = make_rule(kind, 32, cut or 400, 130.0)
    assert rule is not None
    truncated = lengths > (cut or 10_000)
    seen = lengths.clamp(max=cut or 10_000)[:, None]
    outputs = rule.start(60.0).clone().requires_grad_()
    optimizer = torch.optim.Adam([outputs], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        expanded = outputs.expand(len(lengths), 1, -1)
        rule.losses(expanded, seen, truncated[:, None], lengths[:, None]).mean().backward()
        optimizer.step()
    found = rule.distribution(outputs.detach()[None, None])
    assert float(found.quantile(0.4)) == pytest.approx(20, abs=4)
    if kind != "discounts":  # whose inversion is smooth
        assert float(found.cdf(60.0)) == pytest.approx(0.75, abs=0.05)
    if kind == "bins":
        assert float(found.survival(79.0)) == pytest.approx(0.25, abs=0.02)
    if cut is None and kind != "discounts":
        assert float(found.quantile(0.9)) == pytest.approx(200, rel=0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_rules_are_written_and_read(kind):
    rule = make_rule(kind, 12, 500, None)
    assert rule is not None
    assert rule_from_plain(rule_to_plain(rule)) == rule
    assert rule.start(10.0).shape == (rule.size,)
    assert make_rule("point", 12, 500, None) is None


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "histogram"},
        {"edges": []},
        {"edges": [0, 5, 5]},
        {"edges": "0123"},
        {"edges": [0, float("nan")]},
        {"tail": 0},
        {"tail": "8"},
        {"tail": 10**400},
        {"edges": [0, 10**400]},
        {"edges": [0, 1e300]},
        {"edges": [-0.5, 2]},
        {"levels": [0.5]},
    ],
)
def test_a_rule_that_means_nothing_is_refused(change):
    with pytest.raises(ValueError, match="length_head"):
        rule_from_plain({**rule_to_plain(bins()), **change})


def test_settings_say_all_that_is_wrong():
    assert HeadConfig().problems() == []
    found = HeadConfig(kind="histogram", size=1, weight=-1.0).problems()  # type: ignore[arg-type]
    assert len(found) == 3
    assert dataclasses.replace(HeadConfig(), kind="bins").problems() == []


def test_one_level_is_none():
    with pytest.raises(ValueError, match="levels must be 2 to 1024"):
        rule_from_plain({"kind": "quantiles", "levels": [0.5]})


def test_numbers_beyond_all_measure_stay_numbers():
    rule = make_rule("discounts", 8, 500, None)
    assert rule is not None
    for outputs in (torch.full((8,), 800.0), torch.full((8,), -800.0)):
        assert bool(rule.distribution(outputs).median().isfinite())
    outputs = SHARES.clone().requires_grad_()
    bins().losses(outputs, one(-100), NOT, one(0)).masked_fill(torch.tensor([[True]]), 0.0).sum().backward()
    assert outputs.grad is not None
    assert bool(outputs.grad.isfinite().all())
