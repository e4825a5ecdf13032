r"""Arithmetic stories and their solutions, drawn at random.

A story is a quantity that changes in 2 to 5 steps, so its answer is known. One story has many right solutions: every
step is told tersely, normally or verbosely, the style may switch at any step, and detours and fresh starts may follow,
so that the number of words still to come is uncertain at each point, yet partly predictable from the question, from
the hint that may stand in it, and from the style seen so far. Numbers stay at most `LARGEST`: a model of a million
parameters learns these sums, and no larger ones.
"""

from dataclasses import dataclass
from random import Random

NAMES = {
    "he": ("Ben", "David", "Frank", "Henry", "Jack", "Leo", "Nick", "Paul", "Sam", "Tom", "Victor", "James"),
    "she": ("Anna", "Carla", "Emma", "Grace", "Ivy", "Kate", "Mary", "Olivia", "Rosa", "Lily", "Wendy", "Sarah"),
}
THINGS = ("apples", "oranges", "books", "pencils", "marbles", "stickers", "cookies", "eggs", "flowers", "coins",
          "cards", "shells", "stamps", "balloons", "candies", "tickets")  # fmt: skip
PLACES = ("at the store", "on Monday", "in the morning", "after school", "at the market", "on the weekend", "today")
STYLES = ("terse", "normal", "verbose")
LARGEST = 20
LARGEST_OPERAND = 5
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

# A hint in the question, how often it is given, and the weights of the three styles under it.
_HINTS = {
    "": (5, (44, 26, 30)),
    "Answer briefly.": (2, (76, 15, 9)),
    "Explain every step in detail.": (2, (4, 26, 70)),
}
_SWITCH = 0.25  # chance that a step draws its style anew
_DETOURS = ((0.0, 0.12, 0.45), (48, 32, 20))  # chance of a detour after each step, drawn once for a solution


@dataclass(frozen=True)
class SolutionStep:
    """One change of the quantity: `before` `sign` `operand` = `after`, and the sentence of the story that says so."""

    sentence: str
    before: int
    sign: str
    operand: int
    after: int

    @property
    def equation(self) -> str:
        """The step as a formula, for example `12 + 5 = 17`."""
        return f"{self.before} {self.sign} {self.operand} = {self.after}"


@dataclass(frozen=True)
class ArithmeticProblem:
    """A story with its question; the answer is what the last step leaves.

    Attributes:
        name: whose things they are.
        pronoun: he or she.
        start: how many there are at first.
        unit: what they are.
        steps: the changes.
        aside: a sentence with a number that does not matter, or an empty string, and the step it stands before.
        hint: one of the hints about the length of the answer, or an empty string.
    """

    name: str
    pronoun: str
    start: int
    unit: str
    steps: tuple[SolutionStep, ...]
    aside: tuple[int, str] = (0, "")
    hint: str = ""

    @property
    def answer(self) -> str:
        """The number asked for."""
        return str(self.steps[-1].after)

    @property
    def content(self) -> str:
        """The story without hint and aside, by which equal problems are known as equal."""
        return f"{self.start} {self.unit}. " + " ".join(step.sentence for step in self.steps)

    @property
    def prompt(self) -> str:
        """The whole text a model is asked."""
        sentences = [step.sentence for step in self.steps]
        if self.aside[1]:
            sentences.insert(*self.aside)
        question = f"How many {self.unit} does {self.name} have now?"
        story = " ".join((f"{self.name} has {self.start} {self.unit}.", *sentences, question, self.hint))
        return f"{INSTRUCTION}\n\n{story.strip()}"


def draw_problem(rng: Random) -> ArithmeticProblem:
    """Draw a story of 2 to 5 steps."""
    pronoun = rng.choice(sorted(NAMES))
    name, unit = rng.choice(NAMES[pronoun]), rng.choice(THINGS)
    start = quantity = rng.randint(2, 12)
    steps = []
    for _ in range(rng.choice((2, 2, 3, 3, 4, 5))):
        steps.append(_draw_step(rng, pronoun.capitalize(), quantity, unit))
        quantity = steps[-1].after
    aside = (0, "")
    if rng.random() < 0.15:
        other, things = rng.choice(NAMES["he"] + NAMES["she"]), rng.choice(THINGS)
        text = f"{other} has {rng.randint(2, 9)} {things}." if other != name else f"It is {rng.randint(2, 9)} o'clock."
        aside = (rng.randrange(len(steps)), text)
    hint = rng.choices(list(_HINTS), weights=[often for often, _ in _HINTS.values()])[0]
    return ArithmeticProblem(name, pronoun, start, unit, tuple(steps), aside, hint)


