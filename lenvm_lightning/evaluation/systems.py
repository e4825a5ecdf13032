"""Systems by the names that people type: `base`, `ours`, `paper`, `tilt:-5`."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import EvaluationError, nearest
from ..rollouts.constraint import Constraint
from .rivals import Rival
from .samples import System

if TYPE_CHECKING:
    from ..guidance import Control

GUIDED_MIN_P = 0.01  # of the paper's trade-off, for guided systems alone
Controls = Mapping[str, Callable[[Constraint, int], "Control"]]
"""The control of a system by its name, for a prompt with this length constraint and target length."""


def constraint_systems(names: Sequence[str], sampling: Mapping[str, Any] | None = None) -> list[System]:
    """Systems that are given the length constraint of their prompt.

    Prompts say it in their meta: `constraint`, and `target` in tokens.

    Args:
        names: `base`, `ours`, `paper`, `paper-equal`, `soft`, or a control that is the same for all prompts.
        sampling: settings in which guided systems differ from `base`.

    Raises:
        EvaluationError: a name that means nothing.
    """
    return _systems(names, _constraint_controls(), dict(sampling or {}), unguided={})


def budget_systems(names: Sequence[str]) -> list[System]:
    """Systems whose length has a price: `base`, `base+min-p` (sampled as the guided ones are), rivals, and controls.

    Raises:
        EvaluationError: a name that means nothing.
    """
    sampling = {"min_p": GUIDED_MIN_P}
    return _systems(names, {}, sampling, unguided={"base+min-p": sampling}, rivals=True)


def _constraint_controls() -> Controls:
    from ..guidance import AtLeast, AtMost, EqualTo  # needs torch, which a command line should not wait for

    by_constraint: dict[Constraint, Any] = {"equal to": EqualTo, "at most": AtMost, "at least": AtLeast}

    def soft(constraint: Constraint, target: int) -> "Control":
        return EqualTo(target, mode="soft") if constraint == "equal to" else by_constraint[constraint](target)

    return {
        "ours": lambda constraint, target: by_constraint[constraint](target),
        "paper": lambda constraint, target: by_constraint[constraint](target, mode="hard"),
        # What the published run did: equal to, whatever the prompt asks for.
        "paper-equal": lambda constraint, target: EqualTo(target, mode="hard"),
        "soft": soft,
    }


def _systems(
    names: Sequence[str],
    controls: Controls,
    sampling: dict[str, Any],
    unguided: Mapping[str, dict[str, Any]],
    rivals: bool = False,
) -> list[System]:
    systems, problems = [], []
    for name in dict.fromkeys(names):
        try:
            rival = Rival.parse(name) if rivals else None
            systems.append(System(name, rival=rival) if rival else _system(name, controls, sampling, unguided))
        except ValueError as error:
            known = ["base", *unguided, *controls, *(["countdown:N", "feedback:N"] if rivals else [])]
            problems.append(f"{name!r}{nearest(name, known)} (known: {', '.join(known)}, or a control: {error})")
    if problems:
        raise EvaluationError("systems that are none:\n  " + "\n  ".join(problems))
    return systems


def _system(name: str, controls: Controls, sampling: dict[str, Any], unguided: Mapping[str, dict[str, Any]]) -> System:
    if name == "base":
        return System(name)
    if name in unguided:
        return System(name, sampling=unguided[name])
    if name in controls:
        return System(name, lambda meta: controls[name](meta["constraint"], meta["target"]), sampling)
    from ..decoding.control_text import parse_control

    control = parse_control(name)
    return System(name, None if control is None else lambda meta: control, sampling)
