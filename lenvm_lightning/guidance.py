r"""Length controls: what to do with the base model's candidates, knowing how much would follow each of them.

A control is called once a step, for all rows at once, and returns the probabilities to draw from:

    control(probs, remaining, generated, gamma) -> probs

    probs      of the K candidates that truncation has left, summing to 1; 0 where a row has fewer.  Shape (B, K).
    remaining  tokens that would follow each candidate, by the length value model; exactly 0 for an end token, by
               definition and not by prediction. Shape (B, K).
    generated  tokens written before this one. Shape (B,).
    gamma      discount of the length value model.

All lengths count the end token. Everything is written on ``g = 1 - gamma ** remaining``, in [0, 1]; larger is longer.
Controls are frozen dataclasses: their numbers may be tensors of shape (B,), one for each row, and :func:`per_row` makes
one control of many. There is no wait for the device in here.
"""

import dataclasses
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from .values import remaining_to_value

EqualMode = Literal["landing", "hard", "soft"]
ScaleKind = Literal["mul", "linear", "length_mul"]
STEEPEST = 20.0  # β of a bounded tilt: beyond it, texts stop reading like the base model's
_UNBOUNDED = 1e6
_GRID, _ROUNDS = 17, 5  # points of β that are tried at once; times that the bracket is refined
_CLOSING = 2  # tokens before the target from which an end is taken where one is offered


class Control(Protocol):
    """See the module."""

    def __call__(self, probs: Tensor, remaining: Tensor, generated: Tensor, gamma: float) -> Tensor:
        """Probabilities to draw from. Shape (B, K)."""
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
        """Probabilities to draw from. Shape (B, K)."""
        return tilt(probs, length_share(remaining, gamma), _column(self.beta, probs))


@dataclass(frozen=True)
class EqualTo:
    """Write ``n`` tokens, the end included.

    Args:
        n: tokens, at least 1.
        mode: ``landing``: the bounded tilt, abs(beta) <= 20, that brings E[g] to that of the target or as near as it
            goes; no end while more than two tokens are left unless nothing else is offered, and then the first end
            that is.
            ``hard``: the candidate whose remaining length is nearest to what is left, the likelier of equals (the
            paper's choice).
            ``soft``: the tilt that brings E[g] to that of the target; beyond the reach of all tilts, the extreme
            candidate.

    Raises:
        ValueError: n below 1, or an unknown mode.
    """

    n: int | Tensor
    mode: EqualMode = "landing"

    def __post_init__(self) -> None:
        _require_count("n", self.n)
        _require_known("mode", self.mode, get_args(EqualMode))

    def __call__(self, probs: Tensor, remaining: Tensor, generated: Tensor, gamma: float) -> Tensor:
        """Probabilities to draw from. Shape (B, K)."""
        left = _column(self.n, probs) - generated[:, None]  # this token among them
        target = (left - 1).clamp(min=0)  # tokens that should follow it
        if self.mode == "hard":
            return pick(probs, (remaining - target).abs())
        g, wanted = length_share(remaining, gamma), length_share(target, gamma)
        if self.mode == "soft":
            return move_to(probs, g, wanted)
        return gate_end(tilt(probs, g, find_beta(probs, g, wanted, STEEPEST)), remaining, left, _CLOSING)


@dataclass(frozen=True)
class AtMost:
    """Write at most ``n`` tokens, the end included.

    Args:
        n: tokens, at least 1.
        mode: ``hard``: the candidate after which least follows (the paper's choice, whatever n is).

    Raises:
        ValueError: n below 1, or an unknown mode.
    """

    n: int | Tensor
    mode: Literal["hard"] = "hard"

    def __post_init__(self) -> None:
        _require_count("n", self.n)
        _require_known("mode", self.mode, ("hard",))

    def __call__(self, probs: Tensor, remaining: Tensor, generated: Tensor, gamma: float) -> Tensor:
        """Probabilities to draw from. Shape (B, K)."""
        return pick(probs, remaining)


@dataclass(frozen=True)
class AtLeast:
    """Write at least ``n`` tokens, the end included.

    Args:
        n: tokens, at least 1.
        mode: ``hard``: the candidate after which most follows while this is not yet token ``n``, then the one after
            which least does (the paper's choice).

    Raises:
        ValueError: n below 1, or an unknown mode.
    """

    n: int | Tensor
    mode: Literal["hard"] = "hard"

    def __post_init__(self) -> None:
        _require_count("n", self.n)
        _require_known("mode", self.mode, ("hard",))

    def __call__(self, probs: Tensor, remaining: Tensor, generated: Tensor, gamma: float) -> Tensor:
        """Probabilities to draw from. Shape (B, K)."""
        reached = generated[:, None] + 1 >= _column(self.n, probs)
        return pick(probs, torch.where(reached, remaining, -remaining))


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
        """Probabilities to draw from. Shape (B, K)."""
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
    """

    control: Any
    min_g: float | Tensor = 0.0
    min_entropy: float | Tensor = 0.0

    def __post_init__(self) -> None:
        _require_finite("min_g", self.min_g)
        _require_finite("min_entropy", self.min_entropy)

    def __call__(self, probs: Tensor, remaining: Tensor, generated: Tensor, gamma: float) -> Tensor:
        """Probabilities to draw from. Shape (B, K)."""
        mean = (probs * length_share(remaining, gamma)).sum(-1, keepdim=True)
        entropy = torch.special.entr(probs).sum(-1, keepdim=True)
        decides = (mean >= _column(self.min_g, probs)) & (entropy >= _column(self.min_entropy, probs))
        return torch.where(decides, self.control(probs, remaining, generated, gamma), probs)


# -- one control a row ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PerRow:
    """Controls of several kinds, each for some of the rows; see :func:`per_row`.

    Args:
        parts: a control whose numbers are those of its rows, and True = a row of its. Shape (B,).
    """

    parts: Sequence[tuple[Control, Tensor]]

    def __call__(self, probs: Tensor, remaining: Tensor, generated: Tensor, gamma: float) -> Tensor:
        """Probabilities to draw from. Shape (B, K)."""
        result = probs
        for control, rows in self.parts:
            result = torch.where(rows[:, None], control(probs, remaining, generated, gamma), result)
        return result


def per_row(controls: Sequence[Control | None], device: torch.device | str = "cpu") -> PerRow:
    """One control for a batch whose rows have controls of their own.

    Args:
        controls: one for each row; None leaves a row to the base model, bit for bit.
        device: of the tensors.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, control in enumerate(controls):
        if control is not None:
            groups.setdefault(_kind(control), []).append(row)
    parts = []
    for rows in groups.values():
        mask = torch.zeros(len(controls), dtype=torch.bool)
        mask[rows] = True
        stacked = _stack([controls[row] if chosen else controls[rows[0]] for row, chosen in enumerate(mask.tolist())])
        parts.append((_move(stacked, device), mask.to(device)))
    return PerRow(parts)


