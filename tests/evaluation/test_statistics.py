"""Means, the hard budget, and the gap beside it: by hand, and against slow loops."""

import math
import time

import numpy as np
import pytest

from lenvm_lightning.evaluation.statistics import (
    Completions,
    Frontier,
    Gap,
    at_length,
    gap_at_equal_length,
    hard_budget,
    mean_and_error,
)


def test_mean_and_error_by_hand():
    # Means of questions 2, 4 and 9: mean 5, deviations -3, -1, 4, variance 26 / 2.
    mean, error = mean_and_error({"a": [1, 3], "b": [4], "c": [9, 9, 9]})
    assert mean == pytest.approx(5)
    assert error == pytest.approx(math.sqrt(13 / 3))
    mean, error = mean_and_error({"a": [1, 2]})
    assert mean == 1.5
    assert math.isnan(error)


def test_mean_of_nothing():
    with pytest.raises(ValueError, match="no questions"):
        mean_and_error({})
    with pytest.raises(ValueError, match="1 questions have no values: b"):
        mean_and_error({"a": [1], "b": []})


def test_hard_budget_by_hand():
    frontier = hard_budget([1, 3, 3, 5], [True, True, False, True])
    # Lengths min(L, B): 0; 1 1 1 1; 1 2 2 2; 1 3 3 3; 1 3 3 4; 1 3 3 5.
    assert frontier.lengths == pytest.approx([0, 1, 7 / 4, 10 / 4, 11 / 4, 12 / 4])
    assert frontier.passes == pytest.approx([0, 1 / 4, 1 / 4, 2 / 4, 2 / 4, 3 / 4])


def test_questions_weigh_equally():
    # "a" has three completions of 2 tokens, all wrong, "b" a right one of 1 token.
    frontier = hard_budget([2, 2, 1, 2], [False, False, True, False], ["a", "a", "b", "a"])
    assert frontier.lengths == pytest.approx([0, 1, 1.5])
    assert frontier.passes == pytest.approx([0, 0.5, 0.5])


def test_pass_at_a_length_by_hand():
    frontier = Frontier(np.array([0.0, 1.0, 3.0]), np.array([0.0, 0.2, 0.6]))
    lengths = (0.5, 1, 2, 3, 99, -1)
    assert [at_length(frontier, n) for n in lengths] == pytest.approx([0.1, 0.2, 0.4, 0.6, 0.6, 0])


@pytest.mark.parametrize(("tokens", "right", "message"), [
    ([], [], "no completions"), ([1, 2], [True], "one entry a completion"), ([1.5], [True], "whole numbers"),
    ([-1], [True], "at least 0"), ([1, 2], [True, None], "True or False"),
])  # fmt: skip
def test_completions_that_are_none(tokens, right, message):
    with pytest.raises(ValueError, match=message):
        hard_budget(tokens, right)


def draw(rng, questions=7, longest=12):
    """Completions of both systems, more of some questions than of others."""
    systems = []
    for _ in range(2):
        question = np.concatenate([np.arange(questions), rng.integers(0, questions, 30)])
        rng.shuffle(question)
        tokens = rng.integers(1, longest, question.size)
        systems.append(Completions(tokens, rng.random(question.size) < 0.6, question))
    return systems


def slow_means(completions, drawn, value):
    """Mean over drawn questions of the means of their completions."""
    means = []
    for question in drawn:
        rows = [i for i in range(len(completions.tokens)) if completions.question[i] == question]
        means.append(sum(value(completions.tokens[i], completions.right[i]) for i in rows) / len(rows))
    return sum(means) / len(means)


def slow_frontier(base, drawn):
    budgets = range(max(base.tokens) + 1)
    lengths = [slow_means(base, drawn, lambda n, right, b=b: min(n, b)) for b in budgets]
    passes = [slow_means(base, drawn, lambda n, right, b=b: right and n <= b) for b in budgets]
    return lengths, passes


