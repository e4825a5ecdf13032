"""Length controls, by hand: small candidate sets whose right answer is seen at a glance."""

import math

import pytest
import torch
from candidates_of_rows import GAMMA, random_candidates

from lenvm_lightning.decoding.batched_controls import per_row
from lenvm_lightning.guidance import AtLeast, AtMost, EqualTo, Gated, Scale, Tilt, until_of
from lenvm_lightning.reweighting import find_beta, pick
from lenvm_lightning.values import length_share


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def mean_g(probs, remaining):
    return (probs * length_share(remaining, GAMMA)).sum(-1)


def test_tilt_by_hand():
    probs, remaining = tensor([0.5, 0.3, 0.2]), tensor([0.0, 50.0, 400.0])
    g = [1 - GAMMA**r for r in (0, 50, 400)]
    weights = [p * math.exp(-5 * x) for p, x in zip((0.5, 0.3, 0.2), g, strict=True)]
    expected = [weight / sum(weights) for weight in weights]
    assert Tilt(-5)(probs, remaining, tensor([3]), GAMMA)[0].tolist() == pytest.approx(expected)


def test_a_negative_tilt_shortens_and_a_positive_one_lengthens():
    probs, remaining = random_candidates()
    shorter, longer = (mean_g(Tilt(beta)(probs, remaining, torch.zeros(64), GAMMA), remaining) for beta in (-3, 3))
    assert (shorter < mean_g(probs, remaining)).all()
    assert (longer > mean_g(probs, remaining)).all()


def test_no_tilt_is_the_base_model_bit_for_bit():
    probs, remaining = random_candidates()
    assert torch.equal(Tilt(0)(probs, remaining, torch.zeros(64), GAMMA), probs)
    assert torch.equal(per_row([None] * 64)(probs, remaining, torch.zeros(64), GAMMA), probs)


@pytest.mark.parametrize(
    ("generated", "chosen"),
    [
        (0, 2),  # 9 should follow this token
        (4, 1),  # 5 should: 4 and 6 are equally near, the likelier is taken
        (8, 3),  # 1 should
        (9, 0),  # this token is the tenth: the end
        (12, 0),  # too late: the end at once
    ],
)
def test_equal_to_counts_the_end_and_is_never_off_by_one(generated, chosen):
    probs, remaining = tensor([0.1, 0.3, 0.1, 0.2, 0.3 - 1e-9]), tensor([0, 4, 8, 1, 6])
    picked = EqualTo(10, mode="hard")(probs, remaining, tensor(generated), GAMMA)
    assert picked.argmax().item() == chosen
    assert picked.sum() == picked.max() == 1


def test_candidates_that_are_not_there_are_never_picked():
    probs, remaining = tensor([0.0, 0.6, 0.4]), tensor([0.0, 30.0, 20.0])
    assert AtMost(5, mode="hard")(probs, remaining, tensor(0), GAMMA).tolist() == [[0, 0, 1]]
    assert pick(probs, remaining).tolist() == [[0, 0, 1]]
    for control in (EqualTo(1, mode="soft"), EqualTo(1), Scale(0.0, "mul"), Tilt(-19)):
        assert control(probs, remaining, tensor(0), GAMMA)[0, 0] == 0


def test_at_least_takes_most_until_this_token_may_be_the_last():
    probs, remaining = tensor([0.8, 0.1, 0.1]), tensor([0.0, 90.0, 30.0])
    chosen = [AtLeast(4, mode="hard")(probs, remaining, tensor(t), GAMMA).argmax().item() for t in range(5)]
    assert chosen == [1, 1, 1, 0, 0]


