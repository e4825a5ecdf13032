"""A folder of completions that survives being killed at any moment: what rollouts and evaluations both keep theirs in.

`settings.json` says what decides the completions, and is written first. Then records come, one a line, in whatever
order they are finished, into a file that is only ever added to; lines that a crash broke are set aside in
`broken.jsonl`. The next run reads what is there and adds what is missing.
"""

import contextlib
import json
from collections.abc import Hashable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from ..errors import GeneratorError, StoreError
from ..utils.json_input import parse_object, read_object
from ..utils.locked_folder import FolderLock, differences, write_whole
from ..utils.own_folder import is_free
from .generators.interface import Failure
from .journal import Journal

Key = TypeVar("Key", bound=Hashable)
_Taken = TypeVar("_Taken", contravariant=True)


class CompletionRecord(Protocol):
    """A completion as a line of a file."""

    @property
    def key(self) -> Any:
        """What tells it from all others of its folder."""

    @property
    def called(self) -> str:
        """What to call it in messages."""

    def as_line(self) -> dict[str, Any]:
        """JSON values."""

    @classmethod
    def from_line(cls, line: dict[str, Any]) -> Self:
        """Read it back.

        Raises:
            ValueError: (or KeyError, TypeError) the line is not a whole record.
        """


Record = TypeVar("Record", bound=CompletionRecord)


class Places(Protocol[_Taken]):
    """Where the line of each completion begins in the file; a dictionary is one."""

    def __contains__(self, key: _Taken, /) -> bool: ...
    def __setitem__(self, key: _Taken, place: int, /) -> None: ...
    def __len__(self) -> int: ...
    def clear(self) -> None:
        """Forget all of them."""


