"""Truncated completions: what to learn from rows that hit their token limit, right-censored data to a statistician.

Their remaining length is only known to be greater than what was seen. `treat_censored` turns the counts of a batch
into regression targets' remaining lengths and the mask of the states that are supervised. The *cut* of a truncated
completion is the state after its last token.

Nothing that was sampled tells how it goes on after the cut, so every estimate of it is an assumption. That of
`bootstrap` is the model itself: a state at the cut is like states seen earlier in other completions. But an error
there is also the target of the states before it, and comes back from them almost whole. `anchored` halves what
comes back: it takes the mean of that estimate and of one that no prediction enters, a hazard that stays what it was.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from .returns import remaining_after_cut
from .values import remaining_to_value, value_to_remaining

CensoredKind = Literal["anchored", "bootstrap", "drop", "one_sided", "as_finished"]


class Supervision(NamedTuple):
    """What the loss sees.

    Attributes:
        remaining: tokens to come to regress on, float where bootstrapped. Shape (B, T).
        mask: True = state that counts. Shape (B, T).
        lower_bound: True = only a prediction that is too short is an error. Shape (B, T).
    """

    remaining: Tensor
    mask: Tensor
    lower_bound: Tensor


def tail_after_cut(lengths: Sequence[int], censored: Sequence[bool]) -> float | None:
    """Mean tokens after the cut if completions went on ending as often as they did shortly before it.

    The hazard, ends a token, is that of the second half of what a truncated completion shows: of the positions above
    c/2 and up to c, with c the median length of the truncated ones. Each row counts for as long as it is seen there.

    Args:
        lengths: tokens of each completion, EOS included; of a truncated one, those that were seen.
        censored: True = the completion was truncated.

    Returns:
        Tokens, >= 1; None where none was truncated, or none ended there and nothing can be said.
    """
    seen, truncated = np.asarray(lengths), np.asarray(censored, dtype=bool)
    if not truncated.any():
        return None
    end = float(np.median(seen[truncated]))
    start = end // 2
    tokens = (np.minimum(seen, end) - start).clip(min=0).sum()
    ends = (~truncated & (seen > start) & (seen <= end)).sum()
    return float(tokens / ends) if ends else None


def anchor(predicted: Tensor, tail: float | None, gamma: float) -> Tensor:
    """Halfway, in value, between the model's own estimate and the mean value under a constant hazard.

    A length L that is geometric with mean m has `E[1 - gamma ** L] = (1 - gamma) m / ((1 - gamma) m + gamma)`.

    Args:
        predicted: remaining tokens, >= 0. Any shape.
        tail: m, from `tail_after_cut`; None keeps the model's own estimate.
        gamma: discount, in (0, 1).

    Returns:
        Remaining tokens, same shape.
    """
    if tail is None:
        return predicted
    tail_value = -(1.0 - gamma) * tail / ((1.0 - gamma) * tail + gamma)
    return value_to_remaining(0.5 * (remaining_to_value(predicted, gamma) + tail_value), gamma)


def treat_censored(
    remaining: Tensor, mask: Tensor, censored: Tensor, predicted: Tensor, kind: CensoredKind
) -> Supervision:
    """Targets and mask of a batch with truncated completions.

    Args:
        remaining: tokens to the end of what was seen. Shape (B, T).
        mask: True = state with a count. Shape (B, T).
        censored: True = truncated. Shape (B,).
        predicted: remaining tokens that are expected, of which only those at a cut are read: the model's own
            estimate, for `anchored` passed through `anchor`. Shape (B, T).
        kind: `anchored`, `bootstrap`: what was seen plus what is expected at the cut;
            `drop`: no supervision from such rows;
            `one_sided`: what was seen is a lower bound;
            `as_finished`: pretend that the cut was the end, as the research code does.

    Raises:
        ValueError: unknown kind.
    """
    nowhere = torch.zeros_like(mask)
    rows = censored[:, None] & mask
    if kind == "as_finished":
        return Supervision(remaining, mask, nowhere)
    if kind == "drop":
        return Supervision(remaining, mask & ~rows, nowhere)
    at_cut = rows & (remaining == 0)  # the last state seen: nothing is known about what follows it
    if kind == "one_sided":
        return Supervision(remaining, mask & ~at_cut, rows)
    if kind in ("anchored", "bootstrap"):
        beyond = torch.where(at_cut, predicted, 0.0).sum(dim=1)
        return Supervision(remaining_after_cut(remaining, beyond, censored), mask & ~at_cut, nowhere)
    raise ValueError(f"censored must be one of {', '.join(get_args(CensoredKind))}; got {kind!r}")
