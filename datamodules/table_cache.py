"""Tokenised tables on disk: whole where they are there, checked when they are read; no other folder is touched."""

import contextlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import datasets
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info

from lenvm_lightning.errors import DataError, StoreError
from lenvm_lightning.utils.json_input import read_object
from lenvm_lightning.utils.locked_folder import FolderLock, sync_folder, write_whole
from lenvm_lightning.utils.own_folder import MARKER, claim, kind_of, sync_tree

_KIND = "tokenised rollouts"
_CHECKSUMS = "checksums.json"
_CHUNK = 1 << 20  # bytes
_YOUNG = 3600.0  # seconds in which a folder may not be locked yet
_ELSEWHERE = "Name another place with data.cache_dir or $LENVM_CACHE."


def default_cache_dir() -> Path:
    """`$LENVM_CACHE`, else a folder in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LENVM_CACHE") or Path(home) / "lenvm_lightning")


def load_table(folder: Path) -> Dataset | None:
    """A table as it was written; None where there is none, or a damaged one, of which a note tells.

    Raises:
        DataError: the folder is none of ours.
    """
    if not os.path.lexists(folder):
        return None
    if kind_of(folder) != _KIND:
        raise DataError(
            f"{folder} has no {MARKER}, by which tokenised rollouts are known, so it is left alone. Move it away, or "
            f"delete it if it is nobody's. {_ELSEWHERE}"
        )
    try:
        _check(folder)
        return datasets.load_from_disk(str(folder))
    except FileNotFoundError as error:
        damage = f"{error.filename or folder} is missing"
    except Exception as error:  # Arrow and datasets raise a dozen kinds of errors over broken files
        damage = str(error) or type(error).__name__
    rank_zero_info(f"note: the tokenised rollouts in {folder} are damaged ({damage}): they are made anew")
    return None


def save_table(table: Dataset, folder: Path) -> None:
    """Write a table, with what it takes to notice damage, and force it to the disk."""
    claim(folder, _KIND, DataError, _ELSEWHERE)
    table.save_to_disk(str(folder))
    sums = {file.name: [file.stat().st_size, _checksum(file)] for file in sorted(folder.iterdir())}
    write_whole(folder / _CHECKSUMS, json.dumps(sums) + "\n")
    sync_tree(folder)


def give_name(part: Path, folder: Path, building: Path) -> None:
    """Give a saved table its name, at once; one of that name that is outdated or damaged goes.

    Args:
        part: the saved table, in `building`.
        folder: where it belongs.
        building: from `building_folder`.
    """
    try:
        if kind_of(folder) == _KIND:  # moved and not deleted, so that a table is whole wherever it is there
            os.rename(folder, building / "outdated")
        os.rename(part, folder)
    except OSError:  # another process was faster with the same table
        if not folder.exists():
            raise
    sync_folder(folder.parent)


@contextlib.contextmanager
def building_folder(root: Path) -> Iterator[Path]:
    """A folder in the cache to build a table in; it goes, and with it those that killed processes left behind.

    Raises:
        DataError: the cache cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob("building-*"):
            if kind_of(left) == _KIND and time.time() - left.stat().st_mtime > _YOUNG:
                with contextlib.suppress(StoreError), FolderLock(left):  # its owner holds the lock while it lives
                    shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=root, prefix="building-") as folder, FolderLock(Path(folder)):
            claim(Path(folder), _KIND, DataError, _ELSEWHERE)
            yield Path(folder)
    except OSError as error:
        raise DataError(
            f"the tokenised rollouts cannot be written to {root}: {error.strerror or error}. Make room. {_ELSEWHERE}"
        ) from error


def _check(folder: Path) -> None:
    """Compare all files with what was written.

    Raises:
        ValueError: they differ.
        OSError: one is missing, or cannot be read.
    """
    for name, (size, checksum) in read_object(folder / _CHECKSUMS).items():
        file = folder / name
        if file.stat().st_size != size or _checksum(file) != checksum:
            raise ValueError(f"{name} is not as it was written")


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value
