"""A file of lines that is only ever added to, and is put right when it is opened after a crash."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

_SYNC_SECONDS = 5.0


class Journal:
    """Lines in a file, handed to the system one by one, so that SIGKILL loses none that was added.

    Every few seconds they are forced to the disk: a power cut loses no more than those since then.

    Args:
        path: the file; made when the first line is added.
        aside: where broken lines go.
    """

    def __init__(self, path: Path, aside: Path) -> None:
        self.path, self.aside = path, aside
        self._file = -1
        self._synced = time.monotonic()

    def read(self, take: Callable[[bytes, int], str]) -> list[str]:
        """Show every line with its place to ``take``, and put right what it finds wrong.

        A last line without its end was torn and is cut off, or gets its end where nothing else is missing. Other broken
        lines go to ``aside``, and the file is then read again without them.

        Args:
            take: returns what is wrong with a line, or an empty string; it is called anew for the second reading, with
                places that start from 0 again.

        Returns:
            What was put right, for people.

        Raises:
            OSError: the disk is full.
        """
        if not self.path.exists():
            return []
        notes: list[str] = []
        broken: dict[int, str] = {}
        with self.path.open("r+b") as file:
            end = 0
            for number, line in enumerate(file, 1):
                problem = take(line, end)
                if not line.endswith(b"\n"):
                    if problem:
                        notes.append(f"{self.path.name}: its last line was torn and is cut off")
                        os.ftruncate(file.fileno(), end)
                    else:
                        os.pwrite(file.fileno(), b"\n", end + len(line))
                    break
                if problem:
                    broken[end] = f"{self.path.name}:{number}: {problem}"
                end += len(line)
        if broken:
            self._set_aside(set(broken))
            notes += [f"{text}; set aside in {self.aside.name}, sampled again" for text in broken.values()]
            notes += self.read(take)
        return notes

    def _set_aside(self, places: set[int]) -> None:
        part = self.path.with_name(f".{self.path.name}")
        with self.path.open("rb") as old, part.open("wb") as new, self.aside.open("ab") as aside:
            place = 0
            for line in old:
                (aside if place in places else new).write(line)
                place += len(line)
            for file in (new, aside):
                file.flush()
                os.fsync(file.fileno())
        part.replace(self.path)

    def append(self, line: bytes) -> int:
        """Add a line, without its end; its place in the file.

        Raises:
            OSError: the disk is full; nothing of the line stays.
        """
        if self._file < 0:
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        place = os.fstat(self._file).st_size
        left = line + b"\n"
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, place)  # cutting back needs no room
            raise
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()
        return place

    def lines(self, places: Iterable[int]) -> Iterator[bytes]:
        """The lines at these places, in this order, each with its end."""
        with self.path.open("rb") as source:
            for place in places:
                source.seek(place)
                yield source.readline()

    def sync(self) -> None:
        """Force what was added to the disk."""
        if self._file >= 0:
            os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
