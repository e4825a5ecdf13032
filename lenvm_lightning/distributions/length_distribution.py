"""LengthDistribution: how likely it is that more than t tokens follow, for every t."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LengthDistribution:
    """Distributions of what remains, as curves: `longer[k]` is the probability that more than `tokens[k]` follow.

    Between two points a curve is a line: as many completions end at each length between them. Beyond the last point it
    falls exponentially. What is read off it are real numbers of tokens, not rounded.

    Attributes:
        tokens: M lengths of each state, ascending, the first at least -1 (more than -1 tokens follow for certain).
            Shape (..., M), or (M,) where all states share them.
        longer: probability that more than so many tokens follow, descending from 1. Shape (..., M).
        tail: mean tokens beyond the last point, for those that get there, > 0. Shape (...) or (), or a number.
    """

    tokens: Tensor
    longer: Tensor
    tail: Tensor | float

    def survival(self, tokens: Tensor | float) -> Tensor:
        """Probability that more than `tokens` follow.

        Args:
            tokens: t, that broadcasts with the states. Shape (...).

        Returns:
            In [0, 1]. Shape (...).
        """
        curve, longer = torch.broadcast_tensors(self.tokens, self.longer)
        t = torch.as_tensor(tokens, dtype=longer.dtype, device=longer.device).expand(longer.shape[:-1])
        inside = _read_curve(curve, longer, t)
        beyond = longer[..., -1] * torch.exp(-(t - curve[..., -1]).clamp(min=0) / self._tail())
        return torch.where(t > curve[..., -1], beyond, inside)

    def cdf(self, tokens: Tensor | float) -> Tensor:
        """Probability that at most `tokens` follow, `1 - survival`. Shapes as there."""
        return 1.0 - self.survival(tokens)

    def quantile(self, q: Tensor | float) -> Tensor:
        """The number of tokens that at most a share `q` of continuations stay within.

        Args:
            q: in [0, 1), that broadcasts with the states. Shape (...); 1 gives infinity.

        Returns:
            Tokens, >= 0. Shape (...).
        """
        curve, longer = torch.broadcast_tensors(self.tokens, self.longer)
        left = 1.0 - torch.as_tensor(q, dtype=longer.dtype, device=longer.device).expand(longer.shape[:-1])
        inside = _read_curve(1.0 - longer, curve, 1.0 - left)
        last = longer[..., -1]
        beyond = curve[..., -1] + self._tail() * torch.log((last / left).clamp(min=1.0))
        return torch.where(left < last, beyond, inside).clamp(min=0.0)

    def quantiles(self, levels: Sequence[float]) -> Tensor:
        """`quantile` at Q levels. Shape (..., Q)."""
        return torch.stack([self.quantile(q) for q in levels], dim=-1)

    def median(self) -> Tensor:
        """Tokens that half of the continuations stay within. Shape (...)."""
        return self.quantile(0.5)

    def mean(self) -> Tensor:
        """Mean tokens. Shape (...). Where training met truncated completions, its tail is an assumption."""
        curve, longer = torch.broadcast_tensors(self.tokens, self.longer)
        share = longer[..., :-1] - longer[..., 1:]
        middle = 0.5 * (curve[..., :-1] + 1.0 + curve[..., 1:])  # of the whole numbers of tokens between two points
        return (share * middle).sum(-1) + longer[..., -1] * (curve[..., -1] + self._tail())

    def _tail(self) -> Tensor:
        return torch.as_tensor(self.tail, dtype=self.longer.dtype, device=self.longer.device)


def _read_curve(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """`y` at the places `at` of a line through the points (x, y), with x ascending. Shapes (..., M), (..., M), (...).

    Outside it is the first or last y. Of points with the same x the first counts.
    """
    right = torch.searchsorted(x.contiguous(), at[..., None].contiguous()).clamp(1, x.shape[-1] - 1)
    left = right - 1
    x0, x1 = x.gather(-1, left)[..., 0], x.gather(-1, right)[..., 0]
    y0, y1 = y.gather(-1, left)[..., 0], y.gather(-1, right)[..., 0]
    share = ((at - x0) / (x1 - x0).clamp(min=torch.finfo(x.dtype).tiny)).clamp(0.0, 1.0)
    return y0 + share * (y1 - y0)


def lognormal(remaining: Tensor, sigma: float, points: int = 33) -> LengthDistribution:
    """A log-normal distribution around a prediction, which is its median: what a single number has for a distribution.

    Args:
        remaining: predicted tokens, >= 0. Shape (...).
        sigma: standard deviation of `log((1 + true) / (1 + predicted))`, > 0.
        points: of the curve.
    """
    level = (torch.arange(points, dtype=remaining.dtype, device=remaining.device) + 0.5) / points
    factor = torch.exp(sigma * torch.special.ndtri(level))
    tokens = (1.0 + remaining)[..., None] * factor - 1.0
    return from_quantiles(tokens, level)


def from_quantiles(tokens: Tensor, levels: Tensor) -> LengthDistribution:
    """A distribution through quantiles.

    Args:
        tokens: the quantiles, ascending, >= -1. Shape (..., M).
        levels: their levels in (0, 1), ascending. Shape (M,).

    Returns:
        The curve through them and through -1 tokens for certain. Beyond the last of them it goes on as it fell between
        the last two.
    """
    certain = torch.full_like(tokens[..., :1], -1.0)
    longer = torch.cat([torch.ones_like(levels[:1]), 1.0 - levels])
    fall = torch.log(longer[-2] / longer[-1])
    tail = ((tokens[..., -1] - tokens[..., -2]) / fall).clamp(min=0.5)
    curve = torch.cat([certain, tokens], dim=-1)
    return LengthDistribution(curve, longer.expand(curve.shape), tail)
