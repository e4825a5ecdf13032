r"""Images of coloured shapes and digits, questions about them and their solutions, drawn at random.

The things stand in the cells of a grid, 28 pixels wide, which is one image token of the tiny vision model; large shapes
reach into their neighbours' cells. A solution goes through what is seen, so that its length depends on the image, on
the question and on the hint that may stand in it.
"""

from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

CELL = 28  # pixels: 2 x 2 merged patches of 14
COLORS = {"red": (220, 40, 40), "blue": (40, 70, 220), "green": (40, 170, 60), "yellow": (235, 200, 30)}
KINDS = ("circle", "square", "triangle")
SIZES = {"small": 7, "large": 14}  # half a side in pixels; large ones touch and overlap their neighbours
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
STYLES = ("terse", "normal", "verbose")
INSTRUCTION = "Put your final answer within \\boxed{}."

_HINTS = {
    "": (4, (20, 60, 20)),
    "Answer briefly.": (2, (94, 5, 1)),
    "Describe everything in detail.": (2, (1, 14, 85)),
}
_DETOURS = ((0.0, 0.15, 0.5), (70, 20, 10))  # chance of a second look, drawn once for a solution
# A digit's strokes: top, the two upper sides, middle, the two lower sides, bottom. Drawn here and not with a font, so
# that every machine paints the same pixels.
_STROKES = {"0": "1110111", "1": "0010010", "2": "1011101", "3": "1011011", "4": "0111010",
            "5": "1101011", "6": "1101111", "7": "1010010", "8": "1111111", "9": "1111011"}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """A coloured shape, or a digit, in the cell (`row`, `column`) of the grid."""

    color: str
    kind: str
    size: str
    row: int
    column: int

    @property
    def name(self) -> str:
        """For example `large red circle`; a digit is its own name."""
        return self.kind if self.kind.isdigit() else f"{self.size} {self.color} {self.kind}"

    def matches(self, word: str) -> bool:
        """Whether `word` is its colour, its kind or its size."""
        return word in (self.color, self.kind, self.size)


@dataclass(frozen=True)
class ShapesProblem:
    """An image of `grid` x `grid` cells with a question.

    Attributes:
        grid: cells a side.
        things: what the image shows, in reading order.
        form: ``count`` (of what matches ``target``; all shapes if empty), ``more`` (of two colours), ``sum`` (digits).
        target: the words that the question is about.
        hint: one of the hints about the length of the answer, or an empty string.
    """

    grid: int
    things: tuple[Thing, ...]
    form: str
    target: tuple[str, ...] = ()
    hint: str = ""

    @property
    def answer(self) -> str:
        """A number, or the colour there is more of, or `equal`."""
        if self.form == "sum":
            return str(sum(int(thing.kind) for thing in self.things))
        counts = [count(self.things, word) for word in self.target]
        if self.form == "more":
            return "equal" if counts[0] == counts[1] else self.target[counts[1] > counts[0]]
        return str(counts[0] if counts else len(self.things))

    @property
    def question(self) -> str:
        """What is asked about the image."""
        if self.form == "sum":
            return "What is the sum of the digits?"
        if self.form == "more":
            return f"Which color is there more of, {self.target[0]} or {self.target[1]}, or are they equal?"
        if not self.target:
            return "How many shapes are there?"
        word = self.target[0]
        return f"How many {word}s are there?" if word in KINDS else f"How many {word} shapes are there?"

    @property
    def content(self) -> str:
        """What makes a problem the same as another: the image and the question."""
        return f"{self.grid} {self.things} {self.question}"

    @property
    def prompt(self) -> str:
        """The whole text a model is asked, where `<image>` stands for the image."""
        return f"<image>{self.question} {INSTRUCTION} {self.hint}".strip()


def count(things: tuple[Thing, ...], word: str) -> int:
    """Count the things whose colour, kind or size is `word`."""
    return sum(thing.matches(word) for thing in things)


