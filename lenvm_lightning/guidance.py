r"""Length controls: what to do with the base model's candidates, knowing how much would follow each of them.

A control is called once a step, for all rows at once, and returns the probabilities to sample from:

    control(probs, remaining, generated, gamma) -> probs

    probs      of the K candidates that truncation has left, summing to 1; 0 where a row has fewer.  Shape (B, K).
    remaining  tokens that would follow each candidate, by the length value model; exactly 0 for an end token, by
               definition and not by prediction. Shape (B, K).
    generated  tokens written before this one. Shape (B,).
    gamma      discount of the length value model.

All lengths count the end token. Everything is written on ``g = 1 - gamma ** remaining``, in [0, 1]; larger is longer.
Controls are frozen dataclasses: their numbers may be tensors of shape (B,), one for each row, and `per_row` makes one
control of many. There is no wait for the device in here. `decoding.control_text` reads their text form,
``equal-to:128:hard``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from .values import length_share

EqualMode = Literal["penalty", "hard", "soft"]
LimitMode = Literal["penalty", "hard"]
ScaleKind = Literal["mul", "linear", "length_mul"]
STRENGTH = 50.0  # nats, of `length_penalty`
# Of `length_penalty`, chosen on tuning topics of the tiny world (docs/experiments.md):
_SURELY_LATE, _LATENESS = 3.0, 0.03  # tokens too late that cost like too early ones; what further ones cost beside them
_SLACK = (
    0.25  # share of what is left, less _NEAR, by which it may be too little: predictions are noisy far from the end
)
_NEAR = 8.0  # tokens: a miss is never measured by less
_EARLIEST, _LATEST = 0.9, 1.05  # shares of a target length that a text is kept within
# Of `find_beta`: a grid of so many betas, refined so often, finds the root to about 1e-4.
_STEEPEST = 1e6  # beta, either way
_GRID, _ROUNDS = 17, 5


class Ends(NamedTuple):
    """What a control says of the end of each row, before truncation.

    Attributes:
        early: True = no end token is a candidate, however likely. Shape (B,).
        due: True = an end token is a candidate, however unlikely. Shape (B,).
    """

    early: Tensor
    due: Tensor


class Control(Protocol):
    """See the module.

    One that aims at a length may say so by an attribute ``n``, tokens, the end included: then there is room for them.
    One that knows when a text may end, and when it must, has a method ``ends(generated: Tensor) -> Ends``.
    """

    def __call__(self, probs: Tensor, remaining: Tensor, generated: Tensor, gamma: float) -> Tensor:
        """Probabilities to sample from. Shape (B, K)."""
        ...


@dataclass(frozen=True)
class Tilt:
    """Trade length against likelihood: ``p'(x) ∝ p(x) · exp(beta · g(x))``.

    The optimum of E[g] under a KL penalty of weight 1 / abs(beta). A row's distribution is untouched at 0.

    Args:
        beta: below 0 shortens, above 0 lengthens.

    Raises:
        ValueError: beta is not finite.
    """

    beta: float | Tensor

    def __post_init__(self) -> None:
        _require_finite("beta", self.beta)

    def __call__(self, probs: Tensor, remaining: Tensor, generated: Tensor, gamma: float) -> Tensor:
        """Probabilities to sample from. Shape (B, K)."""
        return tilt(probs, length_share(remaining, gamma), _column(self.beta, probs))


@dataclass(frozen=True)
class EqualTo:
    """Write ``n`` tokens, the end included.

    Args:
        n: tokens, at least 1.
        mode: ``penalty``: see `length_penalty`, both bounds at n.
            ``hard``: the candidate whose remaining length is nearest to what is left, the likelier of equals (the
            paper's choice).
            ``soft``: the tilt that brings E[g] to that of the target; beyond the reach of all tilts, the extreme
            candidate.
        strength: of ``penalty``: more lands nearer, less reads more like the base model.

    Raises:
        ValueError: n below 1, a strength that is not positive, or an unknown mode.
    """

    n: int | Tensor
    mode: EqualMode = "penalty"
    strength: float | Tensor = STRENGTH

    def ends(self, generated: Tensor) -> Ends:
        """Of ``penalty``: not before 90% of n, and by 105% of it at the latest."""
        n = _row(self.n, generated)
        return _ends(self.mode, generated, (n * _EARLIEST).ceil(), (n * _LATEST).floor())

    def __post_init__(self) -> None:
        _require_count("n", self.n)
        _require_positive("strength", self.strength)
        _require_known("mode", self.mode, get_args(EqualMode))

    def __call__(self, probs: Tensor, remaining: Tensor, generated: Tensor, gamma: float) -> Tensor:
        """Probabilities to sample from. Shape (B, K)."""
        left = _column(self.n, probs) - generated[:, None]  # this token among them
        target = (left - 1).clamp(min=0)  # tokens that should follow it
        if self.mode == "hard":
            return pick(probs, (remaining - target).abs())
        if self.mode == "soft":
            return move_to(probs, length_share(remaining, gamma), length_share(target, gamma))
        moved = length_penalty(probs, remaining, left, left, _column(self.strength, probs))
        return end_where_due(moved, remaining, self.ends(generated).due)


@dataclass(frozen=True)
class AtMost:
    """Write at most ``n`` tokens, the end included.

    Args:
        n: tokens, at least 1.
        mode: ``penalty``: see `length_penalty`, between the shares ``low`` and ``high`` of n.
            ``hard``: the candidate after which least follows (the paper's choice, whatever n is).
        low: of ``penalty``, in [0, high]: 0 shortens only.
        high: of ``penalty``, in (0, 1]: what it stays under 1 by is room for a sentence to end in.
        strength: of ``penalty``, see `EqualTo`.

    Raises:
        ValueError: n below 1, an unknown mode, or shares or a strength that mean nothing.
    """

    n: int | Tensor
    mode: LimitMode = "penalty"
    low: float | Tensor = 0.7
    high: float | Tensor = 0.9
    strength: float | Tensor = STRENGTH

    def ends(self, generated: Tensor) -> Ends:
        """Of ``penalty``: with token n at the latest."""
        n = _row(self.n, generated)
        return _ends(self.mode, generated, torch.zeros_like(n), n)

    def __post_init__(self) -> None:
        _require_count("n", self.n)
        _require_known("mode", self.mode, get_args(LimitMode))
        _require_band(self.low, self.high, 0.0, 1.0)
        _require_positive("strength", self.strength)

    def __call__(self, probs: Tensor, remaining: Tensor, generated: Tensor, gamma: float) -> Tensor:
        """Probabilities to sample from. Shape (B, K)."""
        if self.mode == "hard":
            return pick(probs, remaining)
        n, written = _column(self.n, probs), generated[:, None]
        low, high = ((_column(share, probs) * n).round().clamp(min=1) for share in (self.low, self.high))
        moved = length_penalty(probs, remaining, low - written, high - written, _column(self.strength, probs))
        return end_where_due(moved, remaining, self.ends(generated).due)


@dataclass(frozen=True)
class AtLeast:
    """Write at least ``n`` tokens, the end included.

    Args:
        n: tokens, at least 1.
        mode: ``penalty``: see `length_penalty`, between the shares ``low`` and ``high`` of n.
            ``hard``: the candidate after which most follows while this is not yet token ``n``, then the one after
            which least does (the paper's choice).
        low: of ``penalty``, in [1, high].
        high: of ``penalty``: infinity lengthens only.
        strength: of ``penalty``, see `EqualTo`.

    Raises:
        ValueError: n below 1, an unknown mode, or shares or a strength that mean nothing.
    """

    n: int | Tensor
    mode: LimitMode = "penalty"
    low: float | Tensor = 1.0
    high: float | Tensor = 1.3
    strength: float | Tensor = STRENGTH

    def ends(self, generated: Tensor) -> Ends:
        """Of ``penalty``: not before token n, and by 105% of ``high`` times n at the latest."""
        n = _row(self.n, generated)
        return _ends(self.mode, generated, n, (n * _row(self.high, generated) * _LATEST).floor())

    def __post_init__(self) -> None:
        _require_count("n", self.n)
        _require_known("mode", self.mode, get_args(LimitMode))
        _require_band(self.low, self.high, 1.0, math.inf)
        _require_positive("strength", self.strength)

    def __call__(self, probs: Tensor, remaining: Tensor, generated: Tensor, gamma: float) -> Tensor:
        """Probabilities to sample from. Shape (B, K)."""
        n, written = _column(self.n, probs), generated[:, None]
        if self.mode == "hard":
            return pick(probs, torch.where(written + 1 >= n, remaining, -remaining))
        low, high = ((_column(share, probs) * n).round() for share in (self.low, self.high))
        moved = length_penalty(probs, remaining, low - written, high - written, _column(self.strength, probs))
        return end_where_due(moved, remaining, self.ends(generated).due)


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


def _ends(mode: str, generated: Tensor, earliest: Tensor, latest: Tensor) -> Ends:
    """When a text may end, by the number of this token; in other modes than ``penalty`` whenever it likes."""
    this = generated + 1
    keeps = mode == "penalty"
    return Ends((this < earliest) & keeps, (this >= latest.clamp(min=1)) & keeps)


@dataclass(frozen=True)
class Scale:
    """Move the expected value of each step by a factor, by the tilt that does so.

    Args:
        scale: 1 leaves ``mul`` and ``length_mul`` as they are, 0 does so for ``linear``.
        kind: ``mul``: E[g] becomes ``scale · E[g]``.
            ``linear``: E[g] goes the share ``abs(scale)`` of the way to the largest g offered, or to the smallest where
            scale is negative.
            ``length_mul``: E[g] becomes that of ``scale`` times the length it stands for.

    Raises:
        ValueError: a scale outside what the kind can mean, or an unknown kind.
    """

    scale: float | Tensor
    kind: ScaleKind = "length_mul"

    def __post_init__(self) -> None:
        _require_known("kind", self.kind, get_args(ScaleKind))
        _require_finite("scale", self.scale)
        lowest, highest = (-1.0, 1.0) if self.kind == "linear" else (0.0, math.inf)
        if not isinstance(self.scale, Tensor) and not lowest <= self.scale <= highest:
            raise ValueError(f"scale of kind {self.kind!r} must lie in [{lowest:g}, {highest:g}]; got {self.scale!r}")

    def __call__(self, probs: Tensor, remaining: Tensor, generated: Tensor, gamma: float) -> Tensor:
        """Probabilities to sample from. Shape (B, K)."""
        g, scale = length_share(remaining, gamma), _column(self.scale, probs)
        mean = (probs * g).sum(-1, keepdim=True)
        if self.kind == "mul":
            wanted = scale * mean
        elif self.kind == "length_mul":
            wanted = -torch.expm1(scale * torch.log1p(-mean))  # 1 - (1 - E[g]) ** scale
        else:
            offered = probs > 0
            highest = g.masked_fill(~offered, 0.0).amax(-1, keepdim=True)
            lowest = g.masked_fill(~offered, 1.0).amin(-1, keepdim=True)
            wanted = mean + torch.where(scale > 0, highest - mean, mean - lowest) * scale
        return torch.where(wanted == mean, probs, move_to(probs, g, wanted))


@dataclass(frozen=True)
class Gated:
    """Use a control only where there is something to decide.

    Args:
        control: what is used where both thresholds are passed; elsewhere the base model's probabilities are.
        min_g: least expected g.
        min_entropy: least entropy of ``probs``, nats.

    Raises:
        ValueError: ``control`` is none, or a threshold is not finite.
    """

    control: Any
    min_g: float | Tensor = 0.0
    min_entropy: float | Tensor = 0.0

    def __post_init__(self) -> None:
        if not is_control(self.control):
            raise ValueError(f"control must be a control, such as EqualTo(128); got {self.control!r}")
        _require_finite("min_g", self.min_g)
        _require_finite("min_entropy", self.min_entropy)

    def ends(self, generated: Tensor) -> Ends:
        """Those of the control, gate or not."""
        none = torch.zeros_like(generated, dtype=torch.bool)
        says = getattr(self.control, "ends", None)
        return Ends(none, none) if says is None else says(generated)

    def __call__(self, probs: Tensor, remaining: Tensor, generated: Tensor, gamma: float) -> Tensor:
        """Probabilities to sample from. Shape (B, K)."""
        mean = (probs * length_share(remaining, gamma)).sum(-1, keepdim=True)
        entropy = torch.special.entr(probs).sum(-1, keepdim=True)
        decides = (mean >= _column(self.min_g, probs)) & (entropy >= _column(self.min_entropy, probs))
        return torch.where(decides, self.control(probs, remaining, generated, gamma), probs)


def is_control(control: Any) -> bool:
    """Whether something can be called as a control; the kinds themselves (``EqualTo`` without its n) cannot."""
    return callable(control) and not isinstance(control, type)


def innermost(control: Any) -> Any:
    """The control inside all gates."""
    return innermost(control.control) if isinstance(control, Gated) else control


def target_of(control: Any) -> int | None:
    """Tokens that a control aims at, inside gates too; None where it has no target."""
    n = getattr(innermost(control), "n", None)
    return int(n) if isinstance(n, Integral) else None


# -- moving probabilities by how much would follow each candidate -----------------------------------------------------


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


# -- arguments --------------------------------------------------------------------------------------------------------


def _column(number: float | Tensor, like: Tensor) -> Tensor:
    """A number for all rows, or one a row, as (…, 1) beside (B, K)."""
    if isinstance(number, Tensor):
        return number.to(like.dtype)[..., None]
    return torch.full((1, 1), number, dtype=like.dtype, device=like.device)


def _row(number: float | Tensor, like: Tensor) -> Tensor:
    """A number for all rows, or one a row, as (B,) or (1,) beside (B,)."""
    if isinstance(number, Tensor):
        return number.to(torch.float64)
    return torch.full((1,), number, dtype=torch.float64, device=like.device)


def _require_finite(name: str, number: float | Tensor) -> None:
    if not isinstance(number, Tensor) and not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number!r}")


def _require_positive(name: str, number: float | Tensor) -> None:
    if not isinstance(number, Tensor) and not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {number!r}")


def _require_count(name: str, number: int | Tensor) -> None:
    if isinstance(number, Tensor):
        return
    if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
        raise ValueError(f"{name} must be a whole number of at least 1 token, the end included; got {number!r}")


def _require_known(name: str, word: str, known: Sequence[str]) -> None:
    if word not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {word!r}")


def _require_band(low: float | Tensor, high: float | Tensor, least: float, most: float) -> None:
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return
    if not (least <= low <= high <= most and high > 0):
        band = f"{least:g} <= low <= high <= {most:g}"
        raise ValueError(f"low and high must be shares of n with {band}; got {low}, {high}")
