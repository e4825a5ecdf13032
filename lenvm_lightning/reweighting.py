"""New probabilities for the candidates of a step, by how much would follow each: what controls are made of.

``p`` are the base model's probabilities of the K candidates, 0 where a row has fewer; ``remaining`` the tokens that
would follow each, 0 for an end token; ``g = 1 - gamma ** remaining``, in [0, 1].
"""

import math

import torch
from torch import Tensor

# Of `length_penalty`, chosen on tuning topics of the tiny world (docs/experiments.md):
_SURELY_LATE, _LATENESS = 3.0, 0.03  # tokens too late that cost like too early ones; what further ones cost beside them
# Share of what is left, less _NEAR, by which it may be too little: predictions are noisy far from the end.
_SLACK = 0.25
_NEAR = 8.0  # tokens: a miss is never measured by less
# Of `find_beta`: a grid of so many betas, refined so often, finds the root to about 1e-4.
_STEEPEST = 1e6  # beta, either way
_GRID, _ROUNDS = 17, 5


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


def length_penalty(probs: Tensor, remaining: Tensor, low: Tensor, high: Tensor, strength: Tensor) -> Tensor:
    """End between two lengths, and read like the base model: ``p'(x) ∝ p(x) · exp(-strength · cost(x))``.

    With r the tokens that would follow candidate x, its cost is what it misses the band by, as a share of what is left:

        cost(x) = (due(low - 1) - r)+ / max(low, 8)  +  late((r - (high - 1))+) / max(high, 8)
        due(t)  = t - (t / 4 - 8)+
        late(d) = min(d, 3) + 0.03 · (d - 3)+

    Much too late costs far less than much too early, for it can still be corrected: r is what the base model would
    write, and a text that goes on can be closed at the next chance, while one that has started its closing sentence
    rarely continues. Nor is a little too early an error far from the end; to cost it there would be to choose words by
    the noise of r. (To bring the mean to the target instead, as ``soft`` does, samples closings early every so often;
    to take the nearest, as ``hard`` does, misses early as readily as late.)

    Args:
        probs: shape (B, K).
        remaining: after each candidate, 0 for an end. Shape (B, K).
        low: tokens to the least length, this one among them. Shape (B, 1).
        high: tokens to the greatest, infinity where there is none. Shape (B, 1).
        strength: nats by which a candidate that misses by everything that is left is made less likely. Shape (B, 1).
    """
    due = low - 1 - ((low - 1) * _SLACK - _NEAR).clamp(min=0)
    early = (due - remaining).clamp(min=0)
    late = (remaining - (high - 1).clamp(min=0)).clamp(min=0)
    late = late.clamp(max=_SURELY_LATE) + _LATENESS * (late - _SURELY_LATE).clamp(min=0)
    cost = early / low.clamp(min=_NEAR) + late / high.clamp(min=_NEAR)
    return (probs.log() - strength * cost).softmax(-1)


def end_where_due(probs: Tensor, remaining: Tensor, due: Tensor) -> Tensor:
    """All probability on the end tokens, in rows where the end is due and one is offered.

    Args:
        probs: shape (B, K).
        remaining: after each candidate, 0 for an end. Shape (B, K).
        due: True = the end is due. Shape (B,).
    """
    of_ends = probs.masked_fill(remaining > 0, 0.0)
    mass = of_ends.sum(-1, keepdim=True)
    return torch.where(due[:, None] & (mass > 0), of_ends / mass, probs)
