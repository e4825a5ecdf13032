"""What the tiny models learn to write: documents drawn from a seed, held-out problems left out."""

import hashlib
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from PIL import Image

from . import arithmetic, shapes, thinking, writing

Kind = Literal["text", "vision", "thinking"]
TEST_SHARE = 10  # one problem in so many is for testing

# The draft nearest to its target length is kept: a small model learns to obey only from examples that mostly do.
_DRAFTS = 4


@dataclass(frozen=True)
class Document:
    """A prompt (`<image>` marks its image, of `image_tokens` tokens) and one good completion of it."""

    prompt: str
    completion: str
    image: Image.Image | None = None
    image_tokens: int = 0


def split(content: str) -> str:
    """Assign a problem to "train" or "test" by a hash of what it consists of, so that equal ones stay together."""
    return "test" if int(hashlib.sha256(content.encode()).hexdigest(), 16) % TEST_SHARE == 0 else "train"


def document(kind: Kind, seed: int, index: int, paint: bool = True) -> Document:
    """Draw document `index` of the corpus `seed`: always the same one; `paint` False spares painting its image."""
    rng = Random(f"corpus {kind} {seed} {index}")
    if kind == "vision":
        problem = _draw_train(rng, shapes)
        solution = shapes.draw_solution(rng, problem)
        return Document(problem.prompt, solution, shapes.paint(problem) if paint else None, problem.grid**2)
    if kind == "thinking":
        thought = _draw_train(rng, thinking)
        return Document(thought.prompt, thinking.draw_solution(rng, thought))
    sort = rng.choices(("drill", "story", "writing"), weights=(6, 44, 50))[0]
    if sort == "drill":
        return Document(*arithmetic.draw_drill(rng))
    if sort == "story":
        problem = _draw_train(rng, arithmetic)
        return Document(problem.prompt, arithmetic.draw_solution(rng, problem))
    problem = _draw_train(rng, writing)
    drafts = [writing.draw_solution(rng, problem) for _ in range(_DRAFTS if problem.constraint else 1)]
    return Document(problem.prompt, min(drafts, key=lambda text: writing.distance(problem, text)))


def _draw_train(rng: Random, module: Any) -> Any:
    """Draw problems until one is not held out."""
    while True:
        problem = module.draw_problem(rng)
        if split(problem.content) == "train":
            return problem
