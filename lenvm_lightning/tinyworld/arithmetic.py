r"""Arithmetic stories and their solutions, drawn at random.

A story is a quantity that changes in 2 to 5 steps, so its answer is known. One story has many right solutions:
every step is told tersely, normally or verbosely, and may be followed by detours, so that the number of words still
to come is uncertain at each point, yet partly predictable from the question and from the style seen so far.
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
INSTRUCTION = "Think step by step and write the final answer in \\boxed{}."


@dataclass(frozen=True)
class Step:
    """One change of the quantity: `before` `sign` `operand` = `after`, and the sentence of the story that says so."""

    sentence: str
    before: int
    sign: str
    operand: int
    after: int
    unit: str

    @property
    def equation(self) -> str:
        """The step as a formula, for example `12 + 5 = 17`."""
        return f"{self.before} {self.sign} {self.operand} = {self.after}"


@dataclass(frozen=True)
class Problem:
    """A story with its question; the answer is what the last step leaves."""

    name: str
    pronoun: str
    start: int
    unit: str
    steps: tuple[Step, ...]
    question: str

    @property
    def answer(self) -> str:
        """The number asked for."""
        return str(self.steps[-1].after)

    @property
    def prompt(self) -> str:
        """The whole text a model is asked."""
        story = " ".join(step.sentence for step in self.steps)
        return f"{self.name} has {self.start} {self.unit}. {story} {self.question}\n{INSTRUCTION}"


def draw_problem(rng: Random) -> Problem:
    """Draw a story of 2 to 5 steps."""
    pronoun = rng.choice(sorted(NAMES))
    name, unit = rng.choice(NAMES[pronoun]), rng.choice(THINGS)
    start = quantity = rng.randint(4, 40)
    count = rng.choice((2, 2, 3, 3, 4, 5))
    steps = []
    for index in range(count):
        last = index == count - 1
        steps.append(_draw_step(rng, pronoun.capitalize(), quantity, unit, last))
        quantity = steps[-1].after
    last_unit = steps[-1].unit
    if last_unit == "dollars":
        question = f"How many dollars does {name} get?"
    elif last_unit == "boxes":
        question = f"How many boxes does {name} need?"
    else:
        question = f"How many {unit} does {name} have now?"
    return Problem(name, pronoun, start, unit, tuple(steps), question)


def _draw_step(rng: Random, who: str, quantity: int, unit: str, last: bool) -> Step:
    """Draw what `who` does with `quantity` things; selling and packing end a story, for they change the unit."""
    place = rng.choice(PLACES)
    divisors = [n for n in range(2, 11) if quantity % n == 0 and quantity > n]
    changes = ["buy", "find"]
    if quantity > 4:
        changes += ["give", "lose"]
    if quantity <= 60:
        changes.append("times")
    if last:
        changes += ["sell"] + ["pack"] * bool(divisors)
    change = rng.choice(changes)
    if change in ("buy", "find"):
        k = rng.randint(2, 30)
        verb = "buys" if change == "buy" else "finds"
        return Step(f"{who} {verb} {k} more {unit} {place}.", quantity, "+", k, quantity + k, unit)
    if change in ("give", "lose"):
        k = rng.randint(2, min(quantity - 1, 30))
        action = f"gives {k} {unit} to a friend" if change == "give" else f"loses {k} {unit}"
        return Step(f"{who} {action} {place}.", quantity, "-", k, quantity - k, unit)
    if change == "times":
        k = rng.choice((2, 2, 3))
        word = "twice" if k == 2 else "three times"
        sentence = f"After some work {who.lower()} has {word} as many {unit} as before."
        return Step(sentence, quantity, "*", k, quantity * k, unit)
    if change == "sell":
        k = rng.randint(2, 9)
        return Step(f"{who} sells all the {unit} for {k} dollars each.", quantity, "*", k, quantity * k, "dollars")
    k = rng.choice(divisors)
    return Step(f"{who} packs the {unit} in boxes of {k}.", quantity, "/", k, quantity // k, "boxes")


def draw_solution(rng: Random, problem: Problem) -> str:
    r"""Draw a right solution of `problem`, ending in `\boxed{answer}`."""
    style = rng.choices(STYLES, weights=(38, 54, 8))[0]
    # How likely a detour is after each step; large numbers make doubts more likely.
    large = max(step.after for step in problem.steps) > 60
    doubt = rng.choices((0.0, 0.15, 0.45), weights=(40, 45, 15) if large else (75, 20, 5))[0]
    parts = [_opening(rng, problem, style)]
    for index, step in enumerate(problem.steps):
        if rng.random() < 0.06:
            style = rng.choice(STYLES)
        parts.append(_tell(rng, problem, step, index, style))
        while rng.random() < doubt:  # doubts may follow one another: the long tail of the lengths
            parts.append(_detour(rng, step))
    if style == "verbose" and rng.random() < 0.5:
        parts.append("Let me go through it once more. " + ", then ".join(s.equation for s in problem.steps) + ".\n")
    parts.append(_closing(rng, problem, style))
    return "".join(parts).strip()


def _opening(rng: Random, problem: Problem, style: str) -> str:
    """Draw the words before the first step."""
    if style == "terse":
        return ""
    if style == "normal":
        return rng.choice(("", f"{problem.name} starts with {problem.start} {problem.unit}.\n", "Let's solve this.\n"))
    return rng.choice((
        f"Let's solve this problem step by step.\n\nAt the beginning, {problem.name} has {problem.start} "
        f"{problem.unit}. We need to follow what happens to this number.\n\n",
        f"First, we need to understand the question. We know that {problem.name} has {problem.start} "
        f"{problem.unit} at the start, and then the number changes {len(problem.steps)} times.\n\n",
    ))  # fmt: skip


def _tell(rng: Random, problem: Problem, step: Step, index: int, style: str) -> str:
    """Tell one step in `style`."""
    if style == "terse":
        return rng.choice((f"{step.equation}. ", f"{step.equation}\n"))
    if style == "normal":
        return rng.choice((
            f"{step.sentence} So there are {step.equation} {step.unit}.\n",
            f"Then {problem.pronoun} has {step.equation} {step.unit}.\n",
            f"After step {index + 1}: {step.equation} {step.unit}.\n",
        ))  # fmt: skip
    rule = {
        "+": f"we add {step.operand} to {step.before}",
        "-": f"we subtract {step.operand} from {step.before}",
        "*": f"we multiply {step.before} by {step.operand}",
        "/": f"we divide {step.before} by {step.operand}",
    }[step.sign]
    remark = f" Now we know that the number is {step.after}." if rng.random() < 0.3 else ""
    return f"**Step {index + 1}:** {step.sentence} So {rule} and get {step.equation} {step.unit}.{remark}\n\n"


def _detour(rng: Random, step: Step) -> str:
    """Draw a check of `step` that changes nothing."""
    inverse = {"+": "-", "-": "+", "*": "/", "/": "*"}[step.sign]
    back = f"{step.after} {inverse} {step.operand} = {step.before}"
    return rng.choice((
        f"Wait, let me check that. {back}, so it is right.\n",
        f"Hmm, is {step.equation} correct? Going back, {back}. Yes, it is correct.\n",
        f"Hmm, let me think again. The number was {step.before}, and now it is {step.after}. That is fine.\n",
        "Wait, did I read the problem correctly? Yes.\n",
    ))  # fmt: skip


def _closing(rng: Random, problem: Problem, style: str) -> str:
    """Draw the sentence that gives the answer."""
    box = f"\\boxed{{{problem.answer}}}"
    if style == "terse":
        return rng.choice((box, f"Answer: {box}"))
    if style == "normal":
        return rng.choice((f"So the answer is {box}.", f"The answer is {box}."))
    return f"Therefore, after all the steps, the final number of {problem.steps[-1].unit} is {problem.answer}. " + (
        f"The final answer is {box}."
    )
