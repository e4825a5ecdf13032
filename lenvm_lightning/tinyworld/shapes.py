r"""Pictures of coloured shapes, questions about them and their solutions, drawn at random.

The shapes stand on a grid whose cells are 28 pixels wide, which is one image token of the tiny vision model. A solution
goes through the shapes seen, so that its length depends on the picture and not only on the words of the question.
"""

from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

CELL = 28  # pixels: 2 x 2 merged patches of 14
COLORS = {"red": (220, 40, 40), "blue": (40, 70, 220), "green": (40, 170, 60), "yellow": (235, 200, 30)}
KINDS = ("circle", "square", "triangle")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
STYLES = ("terse", "normal", "verbose")
INSTRUCTION = "Look at the picture and write the final answer in \\boxed{}."


@dataclass(frozen=True)
class Shape:
    """A coloured shape in the cell (`row`, `column`) of the grid."""

    color: str
    kind: str
    row: int
    column: int

    @property
    def name(self) -> str:
        """For example `red circle`."""
        return f"{self.color} {self.kind}"


@dataclass(frozen=True)
class Problem:
    """A picture of `grid` x `grid` cells with a question; `target` holds the words counted (none: all shapes)."""

    grid: int
    shapes: tuple[Shape, ...]
    question: str
    target: tuple[str, ...]

    @property
    def answer(self) -> str:
        """A number, or for two targets the colour there is more of, or `equal`."""
        counts = [count(self.shapes, word) for word in self.target]
        if len(counts) == 2:
            return "equal" if counts[0] == counts[1] else self.target[counts[1] > counts[0]]
        return str(counts[0] if counts else len(self.shapes))

    @property
    def prompt(self) -> str:
        """The whole text a model is asked, where `<image>` stands for the picture."""
        return f"<image>{self.question} {INSTRUCTION}"


def count(shapes: tuple[Shape, ...], word: str) -> int:
    """Count the shapes of the colour or kind `word`."""
    return sum(word in (shape.color, shape.kind) for shape in shapes)


def draw_problem(rng: Random) -> Problem:
    """Draw 1 to 9 shapes and a question about them."""
    grid = rng.choice((3, 4))
    cells = sorted(rng.sample(range(grid * grid), rng.randint(1, 9)))
    colors = rng.sample(sorted(COLORS), rng.randint(2, 3))
    shapes = tuple(Shape(rng.choice(colors), rng.choice(KINDS), cell // grid, cell % grid) for cell in cells)
    form = rng.choice(("all", "color", "kind", "more"))
    if form == "all":
        return Problem(grid, shapes, "How many shapes are there in the picture?", ())
    if form == "color":
        return Problem(grid, shapes, f"How many {colors[0]} shapes are there?", (colors[0],))
    if form == "kind":
        kind = rng.choice(KINDS)
        return Problem(grid, shapes, f"How many {kind}s are there in the picture?", (kind,))
    question = f"Which color is there more of, {colors[0]} or {colors[1]}? If there are as many, answer equal."
    return Problem(grid, shapes, question, (colors[0], colors[1]))


def paint(problem: Problem) -> Image.Image:
    """Paint the picture, RGB of `grid` x 28 pixels a side."""
    side = problem.grid * CELL
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    for shape in problem.shapes:
        left, top = shape.column * CELL + 4, shape.row * CELL + 4
        right, bottom = left + CELL - 9, top + CELL - 9
        color = COLORS[shape.color]
        if shape.kind == "circle":
            pen.ellipse((left, top, right, bottom), fill=color)
        elif shape.kind == "square":
            pen.rectangle((left, top, right, bottom), fill=color)
        else:
            pen.polygon(((left, bottom), (right, bottom), ((left + right) / 2, top)), fill=color)
    return image


def draw_solution(rng: Random, problem: Problem) -> str:
    r"""Draw a right solution of `problem`, ending in `\boxed{answer}`."""
    style = rng.choices(STYLES, weights=(25, 60, 15))[0]
    doubt = rng.choices((0.0, 0.3), weights=(88, 12))[0]
    text = _enumerate(rng, problem, style)
    while rng.random() < doubt:  # a second look lists everything once more
        text += rng.choice(("\nWait, let me look again. ", "\nHmm, let me check. ")) + _enumerate(rng, problem, "terse")
    return text + _closing(rng, problem, style)


def _enumerate(rng: Random, problem: Problem, style: str) -> str:
    """Go through what is seen; in the terse style only through the shapes asked for."""
    shapes = problem.shapes
    if style == "terse":
        asked = [s for s in shapes if not problem.target or {s.color, s.kind} & set(problem.target)]
        return ", ".join(s.name for s in asked) + "." if asked else "None."
    if style == "normal" and rng.random() < 0.5:
        text = "".join(f"{number}. {s.name}\n" for number, s in enumerate(shapes, start=1))
    elif style == "normal":
        opening = rng.choice(("I see ", "The picture shows ", "There is "))
        text = opening + ", ".join(f"a {s.name}" for s in shapes) + ". "
    else:
        text = "Let me look at the picture and go through the shapes one by one.\n"
        counts = dict.fromkeys(problem.target or ("shape",), 0)
        place = rng.random() < 0.3
        for ordinal, shape in zip(ORDINALS, shapes, strict=False):
            text += f"The {ordinal} is a {shape.name}" + f" in row {shape.row + 1}" * place
            hit = next((word for word in counts if word in (shape.color, shape.kind, "shape")), None)
            if hit is not None:
                counts[hit] += 1
                text += f", so {hit} has count {counts[hit]}"
            text += ".\n"
    tally = [f"{count(shapes, word)} {word}" for word in problem.target] or [f"{len(shapes)} in total"]
    return text + f"That makes {' and '.join(tally)}."


def _closing(rng: Random, problem: Problem, style: str) -> str:
    """Draw the sentence that gives the answer."""
    box = f"\\boxed{{{problem.answer}}}"
    if style == "terse":
        return rng.choice((f" {box}", f" Answer: {box}"))
    if style == "normal":
        return rng.choice((f" So the answer is {box}.", f" The answer is {box}."))
    return f"\n\nNow I have seen all the shapes in the picture. Therefore, the final answer is {box}."