def _kind(control: Any) -> Hashable:
    """What controls must share to be computed together: everything but their numbers."""
    if not dataclasses.is_dataclass(control):
        return ("alone", id(control)) if callable(control) else control if isinstance(control, str) else None
    return (type(control), *(_kind(getattr(control, field.name)) for field in dataclasses.fields(control)))


def _stack(values: Sequence[Any]) -> Any:
    """Controls of one kind as one, numbers as tensors."""
    first = values[0]
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        return dataclasses.replace(
            first, **{name: _stack([getattr(value, name) for value in values]) for name in names}
        )
    return torch.tensor(values) if isinstance(first, int | float) else first


def _move(control: Any, device: torch.device | str) -> Any:
    if dataclasses.is_dataclass(control) and not isinstance(control, type):
        names = [field.name for field in dataclasses.fields(control)]
        return dataclasses.replace(control, **{name: _move(getattr(control, name), device) for name in names})
    return control.to(device) if isinstance(control, Tensor) else control


# -- the maths --------------------------------------------------------------------------------------------------------


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


def find_beta(probs: Tensor, g: Tensor, target: Tensor, bound: float = _UNBOUNDED) -> Tensor:
    """The tilt under which E[g] is the target; within ``bound`` of 0, so the nearest where that does not reach.

    E[g] grows with beta, its derivative being the variance of g: a bracket on a grid is refined a few times.

    Args:
        probs: shape (B, K).
        g: likewise.
        target: shape (B, 1).
        bound: largest beta either way.

    Returns:
        Shape (B, 1), relative error about 1e-4.
    """
    steps = torch.linspace(0, 1, _GRID, dtype=probs.dtype, device=probs.device)
    reach = math.asinh(bound)  # a grid on asinh(beta): fine near 0, coarse far away
    low = torch.full_like(target, -reach, dtype=probs.dtype)
    width = torch.full_like(low, 2 * reach)
    logits = probs.log()[:, None]  # (B, 1, K)
    for _ in range(_ROUNDS):
        grid = low + width * steps  # (B, grid)
        tilted = (logits + grid.sinh()[..., None] * g[:, None]).softmax(-1)
        means = (tilted * g[:, None]).sum(-1)
        below = (means < target).sum(-1, keepdim=True).clamp(1, _GRID - 1)
        low, width = grid.gather(1, below - 1), width / (_GRID - 1)
    return (low + width / 2).sinh().clamp(-bound, bound)


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


def gate_end(probs: Tensor, remaining: Tensor, left: Tensor, closing: int) -> Tensor:
    """Keep a row from ending while more than ``closing`` tokens are left, and end it once there are not.

    Args:
        probs: shape (B, K).
        remaining: after each candidate, 0 for an end. Shape (B, K).
        left: tokens to the target, this one among them. Shape (B, 1).
        closing: how many tokens before the target an end may come.

    Returns:
        Probabilities, renormalised; unchanged where there is no end among the candidates, or nothing else.
    """
    end = (remaining == 0) & (probs > 0)
    kept = torch.where(left > closing, probs.masked_fill(end, 0.0), probs.masked_fill(~end, 0.0))
    mass = kept.sum(-1, keepdim=True)
    return torch.where(
        (mass > 0) & end.any(-1, keepdim=True), kept / mass.clamp(min=torch.finfo(probs.dtype).tiny), probs
    )


def _column(number: float | Tensor, like: Tensor) -> Tensor:
    """A number for all rows, or one a row, as (…, 1) beside (B, K)."""
    if isinstance(number, Tensor):
        return number.to(like.dtype)[..., None]
    return torch.full((1, 1), number, dtype=like.dtype, device=like.device)


def _require_finite(name: str, number: float | Tensor) -> None:
    if not isinstance(number, Tensor) and not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number!r}")


def _require_count(name: str, number: int | Tensor) -> None:
    if isinstance(number, Tensor):
        return
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"{name} must be a whole number of at least 1 token, the end included; got {number!r}")


def _require_known(name: str, word: str, known: Sequence[str]) -> None:
    if word not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {word!r}")
