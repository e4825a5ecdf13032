"""Targets, their inverses and the losses: small numbers by hand."""

import math
from typing import get_args

import pytest
import torch

from lenvm_lightning.objectives import LengthTarget, LossConfig, TargetKind, state_weights, token_losses
from lenvm_lightning.values import logit_to_value, remaining_to_value

DISCOUNTED = LengthTarget("discounted", gamma=0.5)
LENGTH = LengthTarget("length", gamma=0.5)
NORMALISED = LengthTarget("normalised", gamma=0.5, scale=10.0)
LOG_LENGTH = LengthTarget("log_length", gamma=0.5)
RULES = [LengthTarget(kind, gamma=0.997, scale=4000.0) for kind in get_args(TargetKind)]  # a new one among them


def by_kind(rule):
    return rule.kind


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (DISCOUNTED, [0.0, -0.5, -0.875, -1 + 2.0**-20]),
        (LENGTH, [0.0, 1.0, 3.0, 20.0]),
        (NORMALISED, [0.0, 0.1, 0.3, 1.0]),  # 20 tokens are beyond the scale of 10
        (LOG_LENGTH, [0.0, math.log(2), math.log(4), math.log(21)]),
    ],
)
def test_targets_by_hand(rule, expected):
    got = rule.of(torch.tensor([0, 1, 3, 20]))
    assert got.tolist() == pytest.approx(expected, rel=1e-6)  # float32
    for dtype in (torch.int64, torch.float16, torch.bfloat16):
        assert rule.of(torch.tensor([3], dtype=dtype)).dtype == torch.float32


@pytest.mark.parametrize("rule", RULES, ids=by_kind)
@pytest.mark.parametrize("remaining", [1, 2, 37, 500, 3000])
def test_bias_predicts_its_length(rule, remaining):
    logit = torch.tensor(rule.bias_for(remaining), dtype=torch.float64)
    assert rule.remaining(logit).item() == pytest.approx(remaining, rel=1e-9)  # double precision, survival 1e-4
    target = rule.of(torch.tensor(float(remaining), dtype=torch.float64))
    assert rule.predict(logit).item() == pytest.approx(target.item(), rel=1e-12)  # double precision
    assert rule.value(logit).item() == pytest.approx(-(1 - 0.997**remaining), rel=1e-9)


@pytest.mark.parametrize("rule", RULES, ids=by_kind)
def test_bias_of_a_huge_length_still_lets_the_head_learn(rule):
    logit = torch.tensor(rule.bias_for(10**6), dtype=torch.float64, requires_grad=True)
    rule.predict(logit).backward()
    assert abs(logit.grad.item()) > 5e-7  # discounted and normalised stop 1e-6 short of saturation


@pytest.mark.parametrize(
    ("rule", "low", "high"),
    [(RULES[0], -1, 0), (RULES[1], 0, math.inf), (RULES[2], 0, 1), (RULES[3], 0, math.inf)],
    ids=["discounted", "length", "normalised", "log_length"],
)
def test_predictions_stay_in_range_and_grow_with_the_logit(rule, low, high):
    logit = torch.linspace(-50, 50, 201)
    prediction, remaining, value = rule.predict(logit), rule.remaining(logit), rule.value(logit)
    assert ((low <= prediction) & (prediction <= high)).all()
    assert prediction.diff().abs().sum() > 0.99  # it reaches over the range
    assert (prediction.diff() * (-1 if low else 1) >= 0).all()
    assert (remaining >= 0).all()
    assert (remaining.diff() >= 0).all()
    assert ((value >= -1) & (value <= 0)).all()
    for dtype in (torch.bfloat16, torch.float16):
        half = torch.tensor([1.0], dtype=dtype)
        assert rule.predict(half).dtype == rule.remaining(half).dtype == rule.value(half).dtype == torch.float32


def test_values_of_all_kinds_agree():
    for rule in RULES:
        logit = torch.tensor(rule.bias_for(250), dtype=torch.float64)
        expected = remaining_to_value(torch.tensor(250.0).double(), 0.997)
        torch.testing.assert_close(rule.value(logit), expected, rtol=1e-9, atol=0.0)  # double precision, twice there


def losses(kind, rule, logit, target, remaining):
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (logit, target)]
    return token_losses(*tensors, torch.tensor([remaining]), kind, rule)[0].tolist()


ZERO = math.log(3)  # sigmoid(ln 3) = 3/4


