"""Right-censored completions: what to learn from rows that hit their token limit.

Their remaining length is only known to be greater than what was seen. ``treat_censored`` turns the counts of a batch
into regression targets' remaining lengths and the mask of the states that are supervised.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .returns import remaining_after_cut

CensoredKind = Literal["bootstrap", "drop", "one_sided", "as_finished"]


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


def treat_censored(
    remaining: Tensor, mask: Tensor, censored: Tensor, predicted: Tensor, kind: CensoredKind
) -> Supervision:
    """Targets and mask of a batch with right-censored rows.

    Args:
        remaining: tokens to the end of what was seen. Shape (B, T).
        mask: True = state with a count. Shape (B, T).
        censored: True = the row hit its token limit. Shape (B,).
        predicted: remaining tokens the model itself predicts. Shape (B, T).
        kind: ``bootstrap``: what was seen plus the model's own estimate at the cut;
            ``drop``: no supervision from such rows;
            ``one_sided``: what was seen is a lower bound;
            ``as_finished``: pretend that the cut was the end, as the research code does.

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
    if kind == "bootstrap":
        beyond = torch.where(at_cut, predicted, 0.0).sum(dim=1)
        return Supervision(remaining_after_cut(remaining, beyond, censored), mask & ~at_cut, nowhere)
    raise ValueError(f"censored must be one of {', '.join(get_args(CensoredKind))}; got {kind!r}")
