"""Faults of a disk: the n-th call that opens, writes, syncs, renames or removes something fails."""

import contextlib
import errno
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

CALLS = {"open": os, "write": os, "fsync": os, "ftruncate": os, "replace": os, "rename": os, "unlink": os, "mkdir": os}
FULL, BROKEN = errno.ENOSPC, errno.EIO


class Faults:
    """Counts calls, and lets one of them fail.

    Args:
        which: number of the call that fails, from 1; 0 = none does.
        code: of the error.

    Attributes:
        calls: names of the calls so far.
    """

    def __init__(self, which: int = 0, code: int = FULL) -> None:
        self.which, self.code = which, code
        self.calls: list[str] = []

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) == self.which:
                raise OSError(self.code, os.strerror(self.code), "some/file")
            return call(*args, **options)

        return counted

    @contextlib.contextmanager
    def injected(self) -> Iterator["Faults"]:
        """While this lasts."""
        with contextlib.ExitStack() as stack:
            for name, module in CALLS.items():
                stack.enter_context(mock.patch.object(module, name, self._wrapped(name, getattr(module, name))))
            counted = self._wrapped("Path.open", pathlib.Path.open)

            def opened(*args: Any, **options: Any) -> Any:  # a function, so that it becomes a method
                return counted(*args, **options)

            stack.enter_context(mock.patch.object(pathlib.Path, "open", opened))
            yield self


def every_call(run: Callable[[], Any], step: int = 1) -> range:
    """Numbers of the calls that may fail, found by a run in which none does."""
    with Faults().injected() as faults:
        run()
    return range(1, len(faults.calls) + 1, step)