@pytest.mark.parametrize(
    ("kind", "rule", "logit", "target", "remaining", "expected"),
    [
        # V = -3/4 against -1/2 (one token) and 0 (EOS): errors 1/4 and 3/4
        ("mse", DISCOUNTED, [ZERO, ZERO], [-0.5, 0.0], [1, 0], [1 / 32, 9 / 32]),
        ("huber", DISCOUNTED, [ZERO, ZERO], [-0.5, 0.0], [1, 0], [1 / 32, 9 / 32]),
        # softplus(ln(e^3 - 1)) = 3 against 1 and 2.5: beyond delta = 1 the loss is |error| - 1/2
        ("huber", LENGTH, [math.log(math.expm1(3))] * 2, [1.0, 2.5], [1, 3], [1.5, 1 / 8]),
        ("mse", LENGTH, [math.log(math.expm1(3))] * 2, [1.0, 2.5], [1, 3], [2.0, 1 / 8]),
        # relative: -3/4 against -7/8 is 1/8, divided by 7/8
        ("relative_huber", DISCOUNTED, [ZERO], [-0.875], [3], [1 / 98]),
        # … over at least the target of one token: |-3/4 + 1/4| = 1/2 over 1/2 instead of over 1/4
        ("relative_huber", DISCOUNTED, [ZERO], [-0.25], [2], [0.5]),
        # … and at EOS nothing is divided: 3/4
        ("relative_huber", DISCOUNTED, [ZERO], [0.0], [0], [9 / 32]),
        # one token of a normalised length is 1/10: |3/4 - 1/20| / (1/10) = 7, minus 1/2
        ("relative_huber", NORMALISED, [ZERO], [0.05], [1], [6.5]),
        # one token of a length is 1, of a log length ln 2: |3 - 1/2| / 1 - 1/2 and |ln 4 - ln 2| / ln 2 = 1
        ("relative_huber", LENGTH, [math.log(math.expm1(3))], [0.5], [1], [2.0]),
        ("relative_huber", LOG_LENGTH, [math.log(3)], [math.log(2)], [1], [0.5]),
        ("absolute", DISCOUNTED, [ZERO, ZERO], [-0.5, 0.0], [1, 0], [1 / 4, 3 / 4]),
        # cross-entropy of 3/4 against 1/2 and 0
        ("bce", DISCOUNTED, [ZERO] * 2, [-0.5, 0.0], [1, 0], [-0.5 * math.log(3 / 16), math.log(4)]),
        ("bce", NORMALISED, [ZERO], [0.5], [5], [-0.5 * math.log(3 / 16)]),
    ],
)
def test_losses_by_hand(kind, rule, logit, target, remaining, expected):
    assert losses(kind, rule, logit, target, remaining) == pytest.approx(expected, rel=1e-12)  # double precision


@pytest.mark.parametrize("kind", ["mse", "huber", "relative_huber", "bce"])
def test_the_best_logit_is_the_target(kind):
    target = remaining_to_value(torch.tensor([[1.0, 5.0, 200.0]]).double(), 0.997)
    logit = torch.logit(-target).requires_grad_()
    loss = token_losses(logit, target, torch.tensor([[1, 5, 200]]), kind, RULES[0])
    assert torch.autograd.grad(loss.sum(), logit)[0].abs().max() < 1e-12  # double precision
    for shift in (-0.1, 0.1):
        assert (token_losses(logit + shift, target, torch.tensor([[1, 5, 200]]), kind, RULES[0]) > loss).all()


@pytest.mark.parametrize("kind", ["mse", "huber", "relative_huber", "bce"])
def test_half_precision_logits_count_in_float32(kind):
    logit, target = torch.tensor([[1.1, -2.0]], dtype=torch.bfloat16), torch.tensor([[-0.7, -0.1]])
    got = token_losses(logit, target, torch.tensor([[9, 1]]), kind, RULES[0])
    assert torch.equal(got, token_losses(logit.float(), target, torch.tensor([[9, 1]]), kind, RULES[0]))


@pytest.mark.parametrize("rule", [LENGTH, LOG_LENGTH], ids=by_kind)
def test_cross_entropy_needs_a_probability(rule):
    with pytest.raises(ValueError, match=f"'bce' needs a target between 0 and 1 in size, which '{rule.kind}' is not"):
        losses("bce", rule, [0.0], [0.5], [1])


def test_the_least_absolute_error_is_at_the_median_and_the_least_squared_one_at_the_mean():
    lengths = torch.tensor([[1, 2, 100]])
    target, grid = RULES[0].of(lengths), torch.linspace(-6, 6, 4001)[:, None]
    best = {
        kind: RULES[0].remaining(grid[token_losses(grid, target, lengths, kind, RULES[0]).sum(1).argmin()]).item()
        for kind in ("absolute", "mse")
    }
    assert best["absolute"] == pytest.approx(2, rel=0.01)  # steps of the grid
    assert best["mse"] == pytest.approx(float(RULES[0].remaining(torch.logit(-target.mean()))), rel=0.01)


def test_weights_by_hand():
    # completions of 3 and 1 tokens after prompts of 2 and 1, the second one padded; the last has 1 token of 4
    remaining = torch.tensor([[0, 3, 2, 1, 0], [1, 0, 0, 0, 0], [0, 0, 4, 3, 0]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0]]).bool()
    assert torch.equal(state_weights(remaining, mask, "token"), mask.double())
    start, third, fourth = 1 / 16, 15 / 16 / 3, 15 / 16 / 4
    expected = [[0, start, third, third, third], [start, 15 / 16, 0, 0, 0], [0, 0, start, fourth, 0]]
    assert state_weights(remaining, mask, "completion").tolist() == expected


def test_errors_name_the_choices():
    with pytest.raises(ValueError, match="weight must be one of token, completion; got 'row'"):
        state_weights(torch.zeros(1, 1), torch.ones(1, 1).bool(), "row")
    with pytest.raises(ValueError, match="loss must be one of mse, huber, relative_huber, bce, absolute; got 'l1'"):
        losses("l1", DISCOUNTED, [0.0], [0.0], [0])
    with pytest.raises(ValueError, match="got 'steps'"):
        LengthTarget("steps", gamma=0.9)
    with pytest.raises(ValueError, match="scale must be positive"):
        LengthTarget("normalised", gamma=0.9, scale=0.0)


def test_value_of_a_discounted_head_is_its_prediction():
    logit = torch.linspace(-5, 5, 11)
    assert torch.equal(DISCOUNTED.value(logit), logit_to_value(logit))
    assert torch.equal(DISCOUNTED.predict(logit), logit_to_value(logit))


def test_settings_of_the_loss_that_cannot_be_are_all_told():
    assert LossConfig().problems() == []
    assert LossConfig(target="normalised", kind="bce").problems() == []
    found = LossConfig(target="length", kind="bce", weight="row", lam=0.5, censored="skip").problems()
    assert [problem.split()[0] for problem in found] == ["loss.lam", "loss.kind:", "loss.weight", "loss.censored"]
