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
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from .reweighting import end_where_due, length_penalty, move_to, pick, tilt
from .values import length_share

EqualMode = Literal["penalty", "hard", "soft"]
LimitMode = Literal["penalty", "hard"]
ScaleKind = Literal["mul", "linear", "length_mul"]
STRENGTH = 50.0  # nats, of `reweighting.length_penalty`
_LOW = 0.7  # share of the limit of a whole text that `AtMost` does not go below
_EARLIEST, _LATEST = 0.9, 1.05  # shares of a target length that a text is kept within


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
    One that counts to a text, and not to the end, says so by an attribute ``until``: then `remaining` counts to the
    token that completes it, that token is an end token, and once it is written the control is not asked again.
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
        mode: ``penalty``: see `reweighting.length_penalty`, both bounds at n.
            ``hard``: the candidate whose remaining length is nearest to what is left, the likelier of equals (the
            paper's choice).
            ``soft``: the tilt that brings E[g] to that of the target; beyond the reach of all tilts, the extreme
            candidate.
        strength: of ``penalty``: more lands nearer, less reads more like the base model.
        until: a text: n counts to the token that completes its first occurrence, and what follows is the base model's.

    Raises:
        ValueError: n below 1, a strength that is not positive, an unknown mode, or an empty ``until``.
    """

    n: int | Tensor
    mode: EqualMode = "penalty"
    strength: float | Tensor = STRENGTH
    until: str | None = None

    def __repr__(self) -> str:
        return _shown(self)

    def ends(self, generated: Tensor) -> Ends:
        """Of ``penalty``: not before 90% of n, and by 105% of it at the latest."""
        n = _row(self.n, generated)
        return _ends(self.mode, generated, (n * _EARLIEST).ceil(), (n * _LATEST).floor())

    def __post_init__(self) -> None:
        _require_count("n", self.n)
        _require_positive("strength", self.strength)
        _require_known("mode", self.mode, get_args(EqualMode))
        _require_text("until", self.until)

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
        mode: ``penalty``: see `reweighting.length_penalty`, between the shares ``low`` and ``high`` of n.
            ``hard``: the candidate after which least follows (the paper's choice, whatever n is).
        low: of ``penalty``, in [0, high]: 0 shortens only. Where None 0.7, and 0 with ``until``: a budget of thinking
            is a limit, and no length to fill.
        high: of ``penalty``, in (0, 1]: what it stays under 1 by is room for a sentence to end in.
        strength: of ``penalty``, see `EqualTo`.
        until: see `EqualTo`.

    Raises:
        ValueError: n below 1, an unknown mode, shares or a strength that mean nothing, or an empty ``until``.
    """

    n: int | Tensor
    mode: LimitMode = "penalty"
    low: float | Tensor | None = None
    high: float | Tensor = 0.9
    strength: float | Tensor = STRENGTH
    until: str | None = None

    def __repr__(self) -> str:
        return _shown(self)

    def ends(self, generated: Tensor) -> Ends:
        """Of ``penalty``: with token n at the latest."""
        n = _row(self.n, generated)
        return _ends(self.mode, generated, torch.zeros_like(n), n)

    def __post_init__(self) -> None:
        if self.low is None:
            object.__setattr__(self, "low", _LOW if self.until is None else 0.0)
        _require_count("n", self.n)
        _require_known("mode", self.mode, get_args(LimitMode))
        _require_band(self.low, self.high, 0.0, 1.0)
        _require_positive("strength", self.strength)
        _require_text("until", self.until)

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
        mode: ``penalty``: see `reweighting.length_penalty`, between the shares ``low`` and ``high`` of n.
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
        control: what is used where both thresholds are passed, and where it says that the end is due; elsewhere the
            base model's probabilities are.
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
        decides = decides | self.ends(generated).due[:, None]
        return torch.where(decides, self.control(probs, remaining, generated, gamma), probs)


def is_control(control: Any) -> bool:
    """Whether something can be called as a control; the kinds themselves (``EqualTo`` without its n) cannot."""
    return callable(control) and not isinstance(control, type)


def innermost(control: Any) -> Any:
    """The control inside all gates."""
    return innermost(control.control) if isinstance(control, Gated) else control


def until_of(control: Any) -> str | None:
    """The text that a control counts to, inside gates too; None where that is the end of the completion."""
    until = getattr(innermost(control), "until", None)
    return until if isinstance(until, str) else None


def target_of(control: Any) -> int | None:
    """Tokens that a control aims at, inside gates too, in the segment where it has one; None where it has no target."""
    n = getattr(innermost(control), "n", None)
    return int(n) if isinstance(n, Integral) else None


def _shown(control: Any) -> str:
    """The control as it is written in Python; ``until`` only where it has one."""
    named = {field.name: getattr(control, field.name) for field in fields(control)}
    told = [f"{name}={value!r}" for name, value in named.items() if name != "until" or value is not None]
    return f"{type(control).__name__}({', '.join(told)})"


# -- arguments --------------------------------------------------------------------------------------------------------


def _column(number: float | Tensor | None, like: Tensor) -> Tensor:
    """A number for all rows, or one a row, as (…, 1) beside (B, K)."""
    if isinstance(number, Tensor):
        return number.to(like.dtype)[..., None]
    assert number is not None
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


def _require_text(name: str, text: str | None) -> None:
    if text is not None and (not isinstance(text, str) or not text):
        raise ValueError(f"{name} must be a text such as '</think>', or None for the end; got {text!r}")


def _require_known(name: str, word: str, known: Sequence[str]) -> None:
    if word not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {word!r}")


def _require_band(low: float | Tensor | None, high: float | Tensor, least: float, most: float) -> None:
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return
    if low is None or not (least <= low <= high <= most and high > 0):
        band = f"{least:g} <= low <= high <= {most:g}"
        raise ValueError(f"low and high must be shares of n with {band}; got {low}, {high}")