def _draw_step(rng: Random, who: str, quantity: int, unit: str) -> SolutionStep:
    """Draw what `who` does with `quantity` things."""
    place = rng.choice(PLACES)
    changes = ["buy", "find"] * (quantity < LARGEST) + ["give", "lose"] * (quantity > 2)
    changes += ["double"] * (quantity <= LARGEST // 2) + ["halve"] * (quantity % 2 == 0)
    change = rng.choice(changes)
    if change in ("buy", "find"):
        k = rng.randint(1, min(LARGEST_OPERAND, LARGEST - quantity))
        verb = "buys" if change == "buy" else "finds"
        return SolutionStep(f"{who} {verb} {k} more {unit} {place}.", quantity, "+", k, quantity + k)
    if change in ("give", "lose"):
        k = rng.randint(1, min(LARGEST_OPERAND, quantity - 1))
        action = f"gives {k} {unit} to a friend" if change == "give" else f"loses {k} {unit}"
        return SolutionStep(f"{who} {action} {place}.", quantity, "-", k, quantity - k)
    if change == "double":
        return SolutionStep(f"Then {who.lower()} has twice as many {unit} as before.", quantity, "*", 2, quantity * 2)
    return SolutionStep(f"{who} keeps half of the {unit}.", quantity, "/", 2, quantity // 2)


def draw_solution(rng: Random, problem: ArithmeticProblem) -> str:
    r"""Draw a right solution of `problem`, ending in `\boxed{answer}`."""
    steps, style = draw_steps(rng, problem)
    return (steps + draw_closing(rng, problem, style)).strip()


def draw_steps(rng: Random, problem: ArithmeticProblem) -> tuple[str, str]:
    """Draw all of a right solution but the sentence that gives the answer, and the style that it ends in."""
    weights = _HINTS[problem.hint][1]
    style = rng.choices(STYLES, weights=weights)[0]
    detour = 0.0 if style == "terse" and rng.random() < 0.5 else rng.choices(*_DETOURS)[0]
    parts = [_opening(rng, problem, style)]
    for index, step in enumerate(problem.steps):
        if rng.random() < _SWITCH:
            style = rng.choices(STYLES, weights=weights)[0]
        parts.append(_tell(rng, problem, step, index, style))
        while rng.random() < detour:  # doubts may follow one another: the long tail of the lengths
            parts.append(_detour(rng, step))
    while rng.random() < detour * 0.6:
        parts.append(_fresh_start(rng, problem))
    return "".join(parts), style


def draw_drill(rng: Random) -> tuple[str, str]:
    """Draw a row of sums, so that calculating is seen more often than stories alone would show it."""
    sums = []
    for _ in range(rng.randint(4, 10)):
        step = _draw_step(rng, "She", rng.randint(1, LARGEST), "apples")
        sums.append(step)
    asked = ", ".join(f"{step.before} {step.sign} {step.operand}" for step in sums)
    return f"Calculate: {asked}.", " ".join(f"{step.equation}." for step in sums)


def _opening(rng: Random, problem: ArithmeticProblem, style: str) -> str:
    """Draw the words before the first step."""
    if style == "terse":
        return ""
    if style == "normal":
        return rng.choice(("", f"{problem.name} starts with {problem.start} {problem.unit}.\n", "Let's solve this.\n"))
    return rng.choice((
        f"Let's solve this problem step by step.\n\nAt the beginning, {problem.name} has {problem.start} "
        f"{problem.unit}. We need to follow what happens to this number.\n\n",
        f"First, we need to understand the question. We know that {problem.name} has {problem.start} "
        f"{problem.unit} at the start, and then the number changes.\n\n",
    ))  # fmt: skip


def _tell(rng: Random, problem: ArithmeticProblem, step: SolutionStep, index: int, style: str) -> str:
    """Tell one step in `style`."""
    if style == "terse":
        return f"{step.equation}. "
    if style == "normal":
        return rng.choice((
            f"{step.sentence} So there are {step.equation} {problem.unit}.\n",
            f"Then {problem.pronoun} has {step.equation} {problem.unit}.\n",
            f"After step {index + 1}: {step.equation} {problem.unit}.\n",
        ))  # fmt: skip
    rule = {
        "+": f"we add {step.operand} to {step.before}",
        "-": f"we subtract {step.operand} from {step.before}",
        "*": f"we multiply {step.before} by {step.operand}",
        "/": f"we divide {step.before} by {step.operand}",
    }[step.sign]
    remark = f" Now we know that the number is {step.after}." if rng.random() < 0.3 else ""
    return f"**Step {index + 1}:** {step.sentence} So {rule} and get {step.equation} {problem.unit}.{remark}\n\n"


def _detour(rng: Random, step: SolutionStep) -> str:
    """Draw a check of `step` that changes nothing."""
    inverse = {"+": "-", "-": "+", "*": "/", "/": "*"}[step.sign]
    back = f"{step.after} {inverse} {step.operand} = {step.before}"
    return rng.choice((
        f"Wait, let me check that. {back}, so it is right.\n",
        f"Hmm, is {step.equation} correct? Going back, {back}. Yes, it is correct.\n",
        f"Hmm, let me think again. The number was {step.before}, and now it is {step.after}. That is fine.\n",
        "Wait, did I read the problem correctly? Yes.\n",
    ))  # fmt: skip


def _fresh_start(rng: Random, problem: ArithmeticProblem) -> str:
    """Draw a second run through all the steps."""
    opening = rng.choice(("Wait, let me start again.", "Maybe I should go through it once more."))
    return f"{opening} " + " ".join(f"{step.equation}." for step in problem.steps) + "\n"


def draw_closing(rng: Random, problem: ArithmeticProblem, style: str) -> str:
    """Draw the sentence that gives the answer."""
    box = f"\\boxed{{{problem.answer}}}"
    if style == "terse":
        return box
    if style == "normal":
        return rng.choice((f"So the answer is {box}.", f"The answer is {box}."))
    return f"Therefore, after all the steps, the final number of {problem.unit} is {problem.answer}. " + (
        f"The final answer is {box}."
    )
