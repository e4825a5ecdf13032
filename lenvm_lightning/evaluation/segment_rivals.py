"""Ways to end a segment that need no length value model: what `AtMost(n, until=…)` is measured beside.

Both are controls as those in `guidance`, so that sampling is the same; the predictions they are given are not used.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..guidance import Ends
from ..reweighting import end_where_due, tilt


@dataclass(frozen=True)
class HardCut:
    """What servers do with a budget of thinking: with token n the text that ends it is forced.

    Args:
        n: tokens of the segment, that text included.
        until: the text.
    """

    n: int
    until: str

    def ends(self, generated: Tensor) -> Ends:
        """With token n at the latest."""
        return Ends(torch.zeros_like(generated, dtype=torch.bool), generated + 1 >= self.n)

    def __call__(self, probs: Tensor, remaining: Tensor, generated: Tensor, gamma: float) -> Tensor:
        """Probabilities to sample from. Shape (B, K)."""
        return end_where_due(probs, remaining, self.ends(generated).due)


@dataclass(frozen=True)
class Ramp:
    """A hard cut, and before it a bias on the token that ends the segment, growing linearly to its largest at token n.

    For texts of one token: the tokens of others are forced as soon as the ramp begins.

    Args:
        n: tokens of the segment, the text that ends it included.
        until: the text.
        share: of n, at the end, over which the bias grows, in (0, 1].
        most: the bias at token n, nats.
    """

    n: int
    until: str
    share: float = 0.25
    most: float = 10.0

    def ends(self, generated: Tensor) -> Ends:
        """A candidate from where the ramp begins, however unlikely."""
        return Ends(torch.zeros_like(generated, dtype=torch.bool), self._bias(generated) > 0)

    def _bias(self, generated: Tensor) -> Tensor:
        """Nats. Shape (B,), float64."""
        begins = self.n * (1 - self.share)
        return ((generated + 1 - begins) / (self.n - begins)).double().clamp(0, 1) * self.most

    def __call__(self, probs: Tensor, remaining: Tensor, generated: Tensor, gamma: float) -> Tensor:
        """Probabilities to sample from. Shape (B, K)."""
        bias = self._bias(generated)[:, None].to(probs.dtype)
        moved = tilt(probs, (remaining == 0).to(probs.dtype), bias)
        return end_where_due(moved, remaining, generated + 1 >= self.n)
