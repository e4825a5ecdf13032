"""lambda-returns against numbers by hand and a reference that follows the definition word by word."""

import pytest
import torch

from lenvm_lightning.returns import lambda_returns, remaining_after_cut
from lenvm_lightning.values import logit_to_remaining, logit_to_value, remaining_to_value


def reference(value, remaining, mask, gamma, lam):
    """Per row: the states in order, what follows the last one, then the sum of discounted errors of each state."""
    targets = torch.zeros_like(value)
    for i in range(len(value)):
        where = mask[i].nonzero().flatten().tolist()
        left = [float(remaining[i, t]) for t in where]
        values = [float(value[i, t]) for t in where]
        deltas = []
        for k, r in enumerate(left):
            if r == 0:
                break
            following = values[k + 1] if k + 1 < len(left) else -(1 - gamma ** (r - 1))
            if r == 1:  # what follows is the EOS state
                following = 0.0
            deltas.append(-(1 - gamma) + gamma * following - values[k])
        for k in range(len(deltas)):
            errors = sum((gamma * lam) ** j * delta for j, delta in enumerate(deltas[k:]))
            targets[i, where[k]] = values[k] + errors
    return targets


def random_batch(seed, rows=16, width=24):
    """Rows of any length on either side of the padding; every third is cut before EOS, with a known rest."""
    generator = torch.Generator().manual_seed(seed)
    remaining = torch.zeros(rows, width, dtype=torch.int64)
    mask = torch.zeros(rows, width, dtype=torch.bool)
    for i in range(rows):
        states = int(torch.randint(1, width + 1, (1,), generator=generator))
        beyond = int(torch.randint(1, 50, (1,), generator=generator)) if i % 3 == 0 else 0
        start = (0, width - states)[i % 2]
        remaining[i, start : start + states] = torch.arange(states - 1, -1, -1) + beyond
        mask[i, start : start + states] = True
    value = -torch.rand(rows, width, generator=generator, dtype=torch.float64)
    return value, remaining, mask


@pytest.mark.parametrize(
    ("lam", "expected"),
    [
        # gamma = 1/2, so a token costs 1/2. V = (-.5, -.25, -.75, -.5), and what the head says at EOS is not used.
        # lambda 0: r + gamma V_next = -.5 + .5 * (-.25, -.75, -.5, 0)
        (0.0, [-0.625, -0.875, -0.75, -0.5, 0.0]),
        # lambda 1/2: delta = (-.125, -.625, 0, 0); A_3 = 0, A_2 = 0, A_1 = -.625, A_0 = -.125 + .25 * -.625 = -.28125
        (0.5, [-0.78125, -0.875, -0.75, -0.5, 0.0]),
        # lambda 1: -(1 - 2^-4), …, -(1 - 2^-1)
        (1.0, [-0.9375, -0.875, -0.75, -0.5, 0.0]),
    ],
)
def test_four_tokens_by_hand(lam, expected):
    value = torch.tensor([[-0.5, -0.25, -0.75, -0.5, -0.9]])
    remaining = torch.tensor([[4, 3, 2, 1, 0]])
    got = lambda_returns(value, remaining, torch.ones(1, 5, dtype=torch.bool), 0.5, lam)
    # Halves and quarters are exact; the closed form goes through expm1, which rounds.
    assert got[0].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [0.5, 0.997])
def test_equals_the_definition(gamma, lam):
    for seed in range(3):
        value, remaining, mask = random_batch(seed)
        remaining = remaining.double()  # counts become float32
        got = lambda_returns(value, remaining, mask, gamma, lam)
        # Double precision, sums of at most 24 terms below 1.
        torch.testing.assert_close(got, reference(value, remaining, mask, gamma, lam), rtol=0.0, atol=1e-13)
        assert (got[~mask] == 0).all()


def test_lambda_1_is_the_limit_and_the_closed_form():
    value, remaining, mask = random_batch(7)
    got = lambda_returns(value, remaining, mask, 0.99, 1.0)
    torch.testing.assert_close(got[mask], remaining_to_value(remaining.double(), 0.99)[mask], rtol=0.0, atol=1e-7)
    near = lambda_returns(value, remaining, mask, 0.99, 1.0 - 1e-9)
    # 1e-9 less trust in each of up to 24 steps; the closed form of integers is float32 (6e-8).
    torch.testing.assert_close(near, got, rtol=0.0, atol=1e-7)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_eos_teaches_nothing_but_zero(lam):
    value, remaining, mask = random_batch(1)
    ended = mask & (remaining == 0)
    assert ended.any()
    other = torch.where(ended, -0.123, value)
    got = lambda_returns(value, remaining, mask, 0.9, lam)
    assert torch.equal(got, lambda_returns(other, remaining, mask, 0.9, lam))
    assert (got[ended] == 0).all()


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_padding_does_not_matter(lam):
    value, remaining, mask = random_batch(2)
    expected = lambda_returns(value, remaining, mask, 0.9, lam)
    value, remaining = value.masked_fill(~mask, torch.nan), remaining.masked_fill(~mask, 77)
    assert torch.equal(lambda_returns(value, remaining, mask, 0.9, lam), expected)


def test_a_cut_completion_uses_the_known_rest():
    value = torch.tensor([[-0.5, -0.5]])
    got = lambda_returns(value, torch.tensor([[5, 4]]), torch.ones(1, 2, dtype=torch.bool), 0.5, 0.0)
    # The last state bootstraps from 3 known tokens, -.5 + .5 * -(1 - 2^-3); the first from the head, -.5 + .5 * -.5.
    assert got[0].tolist() == pytest.approx([-0.75, -0.9375], rel=1e-6)  # float32


def test_estimate_beyond_a_cut_is_the_n_step_return():
    logit_at_cut, gamma = torch.tensor([2.0, -1.0], dtype=torch.float64), 0.98
    seen = torch.tensor([[3, 2, 1, 0], [3, 2, 1, 0]])
    beyond = logit_to_remaining(logit_at_cut, gamma)
    got = remaining_to_value(remaining_after_cut(seen, beyond, torch.tensor([True, False])), gamma)
    expected = logit_to_value(logit_at_cut[0])
    for k in range(4):  # k rewards, then the value at the cut
        assert got[0, 3 - k].item() == pytest.approx(expected.item(), abs=1e-12)  # double precision
        expected = -(1 - gamma) + gamma * expected
    assert torch.equal(got[1], remaining_to_value(seen[1].double(), gamma))


def test_targets_carry_no_gradient():
    value = torch.full((1, 4), -0.5, requires_grad=True)
    beyond = torch.ones(1, requires_grad=True)
    remaining = remaining_after_cut(torch.tensor([[3, 2, 1, 0]]), beyond, torch.tensor([True]))
    assert not remaining.requires_grad
    for lam in (0.0, 0.5, 1.0):
        assert not lambda_returns(value, remaining, torch.ones(1, 4, dtype=torch.bool), 0.9, lam).requires_grad


@pytest.mark.parametrize("lam", [-0.1, 1.1])
def test_lambda_must_lie_between_0_and_1(lam):
    with pytest.raises(ValueError, match="lambda must lie between 0 and 1"):
        lambda_returns(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), 0.9, lam)
