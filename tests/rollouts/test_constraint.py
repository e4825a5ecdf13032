import math

import pytest

from lenvm_lightning.rollouts.constraint import length_deviation, length_score


def test_deviation_by_hand():
    assert length_deviation(96, 64) == 0.5
    assert length_deviation(48, 64) == -0.25
    with pytest.raises(ValueError, match="at least 1 token"):
        length_deviation(5, 0)


@pytest.mark.parametrize(("n", "constraint", "score"), [
    (64, "equal to", 100), (64, "at most", 100), (64, "at least", 100),
    (96, "equal to", 100 * math.exp(-1)), (48, "equal to", 100 * math.exp(-1.25)),
    (96, "at most", 100 * math.exp(-1)), (48, "at most", 100),
    (96, "at least", 100), (48, "at least", 100 * math.exp(-1.25)),
])  # fmt: skip
def test_score_by_hand(n, constraint, score):
    assert length_score(n, 64, constraint) == pytest.approx(score)


def test_unknown_constraint():
    with pytest.raises(ValueError, match="at most"):
        length_score(5, 5, "about")
