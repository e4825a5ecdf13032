"""Names of the prompt sets and rollouts that the package makes itself, and who makes them.

A registry without contents of its own, like `models.embedded`: whoever brings prompts or rollouts adds them on import.
Makers are called only when they are asked for something, and import what they need then. Imports nothing heavy.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from .generators.interface import Prompt

RolloutKind = Literal["text", "vision"]


class PromptMaker(Protocol):
    """Makes the first `count` prompts of a set."""

    def __call__(self, name: str, split: str | None, count: int, seed: int) -> "Sequence[Prompt]":
        """The prompts of `split` (``train``, ``test``, or None for both); another seed gives others."""


class RolloutMaker(Protocol):
    """Writes a small set of rollouts."""

    def __call__(self, kind: RolloutKind, folder: Path) -> Path:
        """Write into `folder`, unless they are there already, and return the JSONL file."""


_prompt_sets: dict[str, PromptMaker] = {}
_rollouts: dict[str, RolloutMaker] = {}


def register_prompt_set(name: str, make: PromptMaker) -> None:
    """Make a prompt set known by its name."""
    _prompt_sets[name] = make


def register_rollouts(name: str, make: RolloutMaker) -> None:
    """Make rollouts known by the name that stands for their files."""
    _rollouts[name] = make


def prompt_sets() -> tuple[str, ...]:
    """Names of the embedded prompt sets."""
    return tuple(_prompt_sets)


def make_prompts(name: str, split: str | None, count: int, seed: int) -> "Sequence[Prompt]":
    """The first `count` prompts of the embedded set `name`; a longer set begins with the shorter one.

    Raises:
        DataError: an unknown split, or fewer prompts than asked for.
    """
    return _prompt_sets[name](name, split, count, seed)


def is_rollouts(name: str) -> bool:
    """Whether a name stands for embedded rollouts instead of files."""
    return name in _rollouts


def write_rollouts(name: str, kind: RolloutKind, folder: Path) -> Path:
    """Write the embedded rollouts `name` into `folder`, unless they are there; returns their JSONL file."""
    return _rollouts[name](kind, folder)
