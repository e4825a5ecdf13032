"""LIFEBench, token variant: how well a wish for a length was met (Zhang et al., section on length control)."""

import math
from typing import Literal

LengthControl = Literal["equal to", "at most", "at least"]
CONTROLS: tuple[LengthControl, ...] = ("equal to", "at most", "at least")
_TOO_SHORT, _TOO_LONG = 5.0, 2.0  # how fast the score falls with the deviation


def length_deviation(n: float, target: int) -> float:
    """Return LD = (n - target) / target for ``n`` tokens written.

    Raises:
        ValueError: the target is not positive.
    """
    if target < 1:
        raise ValueError(f"the target must be at least 1 token, got {target}")
    return (n - target) / target


def length_score(n: float, target: int, control: LengthControl) -> float:
    """Return LS in [0, 100]: 100 where the wish was met, else exp(5 LD) or exp(-2 LD) of it.

    Too few tokens count under "equal to" and "at least", too many under "equal to" and "at most".

    Args:
        n: tokens written.
        target: tokens wished for.
        control: the wish.

    Raises:
        ValueError: the target is not positive, or an unknown control.
    """
    if control not in CONTROLS:
        raise ValueError(f"control must be one of {', '.join(CONTROLS)}; got {control!r}")
    deviation = length_deviation(n, target)
    if deviation < 0 and control != "at most":
        return 100 * math.exp(_TOO_SHORT * deviation)
    if deviation > 0 and control != "at least":
        return 100 * math.exp(-_TOO_LONG * deviation)
    return 100.0