def test_soft_equal_to_meets_the_target_in_the_mean():
    probs, remaining = random_candidates()
    offered = probs > 0
    lowest = remaining.masked_fill(~offered, torch.inf).amin(-1)
    highest = remaining.masked_fill(~offered, -1).amax(-1)
    generated = 3 * torch.arange(64)
    control = EqualTo(201, mode="soft")
    moved = control(probs, remaining, generated, GAMMA)
    target = length_share((200 - generated).double(), GAMMA)
    within = (target > length_share(lowest, GAMMA)) & (target < length_share(highest, GAMMA))
    assert 20 < within.sum() < 64
    torch.testing.assert_close(mean_g(moved, remaining)[within], target[within], atol=1e-4, rtol=0)
    outside = moved[~within]
    assert (outside.amax(-1) == 1).all()


@pytest.mark.parametrize("beta", [-300.0, -17.0, -0.4, 0.003, 2.0, 45.0])
def test_beta_is_found_again(beta):
    probs, remaining = random_candidates()
    g = length_share(remaining, GAMMA)
    target = mean_g(Tilt(beta)(probs, remaining, torch.zeros(64), GAMMA), remaining)[:, None]
    settled = Tilt(find_beta(probs, g, target).squeeze(1))(probs, remaining, torch.zeros(64), GAMMA)
    torch.testing.assert_close(mean_g(settled, remaining)[:, None], target, atol=2e-5, rtol=0)


def test_penalty_by_hand():
    probs, remaining = tensor([0.5, 0.3, 0.2]), tensor([0.0, 12.0, 50.0])
    costs = [(15 - 0) / 16, (15 - 12) / 16, (3 + 0.03 * 32) / 16]  # 16 tokens are left, so 15 should follow this one
    weights = [p * math.exp(-7 * cost) for p, cost in zip((0.5, 0.3, 0.2), costs, strict=True)]
    moved = EqualTo(20, strength=7.0)(probs, remaining, tensor(4), GAMMA)[0]
    assert moved.tolist() == pytest.approx([weight / sum(weights) for weight in weights])
    costs = [(3 - 0) / 8, 0.0, (3 + 0.03 * 32) / 16]  # of 4 to 16 tokens; near the bound a miss counts as a share of 8
    weights = [p * math.exp(-7 * cost) for p, cost in zip((0.5, 0.3, 0.2), costs, strict=True)]
    moved = AtMost(20, low=0.4, high=1.0, strength=7.0)(probs, remaining, tensor(4), GAMMA)[0]
    assert moved.tolist() == pytest.approx([weight / sum(weights) for weight in weights])


def test_a_little_too_early_costs_nothing_far_from_the_end():
    probs, remaining = tensor([0.5, 0.5]), tensor([82.0, 99.0])
    early = EqualTo(101, strength=50.0)(probs, remaining, tensor(0), GAMMA)[0]
    weights = [math.exp(-50.0 * (83 - 82) / 101), 1.0]  # of 100 tokens to come, 83 = 100 - (100 / 4 - 8) are due
    assert early.tolist() == pytest.approx([weight / sum(weights) for weight in weights])


def ends_at(control, generated, share=0.5):
    """The probability of an end that is offered with this share, beside candidates of 9 and of 400 tokens."""
    probs, remaining = tensor([share, (1 - share) / 2, (1 - share) / 2]), tensor([0.0, 9.0, 400.0])
    return control(probs, remaining, tensor(generated), GAMMA)[0, 0].item()


def test_penalty_ends_with_the_last_token_of_the_target():
    assert [round(ends_at(EqualTo(50), t), 2) for t in (0, 30, 40, 48, 49, 60)] == [0, 0, 0, 1, 1, 1]
    assert [round(ends_at(AtMost(100), t), 2) for t in (0, 40, 60, 68, 90, 100)] == [0, 0, 0, 0, 1, 1]
    assert [round(ends_at(AtLeast(100), t), 2) for t in (0, 60, 90)] == [0, 0, 0]
    assert [round(ends_at(AtLeast(100), t), 2) for t in (129, 140)] == [1, 1]
    assert ends_at(AtLeast(100), 99) == pytest.approx(2 / 3, abs=0.01)  # 400 more would be too many, 9 would not
    assert ends_at(AtLeast(100, high=math.inf), 500) == pytest.approx(0.5)


