"""Means with their errors, rank correlation, and Pass@1 against length beside a hard budget.

Questions, or whatever else is drawn independently of each other, are the unit everywhere.

The hard budget B is what truncation would make of unguided completions: one longer than B is wrong, and its length is
min(L, B). A guided system is compared with it at the guided mean length (Zhang et al., budget trade-off).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def mean_and_error(values_by_question: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """Return the mean over questions of their means, and its standard error.

    Questions weigh equally, however many values they have. The error is the standard deviation of their means (of a
    sample: n - 1) over the root of their number; nan for one question, which says nothing about others.

    Raises:
        ValueError: no questions, or some without values.
    """
    if not values_by_question:
        raise ValueError("there are no questions to take a mean of")
    empty = [question for question, values in values_by_question.items() if len(values) == 0]
    if empty:
        raise ValueError(f"{len(empty)} questions have no values: {', '.join(empty[:5])}")
    means = np.array([np.mean(values) for values in values_by_question.values()])
    error = means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return float(means.mean()), float(error)


def ratio_and_error(sums: ArrayLike, counts: ArrayLike) -> tuple[float, float | None]:
    """Mean over all members of groups, and its standard error with groups as the unit.

    Members of a group are not independent of each other, groups are. The error is that of a ratio estimate,
    ``sqrt(K / (K - 1) * sum((s_k - m n_k) ** 2)) / sum(n_k)`` with ``m = sum(s_k) / sum(n_k)``; with groups of one
    size it is the standard deviation of the group means over ``sqrt(K)``.

    Args:
        sums: of the members of each group. Shape (K,).
        counts: members of each group, > 0. Shape (K,).

    Returns:
        The mean, and its error; None with a single group.
    """
    s, n = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    mean = s.sum() / n.sum()
    if len(s) < 2:
        return float(mean), None
    spread = np.square(s - mean * n).sum() * len(s) / (len(s) - 1)
    return float(mean), float(np.sqrt(spread) / n.sum())


def ranks(x: ArrayLike) -> NDArray[np.float64]:
    """Rank of each number from 1; equal ones share the mean of their ranks. Shape (K,)."""
    _, which, counts = np.unique(np.asarray(x), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which]


def spearman(x: ArrayLike, y: ArrayLike) -> float | None:
    """Rank correlation, in [-1, 1]; None where one of the two does not vary."""
    a, b = ranks(x), ranks(y)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


@dataclass(frozen=True)
class Completions:
    """What a system wrote, one entry a completion.

    Attributes:
        tokens: lengths, EOS counted. Shape (N,).
        right: True = the answer is right. Shape (N,).
        question: which question each answers: names or numbers. Shape (N,).

    Raises:
        ValueError: shapes that differ, no completions, or lengths that are none.
    """

    tokens: Ints
    right: NDArray[np.bool_]
    question: NDArray

    def __post_init__(self) -> None:
        for name in ("tokens", "right", "question"):
            object.__setattr__(self, name, np.asarray(getattr(self, name)))
        shapes = {name: getattr(self, name).shape for name in ("tokens", "right", "question")}
        if len(set(shapes.values())) > 1 or self.tokens.ndim != 1:
            raise ValueError(f"tokens, right and question need one entry a completion each, got shapes {shapes}")
        if not self.tokens.size:
            raise ValueError("there are no completions")
        if not np.issubdtype(self.tokens.dtype, np.integer) or self.tokens.min() < 0:
            raise ValueError(f"tokens must be whole numbers of at least 0, got {self.tokens.dtype} values")
        if self.right.dtype != np.bool_:
            # An unjudged answer (None) would silently count as wrong.
            raise ValueError(f"right must be True or False for each completion, got {self.right.dtype} values")


@dataclass(frozen=True)
class Frontier:
    """The hard budget: entry B is a budget of B tokens, from 0 to the longest completion.

    Attributes:
        lengths: mean of min(L, B), in tokens; rises with B. Shape (B,).
        passes: share of answers that are right and no longer than B; rises with B. Shape (B,).
    """

    lengths: Floats
    passes: Floats


@dataclass(frozen=True)
class Gap:
    """Pass@1 of a guided system minus that of a hard budget of the same mean length, as shares of 1.

    Attributes:
        gap: of all questions.
        low: lower end of its 95% bootstrap interval; nan for one question.
        high: upper end.
    """

    gap: float
    low: float
    high: float


def hard_budget(tokens: ArrayLike, right: ArrayLike, question: ArrayLike | None = None) -> Frontier:
    """Return what every budget makes of completions.

    Args:
        tokens: lengths, EOS counted. Shape (N,).
        right: True = the answer is right. Shape (N,).
        question: which question each answers, so that questions weigh equally; None: completions do. Shape (N,).

    Raises:
        ValueError: see `Completions`.
    """
    group = np.arange(np.size(tokens)) if question is None else np.asarray(question)
    completions = Completions(np.asarray(tokens), np.asarray(right), group)
    _, numbers = np.unique(completions.question, return_inverse=True)
    sizes = np.bincount(numbers)
    weights = 1 / (len(sizes) * sizes[numbers])
    return _frontier(completions.tokens, completions.right, weights)


def _frontier(tokens: Ints, right: NDArray[np.bool_], weights: Floats) -> Frontier:
    """The hard budget of weighted completions; weights sum to 1."""
    size = int(tokens.max()) + 1
    ending = np.bincount(tokens, weights, size)  # what ends with L tokens
    # E min(L, B) = sum over b = 1..B of P(L >= b). Summed from the far end, so that nothing beyond the longest is left.
    reaching = ending[::-1].cumsum()[::-1]
    lengths = np.concatenate([[0.0], reaching[1:].cumsum()])
    return Frontier(lengths, np.bincount(tokens, weights * right, size).cumsum())


def at_length(frontier: Frontier, length: float) -> float:
    """Return Pass@1 at a mean length, between two budgets on the straight line (a mixture of both).

    Beyond the ends it is that of the end: a mean length above the one of whole completions, which no budget
    reaches, gives their Pass@1.
    """
    return float(np.interp(length, frontier.lengths, frontier.passes))


def gap_at_equal_length(base: Completions, guided: Completions, resamples: int = 1000, seed: int = 0) -> Gap:
    """Compare a guided system with the hard budget of the base model at the guided mean length.

    The interval is a percentile bootstrap over questions. Each resample draws questions, the same for both systems,
    and takes the frontier, the guided mean length and the gap anew. Drawn questions are weights of completions, so a
    resample is two histograms of lengths and their cumulative sums; nothing is copied or sorted.

    Args:
        base: unguided completions.
        guided: of the same questions; how many completions each has may differ.
        resamples: of the bootstrap, at least 1.
        seed: of the bootstrap.

    Raises:
        ValueError: the systems answer different questions, or there are no resamples.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    names, numbers = np.unique(base.question, return_inverse=True)
    others, guided_numbers = np.unique(guided.question, return_inverse=True)
    if not np.array_equal(names, others):
        raise ValueError(
            f"both systems must answer the same questions: {len(np.setdiff1d(names, others))} of {len(names)} are only "
            f"in base, {len(np.setdiff1d(others, names))} of {len(others)} only in guided"
        )
    count = len(names)
    share = 1 / np.bincount(numbers)[numbers]  # of a completion in its question
    sizes = np.bincount(guided_numbers)
    lengths = np.bincount(guided_numbers, guided.tokens) / sizes
    passes = np.bincount(guided_numbers, guided.right) / sizes

    def gap(drawn: Floats) -> float:
        """The gap where question i has the weight ``drawn[i]``; weights sum to 1."""
        frontier = _frontier(base.tokens, base.right, drawn[numbers] * share)
        return float(drawn @ passes) - at_length(frontier, float(drawn @ lengths))

    whole = gap(np.full(count, 1 / count))
    if count == 1:
        return Gap(whole, math.nan, math.nan)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples) / count
    low, high = np.percentile([gap(drawn) for drawn in draws], [2.5, 97.5])
    return Gap(whole, float(low), float(high))