class CompletionStore(Generic[Key, Record]):
    """Records of completions in a folder: what is there, and adding what is missing. A context manager.

    Uses of it say what a line is (a `CompletionRecord`), and what they remember of each record.

    Args:
        folder: where they are or will be; made where it is missing.
        settings: all that decides what the completions are, JSON values.
        record: the class of its records.
        file: name of the file that has a record a line.
        total: number of completions wanted; None where the store does not know.
        places: an empty one that takes the keys of this store.
        wait: wait where another process has the folder, instead of refusing.

    Attributes:
        failures: why there is no completion, by key.
        notes: what was put right on opening, for people.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        record: type[Record],
        *,
        file: str,
        total: int | None = None,
        places: Places[Key] | None = None,
        wait: bool = False,
    ) -> None:
        self.folder, self.settings, self.total = folder, json.loads(json.dumps(settings)), total
        self.journal = Journal(folder / file, folder / "broken.jsonl")
        self.failures: dict[Key, Failure] = {}
        self.notes: list[str] = []
        self._record = record
        self._places: Places[Key] = {} if places is None else places
        self._lock = FolderLock(folder, wait)

    # -- what uses of it say ------------------------------------------------------------------------------------------

    def remember(self, record: Record) -> None:
        """Take note of a record that is there: read on opening, or added."""

    def forget(self) -> None:
        """Forget all that was remembered: the file is about to be read, perhaps for the second time."""

    def holds_completions(self) -> bool:
        """Whether there is anything in the folder that other settings would make wrong."""
        return self.journal.path.exists() and self.journal.path.stat().st_size > 0

    def before_new_settings(self) -> None:
        """Remove what other settings left behind, where nothing was sampled with them."""

    # -- opening and closing ------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Lock the folder, compare settings, repair and read what is there.

        Raises:
            StoreError: in use, sampled with other settings, something else than such a folder, or not to be written.
        """
        with contextlib.ExitStack() as stack:
            self._refuse_others()
            stack.enter_context(self._lock)
            self.open()
            stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Force everything to the disk and let others in."""
        try:
            with self.writing():
                self.journal.sync()
        except StoreError:
            if error is None:  # else the disk was full already, and that is being said
                raise
        finally:
            self.journal.close()
            self._lock.__exit__(None, None, None)

    def _refuse_others(self) -> None:
        """Refuse a folder that is neither free nor such a one, which is known by what its settings are called.

        Raises:
            StoreError: it holds something else.
        """
        if self.holds_completions() or is_free(self.folder, ".settings.json"):
            return
        with contextlib.suppress(OSError, ValueError):
            if read_object(self.folder / "settings.json").keys() == self.settings.keys():
                return
        raise StoreError(
            f"{self.folder} is not empty, and has no settings.json of such completions. Nothing in it is touched. "
            "Choose another folder (--out)."
        )

    def open(self) -> None:
        """Compare settings, repair and read what is there; the folder is locked."""
        with self.writing():
            self.check_settings()
            self._forget()
            self.notes += self.journal.read(self._read_line)

    def check_settings(self) -> None:
        """Compare the settings with those that the folder was begun with, and write them where there are none.

        Raises:
            StoreError: it holds completions sampled with other ones; the text names each difference.
        """
        file = self.folder / "settings.json"
        try:
            changed = differences(read_object(file), self.settings)
        except FileNotFoundError:
            changed = ["settings.json is missing"]
        except ValueError as error:
            changed = [f"settings.json cannot be read: {error}"]
        if changed and self.holds_completions():
            raise StoreError(
                f"{self.folder} holds completions sampled with other settings:\n  " + "\n  ".join(changed) + "\n"
                "Choose another folder (--out), or delete this one."
            )
        if changed:
            self._refuse_others()
            self.before_new_settings()
            write_whole(file, json.dumps(self.settings, indent=2) + "\n")

    def _forget(self) -> None:
        self._places.clear()
        self.forget()

    def _read_line(self, line: bytes, place: int) -> str:
        """Take in a line of the file; what is wrong with it otherwise, or an empty string."""
        if place == 0:  # the file is read anew after broken lines were set aside
            self._forget()
        try:
            record = self._record.from_line(parse_object(line))
        except (ValueError, KeyError, TypeError) as error:
            return f"not a whole record ({type(error).__name__}: {error})"
        if not self.wanted(record.key):
            return f"{record.called} was not asked for"
        if record.key in self._places:
            return f"{record.called} for the second time"
        self._take(record, place)
        return ""

    def _take(self, record: Record, place: int) -> None:
        self._places[record.key] = place
        self.remember(record)

    # -- what is there, and what is missing ---------------------------------------------------------------------------

    @property
    def done(self) -> int:
        """Number of completions that are there."""
        return len(self._places)

    def has(self, key: Key) -> bool:
        """Whether a completion is there."""
        return key in self._places

    def wanted(self, key: Key) -> bool:
        """Whether a completion belongs in this store at all."""
        return True

    def what_stays(self) -> str:
        """A sentence for people who stop, or are stopped."""
        return f"{self._count()} are in {self.folder} and stay; the same command goes on from there."

    def _count(self) -> str:
        return f"{self.done:,}" + ("" if self.total is None else f" of {self.total:,}") + " completions"

    # -- adding -------------------------------------------------------------------------------------------------------

    def require_missing(self, key: Key, called: str) -> None:
        """Refuse an answer that nobody asked for, or the second one to the same question.

        Raises:
            GeneratorError: it is one.
        """
        if not self.wanted(key):
            raise GeneratorError(f"{called} was not asked for")
        if self.has(key) or key in self.failures:
            raise GeneratorError(f"{called} came a second time")

    def add(self, record: Record) -> None:
        """Write a record down; once this returns, SIGKILL does not lose it.

        Raises:
            StoreError: the disk is full, or gone. What was there before is still there, whole.
            GeneratorError: see `require_missing`.
        """
        self.require_missing(record.key, record.called)
        with self.writing():
            place = self.journal.append(json.dumps(record.as_line()).encode())
        self._take(record, place)

    def add_failure(self, key: Key, called: str, failure: Failure) -> None:
        """Remember why there is no completion.

        Raises:
            GeneratorError: see `require_missing`.
        """
        self.require_missing(key, called)
        self.failures[key] = failure

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Say what to do where the disk does not take any more."""
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"{self.folder} cannot be written: {error.strerror or error}. {self._count()} are there and stay. "
                "Make room, then type the same command again: it goes on from there."
            ) from error
