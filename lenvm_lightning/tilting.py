"""The maths of length controls: probabilities of candidates, moved by how much would follow each of them."""

import math

import torch
from torch import Tensor

from .values import remaining_to_value

_STEEPEST = 1e6  # β, either way
_GRID, _ROUNDS = 17, 5  # points of β that are tried at once; times that the bracket is refined


def length_share(remaining: Tensor, gamma: float) -> Tensor:
    """``g = 1 - gamma ** remaining``, in [0, 1]. Any shape."""
    return -remaining_to_value(remaining, gamma)


def tilt(probs: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """``p · exp(beta · g)``, normalised; ``probs`` itself, bit for bit, where beta is 0.

    Args:
        probs: shape (..., K).
        g: likewise.
        beta: shape (..., 1).
    """
    return torch.where(beta == 0, probs, (probs.log() + beta * g).softmax(-1))


def find_beta(probs: Tensor, g: Tensor, target: Tensor) -> Tensor:
    """The tilt under which E[g] is the target, or nearest to it.

    E[g] grows with beta, its derivative being the variance of g: a bracket on a grid is refined a few times.

    Args:
        probs: shape (B, K).
        g: likewise.
        target: shape (B, 1).

    Returns:
        Shape (B, 1), relative error about 1e-4.
    """
    steps = torch.linspace(0, 1, _GRID, dtype=probs.dtype, device=probs.device)
    reach = math.asinh(_STEEPEST)  # a grid on asinh(beta): fine near 0, coarse far away
    low = torch.full_like(target, -reach, dtype=probs.dtype)
    width = torch.full_like(low, 2 * reach)
    logits = probs.log()[:, None]  # (B, 1, K)
    for _ in range(_ROUNDS):
        grid = low + width * steps  # (B, grid)
        tilted = (logits + grid.sinh()[..., None] * g[:, None]).softmax(-1)
        means = (tilted * g[:, None]).sum(-1)
        below = (means < target).sum(-1, keepdim=True).clamp(1, _GRID - 1)
        low, width = grid.gather(1, below - 1), width / (_GRID - 1)
    return (low + width / 2).sinh()


def move_to(probs: Tensor, g: Tensor, target: Tensor) -> Tensor:
    """Tilt so that E[g] is the target; the extreme candidate, the likelier of equals, where no tilt reaches it.

    Args:
        probs: shape (B, K).
        g: likewise.
        target: shape (B, 1).
    """
    offered = probs > 0
    highest = g.masked_fill(~offered, -1.0).amax(-1, keepdim=True)
    lowest = g.masked_fill(~offered, 2.0).amin(-1, keepdim=True)
    moved = tilt(probs, g, find_beta(probs, g, target))
    moved = torch.where(target >= highest, pick(probs, -g), moved)
    return torch.where(target <= lowest, pick(probs, g), moved)


def pick(probs: Tensor, cost: Tensor) -> Tensor:
    """All probability on the candidate that costs least, the likelier of equals. Shapes (B, K)."""
    cost = cost.masked_fill(probs <= 0, torch.inf)
    best = cost.amin(-1, keepdim=True)
    place = probs.masked_fill(cost > best, -1.0).argmax(-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(-1, place, 1.0)
