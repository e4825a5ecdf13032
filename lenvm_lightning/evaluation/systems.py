"""Systems by the names that people type: ``base``, ``ours``, ``paper``, ``tilt:-5``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import EvaluationError, nearest
from ..guidance import AtLeast, AtMost, Control, EqualTo
from .controls import parse_control
from .samples import System

GUIDED_MIN_P = 0.01  # of the paper's trade-off, for guided systems alone
_LANDING = {"equal to": EqualTo, "at most": AtMost, "at least": AtLeast}
_WISHES: dict[str, Callable[[str, int], Control]] = {
    "ours": lambda wish, n: _LANDING[wish](n),
    "paper": lambda wish, n: _LANDING[wish](n, mode="hard"),
    "paper-equal": lambda wish, n: EqualTo(n, mode="hard"),
    "soft": lambda wish, n: EqualTo(n, mode="soft") if wish == "equal to" else _LANDING[wish](n),
}
"""For prompts that wish for a length. ``paper-equal`` is what the published run did: equal to, whatever the wish."""


def wish_systems(names: Sequence[str]) -> list[System]:
    """Systems that are given the length their prompt wishes for.

    Args:
        names: ``base``, a key of `_WISHES`, or a control that is the same for all prompts.

    Raises:
        EvaluationError: a name that means nothing.
    """
    return _systems(names, _WISHES, {})


def budget_systems(names: Sequence[str]) -> list[System]:
    """Systems whose length has a price: ``base``, ``base+min-p`` (drawn as the guided ones are), and controls.

    Raises:
        EvaluationError: a name that means nothing.
    """
    return _systems(names, {}, {"min_p": GUIDED_MIN_P})


def _systems(
    names: Sequence[str], wishes: Mapping[str, Callable[[str, int], Control]], drawing: Mapping[str, Any]
) -> list[System]:
    systems, problems = [], []
    for name in dict.fromkeys(names):
        try:
            systems.append(_system(name, wishes, drawing))
        except ValueError as error:
            known = ["base", *(["base+min-p"] if drawing else []), *wishes]
            problems.append(f"{name!r}{nearest(name, known)} (known: {', '.join(known)}, or a control: {error})")
    if problems:
        raise EvaluationError("systems that are none:\n  " + "\n  ".join(problems))
    return systems


def _system(name: str, wishes: Mapping[str, Callable[[str, int], Control]], drawing: Mapping[str, Any]) -> System:
    if name == "base":
        return System(name)
    if name == "base+min-p" and drawing:
        return System(name, drawing=drawing)
    if name in wishes:
        return System(name, lambda meta: wishes[name](meta["wish"], meta["target"]), drawing)
    control = parse_control(name)
    return System(name, None if control is None else lambda meta: control, drawing)


def betas(tiny: bool) -> tuple[float, ...]:
    """Strengths of the tilt to compare: the paper's, or what matters where completions have a tenth of its lengths."""
    return (-2, -5, -10, -20) if tiny else (-20, -50, -100, -1000)