def test_penalty_leaves_the_base_model_alone_where_it_is_on_its_way():
    probs, remaining = tensor([0.2, 0.5, 0.3]), tensor([71.0, 75.0, 80.0])
    here = tensor(0)
    torch.testing.assert_close(AtMost(100)(probs, remaining, here, GAMMA), probs)
    torch.testing.assert_close(AtLeast(65)(probs, remaining, here, GAMMA), probs)
    shorter, longer = AtMost(70)(probs, remaining, here, GAMMA), AtLeast(100)(probs, remaining, here, GAMMA)
    assert mean_g(shorter, remaining) < mean_g(probs, remaining) < mean_g(longer, remaining)


@pytest.mark.parametrize(
    ("kind", "scale", "expected"),
    [
        ("mul", 0.5, lambda m, low, high: 0.5 * m),
        ("linear", -0.5, lambda m, low, high: m - 0.5 * (m - low)),
        ("linear", 0.25, lambda m, low, high: m + 0.25 * (high - m)),
        ("length_mul", 0.5, lambda m, low, high: 1 - (1 - m) ** 0.5),
    ],
)
def test_scaled_expectation_by_hand(kind, scale, expected):
    probs, remaining = tensor([0.25, 0.5, 0.25]), tensor([10.0, 60.0, 200.0])
    g = length_share(remaining, GAMMA)[0].tolist()
    mean = sum(p * x for p, x in zip((0.25, 0.5, 0.25), g, strict=True))
    moved = Scale(scale, kind)(probs, remaining, tensor(0), GAMMA)
    wanted = min(max(expected(mean, g[0], g[-1]), g[0]), g[-1])
    assert mean_g(moved, remaining).item() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("control", [Scale(1.0, "mul"), Scale(0.0, "linear"), Scale(1.0, "length_mul")])
def test_a_scale_that_asks_for_nothing_changes_nothing(control):
    probs, remaining = random_candidates()
    torch.testing.assert_close(control(probs, remaining, torch.zeros(64), GAMMA), probs, atol=1e-4, rtol=0)


def test_gates_leave_rows_to_the_base_model():
    probs, remaining = tensor([0.999, 0.001], [0.5, 0.5], [0.5, 0.5]), tensor([80, 90], [80, 90], [1, 2])
    control = Gated(Tilt(-10), min_g=0.1, min_entropy=0.3)
    gated, tilted = (c(probs, remaining, torch.zeros(3), GAMMA) for c in (control, Tilt(-10)))
    assert torch.equal(gated[0], probs[0])  # nothing to decide
    assert torch.equal(gated[1], tilted[1])
    assert torch.equal(gated[2], probs[2])  # almost over


def test_a_gate_keeps_no_text_from_ending_where_it_must():
    # Hardly anything to decide, and token 64 of at most 64: the end is taken, however unlikely.
    probs, remaining = tensor([0.999, 0.001], [0.999, 0.001]), tensor([80, 0], [80, 0])
    gated = Gated(AtMost(64), min_entropy=0.3)(probs, remaining, torch.tensor([62, 63]), GAMMA)
    assert gated.tolist() == [[0.999, 0.001], [0.0, 1.0]]