def slow_gap(base, guided, drawn):
    lengths, passes = slow_frontier(base, drawn)
    at = slow_means(guided, drawn, lambda n, right: n)
    budget = passes[-1]
    for b in range(len(lengths) - 1):
        if lengths[b] <= at < lengths[b + 1]:
            part = (at - lengths[b]) / (lengths[b + 1] - lengths[b])
            budget = passes[b] + part * (passes[b + 1] - passes[b])
    return slow_means(guided, drawn, lambda n, right: right) - budget


def test_fast_is_slow():
    rng = np.random.default_rng(0)
    for _ in range(10):
        base, guided = draw(rng)
        frontier = hard_budget(base.tokens, base.right, base.question)
        lengths, passes = slow_frontier(base, range(7))
        np.testing.assert_allclose(frontier.lengths, lengths, atol=1e-12)
        np.testing.assert_allclose(frontier.passes, passes, atol=1e-12)
        assert gap_at_equal_length(base, guided, 1).gap == pytest.approx(slow_gap(base, guided, range(7)))


def test_interval_is_that_of_a_slow_bootstrap():
    base, guided = draw(np.random.default_rng(1), questions=5, longest=8)
    gap = gap_at_equal_length(base, guided, resamples=50, seed=3)
    counts = np.random.default_rng(3).multinomial(5, [0.2] * 5, 50)
    gaps = [slow_gap(base, guided, np.repeat(np.arange(5), row)) for row in counts]
    assert (gap.low, gap.high) == pytest.approx(tuple(np.percentile(gaps, [2.5, 97.5])))
    assert gap.low <= gap.gap <= gap.high
    assert gap == gap_at_equal_length(base, guided, resamples=50, seed=3)
    assert gap != gap_at_equal_length(base, guided, resamples=50, seed=4)


def test_gap_by_hand():
    # Base: right after 4 tokens, and after 2. Budgets 0..4 have lengths 0, 1, 2, 2.5, 3 and pass 0, 0, .5, .5, 1.
    base = Completions([4, 2], [True, True], ["a", "b"])
    # Guided: 2.5 tokens in the mean, all right: the hard budget passes half there.
    guided = Completions([3, 2], [True, True], ["a", "b"])
    gap = gap_at_equal_length(base, guided, 200)
    assert gap.gap == pytest.approx(0.5)
    # Draws are aa (3 tokens, where the budget passes none), bb (2, where it passes all), and ab.
    assert (gap.low, gap.high) == pytest.approx((0, 1))


def test_one_question_has_no_interval():
    one = Completions([4], [True], ["a"])
    assert repr(gap_at_equal_length(one, one)) == repr(Gap(0.0, math.nan, math.nan))


def test_same_questions_or_none():
    some, others = Completions([4, 4], [True, True], ["a", "b"]), Completions([4, 4], [True, True], ["a", "c"])
    with pytest.raises(ValueError, match="1 of 2 are only in base, 1 of 2 only in guided"):
        gap_at_equal_length(some, others)
    with pytest.raises(ValueError, match="at least 1"):
        gap_at_equal_length(some, some, resamples=0)


def test_many_completions_are_quick():
    """Bounds far above what is needed (some ms and 1 s); a loop over budgets x completions would take minutes."""
    rng = np.random.default_rng(0)
    question = np.repeat(np.arange(1600), 64)
    tokens = rng.integers(1, 32_000, question.size)
    right = rng.random(question.size) < 0.5
    start = time.perf_counter()
    frontier = hard_budget(tokens, right, question)
    assert time.perf_counter() - start < 1
    assert frontier.lengths[-1] == pytest.approx(tokens.mean())
    few = question < 500
    system = Completions(tokens[few], right[few], question[few])
    start = time.perf_counter()
    gap_at_equal_length(system, system, resamples=100)
    assert time.perf_counter() - start < 5
