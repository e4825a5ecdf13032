"""What a critic of length says of tokens: by hand, summed over completions, and on a small MDP by enumeration."""

import itertools

import pytest
import torch

from lenvm_lightning.rl.sequence_rewards import lcpo_exact, lcpo_max, linear_penalty, soft_overlong
from lenvm_lightning.rl.signals import length_advantages, length_td_errors, potential_shaping

GAMMA = 0.9
ONE = torch.tensor([True])


def rows(*lengths, width=None):
    """A mask of completions of these lengths, and random values of their states."""
    torch.manual_seed(0)
    width = width or max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return -torch.rand(len(lengths), width + 1, dtype=torch.float64), mask


# -- one step ---------------------------------------------------------------------------------------------------------


def test_td_errors_by_hand():
    value = torch.tensor([[-0.3, -0.2, -0.1, -0.7], [-0.5, -0.4, -0.6, -0.7]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, False]])
    found = length_td_errors(value, mask, torch.tensor([True, False]), GAMMA)
    ended = [-0.1 - 0.9 * 0.2 + 0.3, -0.1 + 0.2, 0.0]  # nothing follows the last token
    truncated = [-0.1 - 0.9 * 0.4 + 0.5, -0.1 - 0.9 * 0.6 + 0.4, 0.0]  # and here what the model predicts does
    torch.testing.assert_close(found, torch.tensor([ended, truncated], dtype=torch.float64))


def test_right_values_leave_no_error():
    """Of a completion whose length was certain from the beginning."""
    remaining = torch.arange(5, -1, -1, dtype=torch.float64)[None]
    value = -(1 - GAMMA**remaining)
    mask = torch.ones(1, 5, dtype=torch.bool)
    assert length_td_errors(value, mask, torch.tensor([True]), GAMMA).abs().max() < 1e-12
    surprise = value.clone()
    surprise[:, 2:] = -(1 - GAMMA ** (remaining[:, 2:] + 10))  # the second token made it ten longer
    error = length_td_errors(surprise, mask, torch.tensor([False]), GAMMA)[0]
    assert error[1] < -0.1
    assert error[[0, 2, 3]].abs().max() < 1e-12


# -- advantages -------------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    value = torch.tensor([[-0.3, -0.2, 0.0]], dtype=torch.float64)
    mask, ended = torch.ones(1, 2, dtype=torch.bool), torch.tensor([True])
    first, second = -0.1 - 0.9 * 0.2 + 0.3, -0.1 + 0.2
    found = length_advantages(value, mask, ended, GAMMA, lam=0.5)
    torch.testing.assert_close(found, torch.tensor([[first + 0.9 * 0.5 * second, second]], dtype=torch.float64))


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_both_ends_of_lambda(lam):
    value, mask = rows(5, 1, 3)
    ended = torch.tensor([True, True, True])
    found = length_advantages(value, mask, ended, GAMMA, lam)
    if lam == 0.0:
        assert torch.equal(found, length_td_errors(value, mask, ended, GAMMA))
        return
    remaining = (mask.sum(1, keepdim=True) - torch.arange(mask.shape[1])).clamp(min=0)
    returns = -(1 - GAMMA ** remaining.double())
    torch.testing.assert_close(found, (returns - value[:, :-1]).masked_fill(~mask, 0.0))


def test_padding_and_other_rows_change_nothing():
    value, mask = rows(5, 2, 4, width=9)
    ended = torch.tensor([True, False, True])
    together = length_advantages(value, mask, ended, GAMMA, 0.8)
    for row, length in enumerate((5, 2, 4)):
        one = slice(row, row + 1)
        alone = length_advantages(value[one, : length + 1], mask[one, :length], ended[one], GAMMA, 0.8)
        torch.testing.assert_close(together[one, :length], alone)
    assert (together[~mask] == 0).all()


def test_what_follows_an_end_is_not_read():
    value, mask = rows(4, width=6)
    broken = value.clone()
    broken[:, 4:] = torch.nan  # after the end nobody has to predict anything
    for function in (lambda v: length_advantages(v, mask, torch.tensor([True]), GAMMA, 1.0),
                     lambda v: potential_shaping(v, mask)):  # fmt: skip
        assert torch.equal(function(broken), function(value))


def test_half_precision_is_enough_for_the_values():
    remaining = torch.arange(1000, -1, -1, dtype=torch.float64)[None]
    value = -(1 - 0.997**remaining)
    mask = torch.ones(1, 1000, dtype=torch.bool)
    rounded = length_td_errors(value.bfloat16(), mask, ONE, 0.997)
    assert rounded.dtype == torch.float32
    exact = length_td_errors(value.bfloat16().double(), mask, ONE, 0.997)  # of the values as they were stored
    assert (rounded - exact).abs().max() < 1e-6


