"""Shares of padding and the like, by hand."""

import pytest

from datamodules.report import completions_meeting, padding_share, shared_share


def test_what_sharing_leaves_by_hand():
    assert shared_share([6, 8, 5, 6], [4, 4, 3, 4], [0, 0, 1, 0], [[0, 1, 2], [3]]) == (25 - 4) / 25


def test_completions_meeting_by_hand():
    assert completions_meeting([0, 0, 0, 1], [[0, 1, 3], [2]]) == (2 + 2 + 1 + 1) / 4
    assert completions_meeting([], []) == 0.0


def test_padding_share_by_hand():
    assert padding_share([4, 2, 3], [[0, 1], [2]]) == pytest.approx(2 / 11)
    assert padding_share([], []) == 0.0
