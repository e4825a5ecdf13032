"""Errors in tokens, each beside the best constant predictor, as pure functions of sums and counts.

Here is what is summed, and what is made of the sums; `training/metrics.py` keeps them across batches and ranks.

Positions: `start` is the prompt boundary s_0, `25`, `50`, `75` are those percent of the completion, `all` is every
state. Truncated completions have no known length and are left out.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .values import remaining_to_value, value_to_remaining

POSITIONS = ("all", "start", "25", "50", "75")
POSITION_NAMES = {"all": "all positions", "start": "prompt boundary", "25": "25% written", "50": "50% written",
                  "75": "75% written"}  # fmt: skip
_SHARES = (0.0, 0.25, 0.50, 0.75)  # of the completion, at all positions but the first


class ErrorSums(NamedTuple):
    """What a batch adds to the errors; P = 5 positions, N = its rows with a known length.

    Attributes:
        absolute: sum of absolute errors in tokens. Shape (P,), float64.
        relative: sum of relative errors where tokens remain. Shape (P,), float64.
        states: number of states. Shape (P,), int64.
        positive: number of states where tokens remain. Shape (P,), int64.
        lengths: tokens of each completion. Shape (N,), int64.
        kept: tokens of each completion that are in the batch. Shape (N,), int64.
    """

    absolute: Tensor
    relative: Tensor
    states: Tensor
    positive: Tensor
    lengths: Tensor
    kept: Tensor


# -- what is summed ---------------------------------------------------------------------------------------------------


def error_sums(predicted: Tensor, remaining: Tensor, mask: Tensor, censored: Tensor) -> ErrorSums:
    """Errors of a batch, summed by position.

    Args:
        predicted: predicted remaining tokens. Shape (B, T).
        remaining: true remaining tokens. Shape (B, T).
        mask: True = state with a count. Shape (B, T).
        censored: True = row without a known length. Shape (B,).
    """
    mask = mask & ~censored[:, None]
    error = (predicted.double() - remaining).abs()
    length = torch.where(mask, remaining, -1).amax(dim=1)  # (B,), -1 in censored rows
    absolute, relative, states, positive = [], [], [], []
    for where in (mask, *_states_at(length, remaining, mask)):
        ahead = where & (remaining > 0)
        absolute.append(error[where].sum())
        relative.append((error[ahead] / remaining[ahead]).sum())
        states.append(where.sum())
        positive.append(ahead.sum())
    rows = length >= 0
    kept = mask.sum(dim=1)[rows] - 1  # the state s_0 comes before the first token
    return ErrorSums(
        absolute=torch.stack(absolute),
        relative=torch.stack(relative),
        states=torch.stack(states),
        positive=torch.stack(positive),
        lengths=length[rows],
        kept=kept,
    )


def tokens_at(length: Tensor, share: float) -> Tensor:
    """Tokens generated when `share` of a completion of `length` tokens is written, rounded down."""
    return torch.floor(length * share).to(length.dtype)


def _states_at(length: Tensor, remaining: Tensor, mask: Tensor) -> list[Tensor]:
    """For each share, the mask (B, T) of the one state of each row that sits there."""
    return [mask & (remaining == (length - tokens_at(length, share))[:, None]) for share in _SHARES]


def boundary_rows(predicted: Tensor, remaining: Tensor, mask: Tensor, censored: Tensor, gamma: float) -> Tensor:
    """What each row adds to the sums of its prompt: 1, `1 - gamma ** L`, the length predicted at s_0, censored or not.

    Args:
        predicted: predicted remaining tokens. Shape (B, T).
        remaining: true remaining tokens. Shape (B, T).
        mask: True = state with a count. Shape (B, T).
        censored: True = row without a known length. Shape (B,).
        gamma: discount, in (0, 1).

    Returns:
        Shape (B, 4), float64.
    """
    length = torch.where(mask, remaining, -1).amax(dim=1)  # (B,)
    boundary = mask & (remaining == length[:, None])
    at_start = torch.where(boundary, predicted.double(), 0.0).sum(dim=1)
    g = -remaining_to_value(length.double(), gamma)
    return torch.stack([torch.ones_like(g), g, at_start, censored.double()], dim=1)


# -- what is made of the sums -----------------------------------------------------------------------------------------


def errors_by_position(sums: ErrorSums) -> dict[str, Tensor]:
    """`mae_tokens/P`, `relative_error/P` and the same with `_constant` for each position P that was met.

    The constant of a position is the one that would have done best on these very completions: no predictor that
    ignores the text can beat it. Relative errors skip the EOS state, where nothing remains.
    """
    out: dict[str, Tensor] = {}
    for i, name in enumerate(POSITIONS):
        if sums.states[i] == 0:
            continue
        out[f"mae_tokens/{name}"] = sums.absolute[i] / sums.states[i]
        out[f"relative_error/{name}"] = sums.relative[i] / sums.positive[i].clamp(min=1)
        absolute, relative = _best_constant(*_true_remaining(sums.lengths, sums.kept, i))
        out[f"mae_tokens_constant/{name}"] = absolute
        out[f"relative_error_constant/{name}"] = relative
    return out


def _true_remaining(lengths: Tensor, kept: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """The true remaining tokens met at a position, and how often each."""
    if position > 0:
        passed = tokens_at(lengths, _SHARES[position - 1])
        values, count = torch.unique((lengths - passed)[passed <= kept], return_counts=True)
        return values.double(), count.double()
    # A completion of length L of which k tokens were kept has the states L, L - 1, …, L - k, once each.
    steps = torch.zeros(int(lengths.max()) + 2, dtype=torch.float64, device=lengths.device)
    ones = torch.ones_like(lengths, dtype=torch.float64)
    steps.index_add_(0, lengths - kept, ones)
    steps.index_add_(0, lengths + 1, -ones)
    return torch.arange(len(steps), dtype=torch.float64, device=steps.device), steps.cumsum(0)


def _best_constant(x: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Least mean |x - c|, and least mean |x - c| / x over x > 0, of any constant c; x occurs `count` times."""
    total = count.sum()
    absolute = (count * (x - weighted_median(x, count)).abs()).sum() / total
    positive = x > 0
    x, count = x[positive], count[positive]
    relative = (count * (x - weighted_median(x, count / x)).abs() / x).sum() / count.sum()
    return absolute, relative


