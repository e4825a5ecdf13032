"""Rewards of whole completions for their length, as others give them: what a critic of tokens is measured beside.

Every token of a completion gets the same. Lengths are tokens, the end included.
"""

import torch
from torch import Tensor


def linear_penalty(lengths: Tensor, limit: int, weight: float) -> Tensor:
    """`-weight · length / limit`, to be added to the task's reward.

    Args:
        lengths: tokens of each completion. Shape (B,).
        limit: tokens at which completions are truncated, at least 1.
        weight: what a completion as long as the limit costs.

    Returns:
        Shape (B,).
    """
    return -weight * lengths.double() / limit


def soft_overlong(lengths: Tensor, limit: int, buffer: int) -> Tensor:
    """DAPO's soft overlong punishment (arXiv:2503.14476), to be added to the task's reward.

    0 up to `limit - buffer` tokens, from there falling in a line to -1 at the limit, and -1 beyond it.

    Args:
        lengths: tokens of each completion. Shape (B,).
        limit: tokens at which completions are truncated.
        buffer: tokens over which the punishment grows, in [1, limit].

    Returns:
        Shape (B,).

    Raises:
        ValueError: a buffer outside [1, limit].
    """
    if not 1 <= buffer <= limit:
        raise ValueError(f"buffer must lie between 1 and the limit, {limit}; got {buffer}")
    return ((limit - buffer - lengths.double()) / buffer).clamp(-1.0, 0.0)


def lcpo_exact(correct: Tensor, lengths: Tensor, target: Tensor, alpha: float = 3e-4) -> Tensor:
    """LCPO-exact (L1, arXiv:2503.04697): `correct - alpha · |target - length|`, in place of the task's reward.

    Args:
        correct: the task's reward, 0 or 1. Shape (B,).
        lengths: tokens of each completion. Shape (B,).
        target: tokens that were asked for. Shape (B,).
        alpha: what a token of difference costs.

    Returns:
        Shape (B,).
    """
    return correct.double() - alpha * (target - lengths).double().abs()


def lcpo_max(correct: Tensor, lengths: Tensor, target: Tensor, alpha: float = 3e-4, delta: float = 0.5) -> Tensor:
    """LCPO-max (L1, arXiv:2503.04697): `correct · clip(alpha · (target - length) + delta, 0, 1)`.

    In place of the task's reward. A completion that is a little too long and right is still better than a wrong one.

    Args:
        correct: the task's reward, 0 or 1. Shape (B,).
        lengths: tokens of each completion. Shape (B,).
        target: tokens at most. Shape (B,).
        alpha: what a token costs.
        delta: reward of a right completion that is as long as the target.

    Returns:
        Shape (B,).
    """
    return correct.double() * torch.clamp(alpha * (target - lengths).double() + delta, 0.0, 1.0)
