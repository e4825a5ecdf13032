"""The formula, its inverse and its sign: by hand, and far out where floats end."""

import math

import pytest
import torch

from lenvm_lightning.values import (
    gamma_for_length,
    inverse_softplus,
    logit_to_remaining,
    logit_to_value,
    remaining_to_logit,
    remaining_to_value,
    softplus,
    value_to_remaining,
)

GAMMAS = (0.5, 0.9, 0.997, 0.9999)


def test_values_by_hand():
    value = remaining_to_value(torch.tensor([0, 1, 2, 3]), 0.5)
    assert value.tolist() == [0.0, -0.5, -0.75, -0.875]  # powers of two are exact
    assert value_to_remaining(value, 0.5).tolist() == pytest.approx([0, 1, 2, 3], rel=1e-6)  # a few float32 roundings


def test_logits_by_hand():
    logit = torch.tensor([0.0, math.log(3.0)], dtype=torch.float64)  # survival 1 / (1 + e^z) = 1/2, 1/4
    assert logit_to_value(logit).tolist() == pytest.approx([-0.5, -0.75], rel=1e-15)
    assert logit_to_remaining(logit, 0.5).tolist() == pytest.approx([1.0, 2.0], rel=1e-15)
    assert remaining_to_logit(torch.tensor([1.0, 2.0]).double(), 0.5).tolist() == pytest.approx(logit.tolist())
    assert remaining_to_logit(torch.tensor(0), 0.5) == -math.inf
    assert logit_to_remaining(torch.tensor(-math.inf), 0.5) == 0.0


def test_a_longer_rest_has_a_lower_value_and_a_higher_logit():
    remaining = torch.arange(1, 2000)
    assert (remaining_to_value(remaining, 0.997).diff() < 0).all()
    assert (remaining_to_logit(remaining, 0.997).diff() > 0).all()


def test_published_example():
    logit = torch.tensor(17.0)
    # softplus(17) / -ln 0.997, worked out in double precision; float32 carries 7 digits.
    assert logit_to_remaining(logit, 0.997).item() == pytest.approx(5658.16, abs=0.01)
    naive = torch.log(1.0 + logit_to_value(logit)) / math.log(0.997)
    assert naive.isinf()  # the float32 value is already -1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_lengths_come_back_from_their_logits(gamma, dtype):
    remaining = torch.cat([torch.tensor([0, 1, 2, 3, 5, 10]), torch.logspace(1, 6, 2000).long()]).to(dtype)
    remaining[-1] = 1_000_000
    back = logit_to_remaining(remaining_to_logit(remaining, gamma), gamma)
    # A logit of size |z| <= 10 is rounded by up to 10 eps, and where the rest is short that is its relative error.
    torch.testing.assert_close(back, remaining, rtol=16 * torch.finfo(dtype).eps, atol=0.0)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_lengths_come_back_from_their_values_while_these_have_digits(gamma):
    remaining = torch.linspace(0, 10 / -math.log(gamma), 500, dtype=torch.float64)
    back = value_to_remaining(remaining_to_value(remaining, gamma), gamma)
    # The survival e^-10 keeps eps * e^10 = 5e-12 of relative precision.
    torch.testing.assert_close(back, remaining, rtol=1e-11, atol=0.0)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 24), (torch.float64, 53)])
def test_value_near_minus_one_saturates(dtype, bits):
    ceiling = bits * math.log(2) / -math.log(0.997)
    got = value_to_remaining(torch.tensor([-1.0, -1.0 + 2.0**-bits, -1.5], dtype=dtype), 0.997)
    assert got.tolist() == pytest.approx([ceiling] * 3, rel=1e-6)  # float32 has 7 digits
    assert value_to_remaining(torch.tensor(1e-7, dtype=dtype), 0.997) == 0.0  # rounding noise above 0


def test_half_precision_and_integers_become_float32():
    for dtype in (torch.bfloat16, torch.float16):
        logit = torch.tensor([-3.0, 5.0], dtype=dtype)
        assert logit_to_remaining(logit, 0.997).dtype == logit_to_value(logit).dtype == torch.float32
        assert torch.equal(logit_to_remaining(logit, 0.997), logit_to_remaining(logit.float(), 0.997))
        assert value_to_remaining(logit_to_value(logit).to(dtype), 0.997).dtype == torch.float32
    for dtype in (torch.int32, torch.int64, torch.uint8):
        remaining = torch.tensor([0, 200], dtype=dtype)
        assert torch.equal(remaining_to_value(remaining, 0.997), remaining_to_value(remaining.float(), 0.997))
        assert torch.equal(remaining_to_logit(remaining, 0.997), remaining_to_logit(remaining.float(), 0.997))


def test_gamma_for_length():
    assert gamma_for_length(1500) == pytest.approx(0.01 ** (1 / 1500), rel=1e-15)
    assert gamma_for_length(2, coverage=0.75) == pytest.approx(0.5, rel=1e-15)
    assert remaining_to_value(torch.tensor(1500.0).double(), gamma_for_length(1500)).item() == pytest.approx(-0.99)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_closed_form_is_the_bellman_recursion(gamma):
    value = [0.0]
    for _ in range(3000):
        value.append(-(1.0 - gamma) + gamma * value[-1])
    closed = remaining_to_value(torch.arange(3001, dtype=torch.float64), gamma)
    # Each step of the recursion rounds by eps; discounting keeps the sum below eps / (1 - gamma) = 2e-12.
    torch.testing.assert_close(closed, torch.tensor(value, dtype=torch.float64), rtol=0.0, atol=3e-12)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [(logit_to_remaining, (0.997,)), (logit_to_value, ()), (softplus, ())],
)
def test_gradients_are_finite_at_extreme_logits(function, arguments):
    logit = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4], requires_grad=True)
    function(logit, *arguments).sum().backward()
    assert logit.grad.isfinite().all()
    assert logit.grad[3] != 0.0


def test_gradient_of_the_remaining_length_never_vanishes_upwards():
    logit = torch.tensor([5.0, 50.0, 1e4], requires_grad=True)
    logit_to_remaining(logit, 0.5).sum().backward()
    slope = torch.sigmoid(logit.detach()) / math.log(2)  # softplus' = sigmoid
    torch.testing.assert_close(logit.grad, slope, rtol=1e-6, atol=0.0)  # float32 rounding


def test_softplus_is_accurate_where_torch_switches():
    x = torch.tensor([-40.0, -1.0, 0.0, 19.9, 20.1, 30.0], dtype=torch.float64)
    exact = [math.log1p(math.exp(-abs(v))) + max(v, 0.0) for v in x.tolist()]
    assert softplus(x).tolist() == pytest.approx(exact, rel=1e-15)
    # Going back divides the error by the slope, sigmoid(x); at -40 the logit is a log and keeps its digits.
    torch.testing.assert_close(inverse_softplus(softplus(x)), x, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("gamma", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_gamma_must_lie_between_0_and_1(gamma):
    for function in (remaining_to_value, value_to_remaining, logit_to_remaining, remaining_to_logit):
        with pytest.raises(ValueError, match="gamma must lie strictly between 0 and 1"):
            function(torch.zeros(1), gamma)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [((0,), "length must be positive"), ((math.nan,), "length"), ((5, 1.0), "coverage"), ((5, 0.0), "coverage")],
)
def test_gamma_for_length_refuses(arguments, text):
    with pytest.raises(ValueError, match=text):
        gamma_for_length(*arguments)
