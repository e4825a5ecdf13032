"""How good predicted distributions are: pinball loss, CRPS, coverage and width of intervals, PIT, concordance.

Truncated completions count within the limit: both what remained and what was predicted are cut there, so that their
remaining length is known (the restricted measures of survival analysis). Where all completions have one limit this is
what inverse probability of censoring weights come to: nothing is censored before it, and all weights are 1.
"""

import torch
from torch import Tensor

from .length_distribution import LengthDistribution

_CRPS_LEVELS = 64


def pinball(predicted: Tensor, remaining: Tensor, level: Tensor | float) -> Tensor:
    """Loss of a predicted quantile, whose best is the true one: `level` a token too short, `1 - level` one too long."""
    error = remaining - predicted
    return torch.maximum(level * error, (level - 1.0) * error)


def crps(distribution: LengthDistribution, remaining: Tensor, left: Tensor | None = None) -> Tensor:
    """Continuous ranked probability score in tokens: for a certain prediction its absolute error.

    Twice the mean pinball loss over all levels, of which 64 are taken.

    Args:
        distribution: of shape (...).
        remaining: what remained, within the limit. Shape (...).
        left: tokens that the limit leaves; None = no limit. Shape (...).

    Returns:
        Shape (...).
    """
    total = torch.zeros_like(remaining, dtype=distribution.longer.dtype)
    for number in range(_CRPS_LEVELS):
        level = (number + 0.5) / _CRPS_LEVELS
        quantile = distribution.quantile(level)
        quantile = quantile if left is None else torch.minimum(quantile, left.to(quantile.dtype))
        total = total + pinball(quantile, remaining.to(quantile.dtype), level)
    return 2.0 * total / _CRPS_LEVELS


def covered(lower: Tensor, upper: Tensor, remaining: Tensor, left: Tensor | None = None) -> Tensor:
    """True = what remained lies in the interval; of truncated completions, with the interval cut at the limit.

    Args:
        lower: ends of the intervals. Shape (...).
        upper: the other ends, infinite where unknown. Shape (...).
        remaining: what remained, within the limit. Shape (...).
        left: tokens that the limit leaves; None = no limit. Shape (...).
    """
    if left is not None:
        lower, upper = torch.minimum(lower, left.to(lower.dtype)), torch.minimum(upper, left.to(upper.dtype))
    return (remaining >= lower) & (remaining <= upper)


def pit_histogram(score: Tensor, truncated: Tensor, bins: int = 10) -> Tensor:
    """Share of the probability integral transforms F(remaining) in each of some equal ranges: alike where F is right.

    A truncated completion counts evenly over all that it may be, from F(what was seen) to 1.

    Args:
        score: F(remaining). Shape (N,).
        truncated: True = the true one is above. Shape (N,).
        bins: how many ranges.

    Returns:
        Shape (bins,), adding up to 1.
    """
    edges = torch.linspace(0.0, 1.0, bins + 1, dtype=torch.float64, device=score.device)
    known = torch.bucketize(score[~truncated].double(), edges[1:-1], right=False)
    counts = torch.bincount(known, minlength=bins).double()
    low = score[truncated].double().clamp(max=1.0 - 1e-9)[:, None]
    overlap = (edges[1:] - torch.maximum(edges[:-1], low)).clamp(min=0.0)  # (C, bins)
    counts = counts + (overlap / (1.0 - low)).sum(0)
    return counts / counts.sum().clamp(min=1.0)


def concordance(predicted: Tensor, remaining: Tensor, truncated: Tensor) -> float | None:
    """Share of pairs whose predictions are in the order of their lengths (Harrell's C); half for equal predictions.

    A pair counts where it is known which is longer: the shorter one ended.

    Args:
        predicted: shape (N,).
        remaining: what remained, or was seen. Shape (N,).
        truncated: True = more followed. Shape (N,).

    Returns:
        In [0, 1], .5 for a constant; None where no pair counts.
    """
    right = torch.zeros((), dtype=torch.float64)
    pairs = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(predicted), 1024):  # a block of rows against all
        rows = slice(start, start + 1024)
        longer = remaining[None] > remaining[rows, None]
        longer |= (remaining[None] == remaining[rows, None]) & truncated[None]
        counts = longer & ~truncated[rows, None]
        above = (predicted[None] > predicted[rows, None]).double() + 0.5 * (predicted[None] == predicted[rows, None])
        right += (above * counts).sum()
        pairs += counts.sum()
    return float(right / pairs) if pairs else None
