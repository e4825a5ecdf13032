"""What a batch of one finished and one truncated completion teaches under each treatment."""

import numpy as np
import pytest
import torch

from lenvm_lightning.censoring import anchor, tail_after_cut, treat_censored
from lenvm_lightning.values import remaining_to_value

# Two prompt tokens (the second is s_0), three generated ones; the second row was truncated, and padding follows.
REMAINING = torch.tensor([[0, 3, 2, 1, 0], [0, 2, 1, 0, 0]])
MASK = torch.tensor([[False, True, True, True, True], [False, True, True, True, False]])
CENSORED = torch.tensor([False, True])
PREDICTED = torch.tensor([[9.0, 9.0, 9.0, 9.0, 9.0], [9.0, 8.0, 7.5, 6.5, 99.0]])
NOWHERE = torch.zeros_like(MASK)
WITHOUT_CUT = torch.tensor([[False, True, True, True, True], [False, True, True, False, False]])


def treat(kind, predicted=PREDICTED):
    return treat_censored(REMAINING, MASK, CENSORED, predicted, kind)


def test_as_finished_believes_the_cut():
    remaining, mask, lower_bound = treat("as_finished")
    assert torch.equal(remaining, REMAINING)
    assert torch.equal(mask, MASK)
    assert torch.equal(lower_bound, NOWHERE)


def test_drop_leaves_the_row_out():
    remaining, mask, lower_bound = treat("drop")
    assert torch.equal(remaining, REMAINING)
    assert torch.equal(mask, torch.stack([MASK[0], NOWHERE[1]]))
    assert torch.equal(lower_bound, NOWHERE)


def test_one_sided_takes_what_was_seen_as_a_lower_bound():
    remaining, mask, lower_bound = treat("one_sided")
    assert torch.equal(remaining, REMAINING)
    assert torch.equal(mask, WITHOUT_CUT)  # nothing is known at the cut itself
    assert torch.equal(lower_bound & mask, torch.stack([NOWHERE[0], WITHOUT_CUT[1]]))


@pytest.mark.parametrize("kind", ["anchored", "bootstrap"])
def test_bootstrap_adds_the_estimate_at_the_cut(kind):
    remaining, mask, lower_bound = treat(kind)
    assert remaining[0].tolist() == [0.0, 3.0, 2.0, 1.0, 0.0]
    assert remaining[1, 1:4].tolist() == [8.5, 7.5, 6.5]  # 2, 1, 0 seen and 6.5 expected after the cut
    assert torch.equal(mask, WITHOUT_CUT)  # at the cut the target would be the prediction itself
    assert torch.equal(lower_bound, NOWHERE)


def test_bootstrap_reads_the_cut_alone_and_carries_no_gradient():
    predicted = torch.full_like(PREDICTED, torch.nan)
    predicted[1, 3] = 6.5
    remaining = treat("bootstrap", predicted.requires_grad_()).remaining
    assert not remaining.requires_grad
    assert remaining[1, 1:4].tolist() == [8.5, 7.5, 6.5]
    assert remaining[0].tolist() == REMAINING[0].tolist()


@pytest.mark.parametrize("kind", ["anchored", "bootstrap", "drop", "one_sided", "as_finished"])
def test_without_truncated_rows_nothing_changes(kind):
    remaining, mask, lower_bound = treat_censored(REMAINING, MASK, torch.zeros(2, dtype=torch.bool), PREDICTED, kind)
    assert remaining.tolist() == REMAINING.tolist()
    assert torch.equal(mask, MASK)
    assert not lower_bound.any()


def test_tail_is_what_the_second_half_before_the_cut_says():
    # Truncated at 10, so positions 6 to 10 count: the rows spend 0, 1, 3, 5 and 5 tokens there, and two of them end.
    assert tail_after_cut([3, 6, 8, 10, 10], [False, False, False, True, True]) == 14 / 2
    # An end at the limit is an end; what goes on behind the limit of most rows is not looked at.
    assert tail_after_cut([10, 10, 10, 40], [False, True, True, False]) == 20 / 1
    # Rows with other limits count as long as they are seen: 5 + 3 + 5 + 1 tokens, one end.
    assert tail_after_cut([10, 8, 12, 6], [True, True, True, False]) == 14 / 1


def test_tail_without_evidence():
    assert tail_after_cut([5, 7], [False, False]) is None
    assert tail_after_cut([2, 10], [False, True]) is None


def test_tail_of_a_constant_hazard_is_its_mean():
    lengths = np.random.default_rng(0).geometric(1 / 50, size=20_000)
    truncated = lengths > 40
    assert tail_after_cut(np.minimum(lengths, 40).tolist(), truncated.tolist()) == pytest.approx(50, rel=0.03)


def test_anchor_is_halfway_in_value():
    # A geometric length with mean 2 has E[2^-L] = 1/4 + 1/16 + … = 1/3; the model says one token, 2^-1.
    found = anchor(torch.tensor([1.0]), 2.0, gamma=0.5)
    assert torch.allclose(0.5**found, torch.tensor([(1 / 3 + 1 / 2) / 2]))


def test_anchor_without_a_tail_is_the_estimate():
    assert torch.equal(anchor(PREDICTED, None, gamma=0.9), PREDICTED)


def test_an_error_at_the_cut_comes_back_by_half():
    """In value, and hence in the targets of all states before it."""
    estimates = torch.tensor([60.0, 90.0], dtype=torch.float64)
    low, high = remaining_to_value(estimates, 0.99)
    anchored_low, anchored_high = remaining_to_value(anchor(estimates, 75.0, 0.99), 0.99)
    assert float(anchored_high - anchored_low) == pytest.approx(float(high - low) / 2)


def test_unknown_treatment():
    known = "anchored, bootstrap, drop, one_sided, as_finished"
    with pytest.raises(ValueError, match=f"censored must be one of {known}; got 'skip'"):
        treat("skip")
