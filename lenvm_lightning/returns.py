"""lambda-returns, and what a truncated completion can still teach.

Notation of the paper: reward `r = -(1 - gamma)` a token, `V_t` the value of state t, `s_L` the state after EOS.
States of one sequence are the positions where `mask` is True; they are contiguous and end at the last one kept.
"""

import torch
from torch import Tensor

from .values import remaining_to_value


def lambda_returns(value: Tensor, remaining: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Targets `V_t + A_t` of TD(lambda), computed from the end backwards.

        delta_t = r + gamma * V_{t+1} - V_t          A_t = delta_t + gamma * lam * A_{t+1}

    Three conventions close the recursion: the value after EOS is 0; the EOS state itself has target 0 and passes no
    error backwards; and where the sequence ends before EOS (cut to the training length), the known remaining length
    gives the missing next value. `lam = 1` equals the closed form `-(1 - gamma ** remaining)`.

    Args:
        value: predicted values, in [-1, 0]. Shape (B, T). Treated as constants.
        remaining: tokens still to come, 0 at the EOS state. Shape (B, T), integer or float.
        mask: True = supervised state. Shape (B, T).
        gamma: discount, in (0, 1).
        lam: lambda, in [0, 1].

    Returns:
        Targets, shape (B, T), 0 where `mask` is False.

    Raises:
        ValueError: lam outside [0, 1], or gamma outside (0, 1).
    """
    if not 0.0 <= lam <= 1.0:
        raise ValueError(f"lambda must lie between 0 and 1, got {lam!r}")
    value = value.detach()
    exact = remaining_to_value(remaining, gamma).to(value.dtype)
    if lam == 1.0:
        return exact.masked_fill(~mask, 0.0)
    ended = mask & (remaining == 0)
    has_next = torch.zeros_like(mask)
    has_next[:, :-1] = mask[:, 1:]
    # Value of the next state: the prediction while it is in the sequence, 0 at the EOS state, else the known truth.
    next_value = torch.zeros_like(value)
    next_value[:, :-1] = torch.where(ended[:, 1:], 0.0, value[:, 1:])
    known_next = remaining_to_value((remaining - 1).clamp(min=0), gamma).to(value.dtype)
    next_value = torch.where(has_next, next_value, known_next)
    delta = gamma * next_value - (1.0 - gamma) - value
    delta = delta.masked_fill(~mask | ended, 0.0)
    advantage = torch.zeros_like(value)
    running = torch.zeros_like(value[:, 0])
    for t in range(value.shape[1] - 1, -1, -1):
        running = delta[:, t] + gamma * lam * running
        running = running.masked_fill(~mask[:, t] | ended[:, t], 0.0)
        advantage[:, t] = running
    return torch.where(ended | ~mask, 0.0, value + advantage)


def remaining_after_cut(remaining: Tensor, beyond: Tensor, censored: Tensor) -> Tensor:
    """Remaining tokens of truncated completions: those seen before the cut plus an estimate of those beyond it.

    With `beyond` the model's own estimate at the cut this is the n-step bootstrapped return, since
    `1 - gamma ** (k + beyond) = 1 - gamma ** k * (1 + V_cut)`.

    Args:
        remaining: tokens to the end of what was seen. Shape (B, T).
        beyond: estimated tokens after the cut, >= 0. Shape (B,). Treated as a constant.
        censored: True = truncated. Shape (B,).

    Returns:
        Float tensor, shape (B, T); rows that are not censored keep their counts.
    """
    beyond = torch.where(censored, beyond.detach(), 0.0)
    return remaining.to(beyond.dtype) + beyond[:, None]
