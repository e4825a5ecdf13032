r"""Stories whose solution is thought out between marks: `<think>`, the steps, `</think>`, and then the answer.

The stories are those of `arithmetic`, asked for in another way, so that a problem is for testing here where it is so
there. The models that ship have never seen these marks: `benchmarks/segments.py` trains one that has.
"""

from dataclasses import dataclass
from random import Random

from . import arithmetic
from .arithmetic import INSTRUCTION, ArithmeticProblem

BEGIN, END = "<think>", "</think>"
_INSTRUCTION = f"Think step by step between {BEGIN} and {END}, then put your final answer within \\boxed{{}}."


@dataclass(frozen=True)
class ThinkingProblem:
    """A story that is to be thought about first.

    Attributes:
        story: with its answer.
    """

    story: ArithmeticProblem

    @property
    def answer(self) -> str:
        """The number asked for."""
        return self.story.answer

    @property
    def content(self) -> str:
        """That of the story."""
        return self.story.content

    @property
    def prompt(self) -> str:
        """The whole text a model is asked."""
        return self.story.prompt.replace(INSTRUCTION, _INSTRUCTION, 1)


def draw_problem(rng: Random) -> ThinkingProblem:
    """Draw a story of 2 to 5 steps."""
    return ThinkingProblem(arithmetic.draw_problem(rng))


def draw_solution(rng: Random, problem: ThinkingProblem) -> str:
    r"""Draw a right solution: the steps between the marks, then a sentence with `\boxed{answer}`."""
    steps, style = arithmetic.draw_steps(rng, problem.story)
    return f"{BEGIN}\n{steps.strip()}\n{END}\n{arithmetic.draw_closing(rng, problem.story, style)}"
