"""Folders of this package: a file in each says so, and no other folder is emptied or written over."""

import json
import os
import shutil
from pathlib import Path

from ..errors import LenVMError
from .json_input import read_object
from .locked_folder import LOCK_FILE, sync_folder, write_whole

MARKER = "lenvm-folder.json"
_MADE_BY = "lenvm-lightning"
_IN_PASSING = {LOCK_FILE, f".{MARKER}"}  # all that a process may leave that was killed before it wrote the marker


def kind_of(folder: Path) -> str | None:
    """What this package keeps in a folder, such as `run`, by the marker in it; None for every other folder."""
    try:
        marker = read_object(folder / MARKER)
    except (OSError, ValueError):
        return None
    kind = marker.get("holds")
    return kind if marker.get("made_by") == _MADE_BY and isinstance(kind, str) else None


def is_free(folder: Path, *in_passing: str) -> bool:
    """Whether a folder is empty, or not there.

    Args:
        folder: to be looked at.
        in_passing: names of what else a process may leave that was killed before it wrote anything.
    """
    try:
        return not set(os.listdir(folder)) - _IN_PASSING - set(in_passing)
    except OSError:  # not there; or a file, or a folder that nobody may look into
        return not os.path.lexists(folder)


def refuse_others(folder: Path, kind: str, error_class: type[LenVMError], advice: str) -> None:
    """Refuse a folder that holds anything but what this package keeps in such a one.

    Args:
        folder: that is to be written to; looked at only.
        kind: what will be in it: `run`, `comparison`.
        error_class: of the error.
        advice: what to do, a sentence.

    Raises:
        LenVMError: of the class given.
    """
    found = kind_of(folder)
    if found == kind or is_free(folder):
        return
    why = f"it has no {MARKER}, by which folders of this package are known" if found is None else f"it holds: {found}"
    raise error_class(f"{folder} is not empty, and {why}. Nothing in it is touched. {advice}")


def claim(folder: Path, kind: str, error_class: type[LenVMError], advice: str) -> None:
    """Put the marker into a folder, which is made where it is missing; others are refused, see `refuse_others`."""
    refuse_others(folder, kind, error_class, advice)
    if kind_of(folder) != kind:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / MARKER, json.dumps({"made_by": _MADE_BY, "holds": kind}) + "\n")


def put_in_place(part: Path, target: Path) -> None:
    """Give a finished file or folder its name; what had that name before goes.

    It is on the disk before it has the name, so that it is whole wherever it is there, a loss of power included.

    Args:
        part: beside the target, on the same disk.
        target: in a folder of this package.
    """
    sync_tree(part)
    if target.is_dir() and not target.is_symlink():  # no folder replaces another
        shutil.rmtree(target)
    elif part.is_dir():
        target.unlink(missing_ok=True)
    part.replace(target)
    sync_folder(target.parent)


def sync_tree(path: Path) -> None:
    """Force a file, or a folder with all that is in it, to the disk."""
    for folder, _, files in os.walk(path) if path.is_dir() else ():
        for name in files:
            _sync_file(Path(folder) / name)
        sync_folder(Path(folder))
    if path.is_file():
        _sync_file(path)


def _sync_file(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