def draw_problem(rng: Random) -> ShapesProblem:
    """Draw 1 to 9 shapes, or 2 to 4 digits, and a question about them."""
    grid = rng.choice((3, 4))
    form = rng.choices(("count", "more", "sum"), weights=(60, 20, 20))[0]
    number = rng.randint(2, 4) if form == "sum" else rng.randint(1, 9)
    cells = sorted(rng.sample(range(grid * grid), number))
    colors = rng.sample(sorted(COLORS), rng.randint(2, 3))
    hint = rng.choices(list(_HINTS), weights=[often for often, _ in _HINTS.values()])[0]

    def thing(cell: int) -> Thing:
        kind = str(rng.randint(0, 5)) if form == "sum" else rng.choice(KINDS)
        return Thing(rng.choice(colors), kind, rng.choice(tuple(SIZES)), cell // grid, cell % grid)

    things = tuple(thing(cell) for cell in cells)
    target: tuple[str, ...] = ()
    if form == "more":
        target = (colors[0], colors[1])
    elif form == "count":
        what = rng.choice(("all", "color", "kind", "size"))
        target = {
            "all": (),
            "color": (colors[0],),
            "kind": (rng.choice(KINDS),),
            "size": (rng.choice(tuple(SIZES)),),
        }[what]
    return ShapesProblem(grid, things, form, target, hint)


def paint(problem: ShapesProblem) -> Image.Image:
    """Paint the image, RGB of `grid` x 28 pixels a side."""
    side = problem.grid * CELL
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    # Small things are painted last, so that a large neighbour never hides them.
    for thing in sorted(problem.things, key=lambda thing: thing.size):
        x, y = thing.column * CELL + CELL // 2, thing.row * CELL + CELL // 2
        half, color = SIZES[thing.size], COLORS[thing.color]
        box = (x - half, y - half, x + half, y + half)
        if thing.kind.isdigit():
            _paint_digit(pen, thing.kind, x, y, color)
        elif thing.kind == "circle":
            pen.ellipse(box, fill=color, outline="black")
        elif thing.kind == "square":
            pen.rectangle(box, fill=color, outline="black")
        else:
            pen.polygon(((box[0], box[3]), (box[2], box[3]), (x, box[1])), fill=color, outline="black")
    return image


def _paint_digit(pen: ImageDraw.ImageDraw, digit: str, x: int, y: int, color: tuple[int, int, int]) -> None:
    """Paint a digit of seven strokes around (x, y)."""
    left, right, top, bottom = x - 5, x + 5, y - 9, y + 9
    strokes = (
        (left, top, right, top),
        (left, top, left, y),
        (right, top, right, y),
        (left, y, right, y),
        (left, y, left, bottom),
        (right, y, right, bottom),
        (left, bottom, right, bottom),
    )
    for stroke, there in zip(strokes, _STROKES[digit], strict=True):
        if there == "1":
            pen.line(stroke, fill=color, width=3)


def draw_solution(rng: Random, problem: ShapesProblem) -> str:
    r"""Draw a right solution of `problem`, ending in `\boxed{answer}`."""
    style = rng.choices(STYLES, weights=_HINTS[problem.hint][1])[0]
    look = _add if problem.form == "sum" else _enumerate
    detour = rng.choices(*_DETOURS)[0]
    text = look(rng, problem, style)
    while rng.random() < detour:
        again = rng.choice(("Wait, let me look again. ", "Hmm, let me check. "))
        text += "\n" + again + look(rng, problem, rng.choice(("terse", "normal")))
    return text + _closing(rng, problem, style)


def _add(rng: Random, problem: ShapesProblem, style: str) -> str:
    """Add the digits up, one by one."""
    digits = [int(thing.kind) for thing in problem.things]
    sums, total = [], digits[0]
    for digit in digits[1:]:
        sums.append(f"{total} + {digit} = {total + digit}")
        total += digit
    if style == "terse":
        return ". ".join(sums) + "."
    seen = f"I see the digits {', '.join(map(str, digits))}. "
    if style == "normal":
        return seen + ". ".join(sums) + "."
    steps = "".join(
        f"Then comes the digit {digit}, and {total} makes the new sum.\n"
        for digit, total in zip(digits[1:], sums, strict=True)
    )
    return f"Let me look at the picture and go through the digits one by one.\nThe first digit is {digits[0]}.\n{steps}"


def _enumerate(rng: Random, problem: ShapesProblem, style: str) -> str:
    """Go through what is seen; in the terse style only through what is asked for."""
    things = problem.things
    words = problem.target or ("shape",)
    if style == "terse":
        asked = [t for t in things if not problem.target or any(t.matches(word) for word in words)]
        # Only what the question turns on is named, which leaves room for a longer answer.
        return ", ".join(t.color if problem.form == "more" else t.kind for t in asked) + "." if asked else "None."
    if style == "normal" and rng.random() < 0.5:
        text = "".join(f"{number}. {t.name}\n" for number, t in enumerate(things, start=1))
    elif style == "normal":
        opening = rng.choice(("I see ", "The picture shows ", "There is "))
        text = opening + ", ".join(f"a {t.name}" for t in things) + ". "
    else:
        text = "Let me look at the picture and go through the shapes one by one.\n"
        counts = dict.fromkeys(words, 0)
        place = rng.random() < 0.3
        for ordinal, t in zip(ORDINALS, things, strict=False):
            text += f"The {ordinal} is a {t.name}" + f" in row {t.row + 1}" * place
            hit = next((word for word in words if t.matches(word) or word == "shape"), None)
            if hit is not None:
                counts[hit] += 1
                text += f", so {hit} has count {counts[hit]}"
            text += ".\n"
    tally = [f"{count(things, word)} {word}" for word in problem.target] or [f"{len(things)} in total"]
    return text + f"That makes {' and '.join(tally)}."


def _closing(rng: Random, problem: ShapesProblem, style: str) -> str:
    """Draw the sentence that gives the answer."""
    box = f"\\boxed{{{problem.answer}}}"
    if style == "terse":
        return f" {box}"
    if style == "normal":
        return rng.choice((f" So the answer is {box}.", f" The answer is {box}."))
    return f"\n\nNow I have seen everything in the picture. Therefore, the final answer is {box}."
