"""Completions of a file of rollouts, one by one."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..errors import DataError, StoreError
from ..utils.images import ImageFolders
from ..utils.json_input import parse_json
from .record import Rollout, parse_record


def rollouts_file(place: Path) -> Path:
    """The file of a folder that `lenvm sample` wrote, or a file itself.

    Raises:
        StoreError: it is not there; the text says where sampling was not finished.
    """
    file = place / "rollouts.jsonl" if place.is_dir() else place
    if not file.is_file():
        unfinished = (place / "journal.jsonl").is_file()
        hint = "; sampling is not complete, the command that began it finishes it" if unfinished else ""
        raise StoreError(f"there are no rollouts at {file}{hint}")
    return file


def read_rollouts(file: Path) -> Iterator[Rollout]:
    """Rollouts in a JSONL file, in its order. Images that they name must lie in the folder of the file.

    Args:
        file: in any layout that `parse_record` reads.

    Raises:
        DataError: it cannot be read; the text says which line.
    """
    place = str(file)
    folders = ImageFolders(file.absolute().parent)
    try:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                place = f"{file}, line {number}"
                for rollout in parse_record(parse_json(line), file.parent)[0]:
                    images = [folders.find(os.path.abspath(image)) for image in rollout.images]
                    yield replace(rollout, images=images)
    except (OSError, ValueError) as error:
        raise DataError(f"{place}: it cannot be read as rollouts: {error}") from error
