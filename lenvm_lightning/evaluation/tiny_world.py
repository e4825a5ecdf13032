"""All that evaluations know of the tiny world beyond its names: its prompts, and what a report says of it."""

from .. import tinyworld
from ..tinyworld import writing

NAME = "tiny"  # of a task's data source in the tiny world
PROMPT_SETS = tinyworld.PROMPT_SETS
NOTICE = tinyworld.NOTICE


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
