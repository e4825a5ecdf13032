"""A length constraint: what a prompt demands of the length of its answer."""

from typing import Literal, get_args

Constraint = Literal["equal to", "at most", "at least"]
CONSTRAINTS: tuple[Constraint, ...] = get_args(Constraint)
