"""What a batch of one finished and one cut completion teaches under each treatment."""

import pytest
import torch

from lenvm_lightning.censoring import treat_censored

# Two prompt tokens (the second is s_0), three generated ones; the second row was cut, and padding follows.
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


def test_bootstrap_adds_the_estimate_at_the_cut():
    remaining, mask, lower_bound = treat("bootstrap")
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


@pytest.mark.parametrize("kind", ["bootstrap", "drop", "one_sided", "as_finished"])
def test_without_cut_rows_nothing_changes(kind):
    remaining, mask, lower_bound = treat_censored(REMAINING, MASK, torch.zeros(2, dtype=torch.bool), PREDICTED, kind)
    assert remaining.tolist() == REMAINING.tolist()
    assert torch.equal(mask, MASK)
    assert not lower_bound.any()


def test_unknown_treatment():
    with pytest.raises(ValueError, match="censored must be one of bootstrap, drop, one_sided, as_finished; got 'skip'"):
        treat("skip")
