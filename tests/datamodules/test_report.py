"""Shares of padding and the like, by hand."""

import pytest
from rollout_rows import row_facts

from datamodules.report import (
    BatchFacts,
    collect_facts,
    completions_meeting,
    describe_facts,
    padding_share,
    shared_share,
)


def test_what_sharing_leaves_by_hand():
    assert shared_share([6, 8, 5, 6], [4, 4, 3, 4], [0, 0, 1, 0], [[0, 1, 2], [3]]) == (25 - 4) / 25


def test_completions_meeting_by_hand():
    assert completions_meeting([0, 0, 0, 1], [[0, 1, 3], [2]]) == (2 + 2 + 1 + 1) / 4
    assert completions_meeting([], []) == 0.0


def test_padding_share_by_hand():
    assert padding_share([4, 2, 3], [[0, 1], [2]]) == pytest.approx(2 / 11)
    assert padding_share([], []) == 0.0


def described(truncated):
    """What is said of 100 completions of 10 to 109 tokens, and some truncated at 200."""
    rows = row_facts([*range(10, 110), *[200] * truncated], censored=lambda length: length == 200)
    return describe_facts(collect_facts(rows), BatchFacts(count=3, padding=0.1), held_out=5, held_out_prompts=1)


def test_a_gamma_that_truncation_makes_too_small_is_said_to_be():
    text = described(truncated=0)
    assert "gamma suggested 0.9" in text
    assert "≥" not in text
    text = described(truncated=1)  # under 1%: the percentile is known, the longest is not
    assert "99th percentile 109, longest ≥ 200" in text
    assert "at least" not in text
    text = described(truncated=50)
    assert "median 84 tokens, 99th percentile ≥ 200, longest ≥ 200" in text
    assert "gamma suggested at least 0.97724" in text
    assert "`gamma: auto` may be too small" in text
    assert "median ≥ 200 tokens" in described(truncated=150)
