"""Prompts of the tiny world with their answer checks: as many as asked for, for training and for testing."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from random import Random
from typing import Any, overload

from ..errors import DataError, nearest
from ..rollouts.generators.interface import Prompt
from ..utils.boxed import last_boxed
from . import arithmetic, shapes, thinking, writing
from .corpus import split as split_of

SETS = {"tiny-math": arithmetic, "tiny-write": writing, "tiny-vqa": shapes, "tiny-think": thinking}
EQUAL_TOLERANCE = 0.1  # how far from N a text "equal to N tokens" may be, as a share of N
_PATIENCE = 10_000  # draws without a new problem after which a set counts as exhausted


class PromptSet(Sequence[Prompt]):
    """The first `count` prompts of a set: a longer set begins with the shorter one. Images are painted when taken.

    Args:
        name: one of `SETS`.
        split: `train`, `test`, or None for both in the order drawn; the hash of a problem decides, and the tiny
            models never saw a test problem.
        count: how many.
        seed: another one gives other prompts.

    Raises:
        DataError: an unknown set or split, or fewer prompts than asked for.
    """

    def __init__(self, name: str, split: str | None = None, count: int = 600, seed: int = 0) -> None:
        if name not in SETS:
            raise DataError(f"no prompt set {name!r}{nearest(name, SETS)} (known: {', '.join(SETS)})")
        if split not in ("train", "test", None):
            raise DataError(f"split must be train or test, got {split!r}")
        self._name, self._seed = name, seed
        self._problems = list(islice(_problems(name, split, seed), count))
        if len(self._problems) < count:
            raise DataError(f"{name} has only {len(self._problems)} prompts for split {split}, {count} were asked for")

    def __len__(self) -> int:
        return len(self._problems)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number, problem = self._problems[index]
        gold = {"answer": problem.answer} if self._name != "tiny-write" else _constraint_of(problem)
        return Prompt(
            prompt_id=f"{self._name}/{self._seed}-{number}",
            messages=[{"role": "user", "content": problem.prompt}],
            images=(shapes.paint(problem),) if self._name == "tiny-vqa" else (),
            split=split_of(problem.content),
            meta={"set": self._name, **gold},
        )


def prompt_set(name: str, split: str | None = None, count: int = 600, seed: int = 0) -> PromptSet:
    """Return the first `count` prompts of a set; see `PromptSet`."""
    return PromptSet(name, split, count, seed)


def _problems(name: str, split: str | None, seed: int) -> Iterator[tuple[int, Any]]:
    """Yield problems that differ, with their number among both splits."""
    rng, seen, number, idle = Random(f"{name} {seed}"), set(), 0, 0
    while idle < _PATIENCE:
        problem = SETS[name].draw_problem(rng)
        idle += 1
        if repr(problem) in seen:
            continue
        seen.add(repr(problem))
        idle, number = 0, number + 1
        if split in (None, split_of(problem.content)):
            yield number - 1, problem


def _constraint_of(problem: writing.WritingProblem) -> dict[str, Any]:
    return {"constraint": problem.constraint, "length": problem.length} if problem.constraint else {}


def check(meta: Mapping[str, Any], text: str, tokens: int) -> bool | None:
    r"""Judge a completion.

    Args:
        meta: of its prompt.
        text: the completion.
        tokens: how many it has, EOS included.

    Returns:
        Whether the last `\boxed{}` holds the answer, or whether the length constraint was met (EOS not counted;
        "equal to" within a tenth); None where there is nothing to check.
    """
    if "answer" in meta:
        return last_boxed(text) == meta["answer"]
    if "constraint" not in meta:
        return None
    written, target = tokens - 1, meta["length"]
    if meta["constraint"] == "equal to":
        return abs(written - target) <= EQUAL_TOLERANCE * target
    return written <= target if meta["constraint"] == "at most" else written >= target
