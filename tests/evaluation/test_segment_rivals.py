"""The hard cut and the ramp, by hand."""

import math

import torch

from lenvm_lightning.evaluation.segment_rivals import HardCut, Ramp

PROBS = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64)
REMAINING = torch.tensor([[7.0, 0.0, 2.0]], dtype=torch.float64)  # the second candidate ends the segment


def under(control, written):
    return control(PROBS, REMAINING, torch.tensor([written]), 0.99)[0].tolist()


def test_a_hard_cut_changes_nothing_but_the_last_token():
    control = HardCut(10, "</think>")
    assert under(control, 8) == PROBS[0].tolist()
    assert under(control, 9) == [0.0, 1.0, 0.0]
    assert [bool(control.ends(torch.tensor([written])).due) for written in (8, 9, 12)] == [False, True, True]


def test_a_ramp_grows_to_the_end_of_the_budget():
    """Over the last four of twenty tokens, to eight nats: 2 with token 17, 4 with the next."""
    control = Ramp(20, "</think>", share=0.2, most=8.0)
    assert under(control, 15) == PROBS[0].tolist()
    for written, bias in ((16, 2.0), (17, 4.0)):
        weight = 0.3 * math.exp(bias)
        assert math.isclose(under(control, written)[1], weight / (0.7 + weight), rel_tol=1e-9)
    assert under(control, 19) == [0.0, 1.0, 0.0]
    assert [bool(control.ends(torch.tensor([written])).due) for written in (15, 16)] == [False, True]
