"""Completions of a file of rollouts, one by one."""

from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError
from ..utils.json_input import parse_json
from .record import Rollout, parse_record


def read_rollouts(file: Path) -> Iterator[Rollout]:
    """Rollouts in a JSONL file, in its order.

    Args:
        file: in any layout that `parse_record` reads.

    Raises:
        DataError: it cannot be read; the text says which line.
    """
    place = str(file)
    try:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                place = f"{file}, line {number}"
                yield from parse_record(parse_json(line), file.parent)[0]
    except (OSError, ValueError) as error:
        raise DataError(f"{place}: it cannot be read as rollouts: {error}") from error
