"""A folder with one owner at a time: its lock, files that appear only when whole, settings compared."""

import contextlib
import errno
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import StoreError

LOCK_FILE = ".lock"


class FolderLock:
    """Keeps other processes out of a folder, on this machine and, where the file system knows ``flock``, on others.

    The system takes the lock back when the process ends, however it ends. Processes that are forked off do not hold
    it, so that a worker which outlives its killed parent keeps nobody out.

    Args:
        folder: made where it is missing.
        wait: wait for the other process to end instead of refusing.
    """

    def __init__(self, folder: Path, wait: bool = False) -> None:
        self.folder, self.wait = folder, wait
        self._file = -1

    def __enter__(self) -> "FolderLock":
        """Take the lock.

        Raises:
            StoreError: another process has it, or the folder cannot be written.
        """
        told = False
        while (owner := self._take()) is not None:
            if not self.wait:
                raise StoreError(f"{self.folder} is in use by {owner}. Wait until it ends, or stop it.")
            if not told:
                print(f"{self.folder} is in use by {owner}; waiting for it", file=sys.stderr, flush=True)
                told = True
            time.sleep(0.5)
        return self

    def _take(self) -> str | None:
        """Take the lock, or say who has it."""
        path = self.folder / LOCK_FILE
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise StoreError(f"{self.folder} cannot be written: {error.strerror}. Choose another place.") from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(file, 200, 0).decode(errors="replace").strip()
                os.close(file)
                return owner or "another process"
            except OSError as error:
                print(f"note: {self.folder} is not locked ({error.strerror}): let only one process use it",
                      file=sys.stderr)  # fmt: skip
            if _is_at(file, path):
                break
            os.close(file)  # its owner removed it while we opened it
        self._file = file
        _HELD.add(self)
        # A full disk: the lock holds all the same, it only does not say whose it is.
        with contextlib.suppress(OSError):
            os.ftruncate(file, 0)
            os.pwrite(file, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lock back."""
        if self._file >= 0:
            # Removed while it is still held; whoever has the old file open sees that it is no longer the one in place.
            # Where that fails it stays, and keeps nobody out.
            with contextlib.suppress(OSError):
                (self.folder / LOCK_FILE).unlink()
            self.forget()

    def forget(self) -> None:
        """Close the file; in a forked process that leaves the lock with its parent."""
        os.close(self._file)
        self._file = -1
        _HELD.discard(self)


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is the one under the path."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


_HELD: set[FolderLock] = set()


def _forget_all() -> None:
    for lock in list(_HELD):
        lock.forget()


os.register_at_fork(after_in_child=_forget_all)


def write_whole(path: Path, text: str) -> None:
    """Write a text file under another name first, so that it is whole wherever it is there."""
    part = path.with_name(f".{path.name}")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Force the names of a folder's files to the disk."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems know no such thing
            raise
    finally:
        os.close(file)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """``key: old -> new`` for every setting in which two trees differ."""
    found = []
    for key in sorted(set(old) | set(new), key=str):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return found


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)  # what a disk says that takes no more


@contextlib.contextmanager
def full_disk_in_a_sentence(advice: str) -> Iterator[None]:
    """Turn what a full disk makes of writing into an error for people.

    Args:
        advice: what to do, a sentence.

    Raises:
        StoreError: no room, or a disk that cannot be written.
    """
    try:
        yield
    except StoreError:  # which says it already
        raise
    except Exception as error:
        # Writers of safetensors and tokenizers raise errors of their own, which say no more than the system's text.
        full = [os.strerror(code) for code in _FULL]
        if not any(text in str(error) for text in full):
            raise
        where = getattr(error, "filename", None) or "a file"
        reason = next(text for text in full if text in str(error))
        raise StoreError(f"{where} cannot be written: {reason}. {advice}") from error