def weighted_median(x: Tensor, weight: Tensor) -> Tensor:
    """The smallest entry with at least half of the weight at or below it: it minimises `sum(weight * |x - c|)`."""
    order = torch.argsort(x)
    cumulated = torch.cumsum(weight[order], dim=0)
    return x[order][torch.searchsorted(cumulated, 0.5 * cumulated[-1])]


def boundary_lengths(sums: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """True and predicted length of every prompt, before anything of its completions is written.

    Per prompt with completions of lengths L_i: `mu = mean(1 - gamma ** L_i)`, `L_GT = ln(1 - mu) / ln gamma`; L_hat
    is the mean of what was predicted at s_0.

    Args:
        sums: of the rows of each of K prompts, as `boundary_rows` gives them. Shape (K, 4).
        gamma: discount, in (0, 1).

    Returns:
        `L_GT` and `L_hat` in tokens. Shape (K,) each, float64.
    """
    return value_to_remaining(-sums[:, 1] / sums[:, 0], gamma), sums[:, 2] / sums[:, 0]


def boundary_errors(truth: Tensor, predicted: Tensor) -> dict[str, Tensor]:
    """`mre`, the mean relative error, and `mre_constant`, the least that one length for all prompts can reach.

    Args:
        truth: length of each prompt, > 0. Shape (K,).
        predicted: predicted length of each prompt. Shape (K,).

    Returns:
        Nothing where there is no prompt.
    """
    if len(truth) == 0:
        return {}
    constant = weighted_median(truth, 1.0 / truth)
    return {
        "mre": ((predicted - truth).abs() / truth).mean(),
        "mre_constant": ((constant - truth).abs() / truth).mean(),
    }