def test_all_are_distributions_over_the_candidates():
    probs, remaining = random_candidates()
    remaining[::2, 0] = 0
    for control in (Tilt(-30), Tilt(1e4), EqualTo(40), EqualTo(4, mode="soft"), EqualTo(400), Scale(3.0, "mul")):
        result = control(probs, remaining, torch.full((64,), 2), GAMMA)
        torch.testing.assert_close(result.sum(-1), torch.ones(64, dtype=torch.float64))
        assert (result[probs == 0] == 0).all()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: EqualTo(0), "n must be a whole number of at least 1 token, the end included; got 0"),
        (lambda: AtMost(2.5, mode="hard"), "n must be a whole number"),
        (lambda: AtLeast(True, mode="hard"), "n must be a whole number"),
        (lambda: EqualTo(5, mode="fuzzy"), "mode must be one of penalty, hard, soft; got 'fuzzy'"),
        (lambda: AtMost(5, low=0.9, high=0.5), "low and high must be shares of n with 0 <= low <= high <= 1"),
        (lambda: AtLeast(5, low=0.9), "low and high must be shares of n with 1 <= low <= high <= inf"),
        (lambda: Tilt(math.nan), "beta must be finite"),
        (lambda: Gated(None), "control must be a control, such as EqualTo"),
        (lambda: Gated(EqualTo), "control must be a control, such as EqualTo"),
        (lambda: Scale(2.0, "linear"), r"scale of kind 'linear' must lie in \[-1, 1\]; got 2.0"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


# -- the end ----------------------------------------------------------------------------------------------------------


def ends_between(control, generated=None):
    """The first token that may be the last, and the first that must be, of those that are looked at."""
    generated = torch.arange(400) if generated is None else generated
    early, due = control.ends(generated)
    first = int((~early).long().argmax()) + 1
    return first, int(due.long().argmax()) + 1 if due.any() else None


def test_when_a_text_may_end_and_when_it_must():
    assert ends_between(EqualTo(100)) == (90, 105)
    assert ends_between(EqualTo(32)) == (29, 33)
    assert ends_between(EqualTo(1)) == (1, 1)
    assert ends_between(AtMost(100)) == (1, 100)
    assert ends_between(AtLeast(100)) == (100, 136)  # 105% of 130
    assert ends_between(AtLeast(100, high=math.inf)) == (100, None)
    assert ends_between(Gated(EqualTo(100), min_g=0.5)) == (90, 105)
    for control in (EqualTo(100, mode="hard"), EqualTo(100, mode="soft"), AtMost(100, "hard"), AtLeast(100, "hard")):
        assert ends_between(control) == (1, None)
    assert ends_between(Gated(Tilt(-5))) == (1, None)


def test_where_the_end_is_due_nothing_else_is_left():
    probs, remaining = tensor([0.6, 0.4 - 1e-9, 1e-9]), tensor([300.0, 2.0, 0.0])
    assert EqualTo(100)(probs, remaining, tensor(104), GAMMA)[0].tolist() == [0.0, 0.0, 1.0]
    assert AtMost(100)(probs, remaining, tensor(99), GAMMA)[0].tolist() == [0.0, 0.0, 1.0]
    assert AtLeast(100)(probs, remaining, tensor(135), GAMMA)[0].tolist() == [0.0, 0.0, 1.0]
    unended = tensor([0.6, 0.4, 0.0])  # the end is not offered
    assert EqualTo(100)(unended, remaining, tensor(104), GAMMA)[0].sum() == pytest.approx(1.0)


def test_a_control_of_a_segment_is_that_of_a_whole_text_that_ends_there():
    """The maths know nothing of texts: only that there is one, and which."""
    probs = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    remaining, generated = torch.tensor([[0.0, 4.0, 30.0]], dtype=torch.float64), torch.tensor([5])
    for whole, segment in (
        (AtMost(12, low=0), AtMost(12, until="</think>")),
        (EqualTo(12), EqualTo(12, until="</think>")),
    ):
        assert torch.equal(whole(probs, remaining, generated, 0.99), segment(probs, remaining, generated, 0.99))
        assert whole.ends(generated) == segment.ends(generated)
        assert until_of(Gated(segment)) == "</think>"
        assert until_of(whole) is None
        assert "until" not in repr(whole)
        assert "until='</think>'" in repr(segment)
    assert (AtMost(12).low, AtMost(12, until="</think>").low) == (0.7, 0.0)
    with pytest.raises(ValueError, match="until must be a text"):
        AtMost(12, until="")