# -- shaping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_shaping_telescopes(discount):
    value, mask = rows(6, 1, 3, width=8)
    rewards = potential_shaping(value, mask, discount)
    sums = (rewards * discount ** torch.arange(8, dtype=torch.float64)).sum(1)
    torch.testing.assert_close(sums, -value[:, 0])


def best_policy(reward_of, depth=3):
    """The best next token after every beginning of texts of a and b, at most `depth` long, that end with `.`"""
    best, values = {}, {}
    for length in range(depth, -1, -1):
        for text in map("".join, itertools.product("ab", repeat=length)):
            found = {}
            for token in ".ab" if length < depth else ".":
                after = text + token
                found[token] = reward_of(after, len(text)) + (0.0 if token == "." else values[after])
            best[text] = max(found, key=found.get)
            values[text] = found[best[text]]
    return best


def test_shaping_leaves_the_optimum_alone_and_an_advantage_does_not():
    """A task likes every text more or less, and two b's most; a critic that is wrong everywhere must not move it."""
    texts = ["".join(t) for n in range(4) for t in itertools.product("ab", repeat=n)]
    torch.manual_seed(1)
    critic = {text: -float(torch.rand(())) for text in texts}
    likes = {text: float(torch.rand(())) for text in texts} | {"bb": 1.5}

    def task(text, place):
        return likes[text[:-1]] if text.endswith(".") else 0.0

    def shaped(text, place):
        states = [critic[text[:k]] if k < len(text) else critic.get(text, 0.0) for k in range(len(text) + 1)]
        value = torch.tensor([states], dtype=torch.float64)
        mask = torch.ones(1, len(text), dtype=torch.bool)
        if not text.endswith("."):  # the episode goes on: what is read here is not its last token
            value = torch.cat([value, torch.zeros(1, 1, dtype=torch.float64)], 1)
            mask = torch.ones(1, len(text) + 1, dtype=torch.bool)
        return task(text, place) + 5.0 * float(potential_shaping(value, mask)[0, place])

    def priced(text, place):
        """What a token costs: the error of a critic that expects nothing more."""
        value = torch.zeros(1, 2, dtype=torch.float64)
        return task(text, place) + 7.0 * float(length_td_errors(value, torch.ones(1, 1, dtype=torch.bool), ONE, GAMMA))

    assert best_policy(shaped) == best_policy(task)
    assert best_policy(task)[""] == "b"
    assert best_policy(priced) != best_policy(task)


# -- whole completions ------------------------------------------------------------------------------------------------


def test_rewards_of_whole_completions_by_hand():
    lengths = torch.tensor([10, 60, 90, 100, 120])
    assert linear_penalty(lengths, 100, 0.5).tolist() == pytest.approx([-0.05, -0.3, -0.45, -0.5, -0.6])
    assert soft_overlong(lengths, 100, 20).tolist() == pytest.approx([0.0, 0.0, -0.5, -1.0, -1.0])
    correct, target = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]), torch.tensor([20, 60, 60, 50, 60])
    assert lcpo_exact(correct, lengths, target, alpha=0.01).tolist() == pytest.approx([0.9, 1.0, -0.3, 0.5, 0.4])
    assert lcpo_max(correct, lengths, target, alpha=0.01).tolist() == pytest.approx([0.6, 0.5, 0.0, 0.0, 0.0])
    assert lcpo_max(correct, lengths, target, alpha=0.1)[0] == 1.0  # clipped


# -- errors -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused():
    value, mask = rows(3)
    ended = torch.tensor([True])
    for wrong in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="gamma must lie in"):
            length_td_errors(value, mask, ended, wrong)
    with pytest.raises(ValueError, match="without holes"):
        potential_shaping(value, torch.tensor([[True, False, True]]))
    with pytest.raises(ValueError, match="lam must lie in"):
        length_advantages(value, mask, ended, GAMMA, 1.5)
    with pytest.raises(ValueError, match="discount must lie in"):
        potential_shaping(value, mask, 0.0)
    with pytest.raises(ValueError, match="a state more than mask has tokens"):
        length_td_errors(value[:, 1:], mask, ended, GAMMA)
    with pytest.raises(ValueError, match="buffer must lie"):
        soft_overlong(torch.tensor([3]), 10, 0)
