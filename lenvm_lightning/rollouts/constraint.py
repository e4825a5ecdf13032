"""A length constraint: what a prompt demands of the length of its answer, and how well an answer meets it.

The scores are those of LIFEBench (Zhang et al., section on length control).
"""

import math
from typing import Literal, get_args

Constraint = Literal["equal to", "at most", "at least"]
CONSTRAINTS: tuple[Constraint, ...] = get_args(Constraint)
_TOO_SHORT, _TOO_LONG = 5.0, 2.0  # how fast the score falls with the deviation


def length_deviation(n: float, target: int) -> float:
    """Return LD = (n - target) / target for `n` tokens written.

    Raises:
        ValueError: the target is not positive.
    """
    if target < 1:
        raise ValueError(f"the target must be at least 1 token, got {target}")
    return (n - target) / target


def length_score(n: float, target: int, constraint: Constraint) -> float:
    """Return LS in [0, 100]: 100 where the constraint was met, else exp(5 LD) or exp(-2 LD) of it.

    Too few tokens count under "equal to" and "at least", too many under "equal to" and "at most".

    Args:
        n: tokens written.
        target: the target length.
        constraint: what was demanded.

    Raises:
        ValueError: the target is not positive, or an unknown constraint.
    """
    if constraint not in CONSTRAINTS:
        raise ValueError(f"constraint must be one of {', '.join(CONSTRAINTS)}; got {constraint!r}")
    deviation = length_deviation(n, target)
    if deviation < 0 and constraint != "at most":
        return 100 * math.exp(_TOO_SHORT * deviation)
    if deviation > 0 and constraint != "at least":
        return 100 * math.exp(-_TOO_LONG * deviation)
    return 100.0
