"""All that evaluations know of the tiny world: its models, its prompts, and what a report says of it."""

from .. import tinyworld
from ..tinyworld import prompt_sets, writing

NAME = "tiny"  # of a task's data source in the tiny world
PROMPT_SETS = tuple(prompt_sets.SETS)
NOTICE = tinyworld.NOTICE


def is_generator(source: str) -> bool:
    """Whether a generator is one of the embedded ones."""
    return source in tinyworld.NAMES


def value_model_of(generator: str) -> str | None:
    """The embedded length value model of an embedded generator; None for every other generator."""
    return next((name for name, of in tinyworld.VALUE_MODELS.items() if of == generator), None)


def wrote(generator: str) -> bool:
    """Whether completions of this generator are of the tiny world."""
    return tinyworld.wrote(generator)


def unseen_topics(count: int, seed: int) -> list[str]:
    """Topics that no tiny model has seen.

    Args:
        count: how many.
        seed: another one has other topics.

    Raises:
        DataError: there are not so many.
    """
    return writing.unseen_topics(count, seed)


def writing_prompt(topic: str, constraint: str, length: int | str) -> str:
    """A prompt for a text of a length in tokens, as the tiny models know it; both may be marks, filled in later."""
    return writing.wording(topic, constraint, length)
