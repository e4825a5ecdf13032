"""Solutions whose sums are right."""

import re
from random import Random

from lenvm_lightning.tinyworld.arithmetic import LARGEST


def assert_solutions_are_right(module) -> None:
    """Those that ``arithmetic`` or ``shapes`` draws."""
    for seed in range(300):
        rng = Random(seed)
        problem = module.draw_problem(rng)
        solution = module.draw_solution(rng, problem)
        assert solution.count("\\boxed{") == 1
        assert f"\\boxed{{{problem.answer}}}" in solution
        assert_sums_are_right(solution)


def assert_sums_are_right(text: str) -> None:
    for left, sign, right, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", text):
        a, b, c = int(left), int(right), int(result)
        assert {"+": a + b, "-": a - b, "*": a * b, "/": a / (b or 1)}[sign] == c
        assert 0 <= c <= LARGEST
