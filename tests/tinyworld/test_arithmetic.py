import re
from random import Random

from sums import assert_solutions_are_right, assert_sums_are_right

from lenvm_lightning.tinyworld import arithmetic


def test_solutions_are_right():
    assert_solutions_are_right(arithmetic)


def test_drills_are_right():
    for seed in range(100):
        question, answer = arithmetic.draw_drill(Random(seed))
        assert len(re.findall(r" = ", answer)) == question.count(",") + 1
        assert_sums_are_right(answer)


def test_story_follows_its_steps():
    for seed in range(100):
        problem = arithmetic.draw_problem(Random(seed))
        quantity = problem.start
        for step in problem.steps:
            assert step.before == quantity
            assert step.sentence in problem.prompt
            quantity = step.after
        assert problem.answer == str(quantity)
        assert problem.hint in problem.prompt
        assert problem.aside[1] in problem.prompt
