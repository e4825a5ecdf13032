"""Commands, scripts and functions in processes of their own, forked from one that has imported everything.

What they do is what a fresh process does, but for seconds of imports. Whoever tests imports starts a fresh one.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["lenvm_lightning.pipeline.run_recipe", "lenvm_lightning.rollouts.generators.local", "peft"]
)


class Fork:
    """A process that does some work, and what it prints; much like a `subprocess.Popen`.

    Args:
        work: a function that can be pickled; what it returns is the exit status.
        arguments: of the function.
    """

    def __init__(self, work: Callable[..., Any], *arguments: Any) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._said = [Path(self._folder.name, name) for name in ("out", "err")]
        self._process = _CONTEXT.Process(target=_be, args=(self._said, dict(os.environ), work, arguments))
        self._process.start()
        atexit.register(self._end)  # before multiprocessing waits for it, when a test has failed

    def _end(self) -> None:
        if self._process.is_alive():
            self._process.kill()

    @property
    def returncode(self) -> int | None:
        """The exit status, -SIGNAL where a signal ended it; None while it works."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """To this process alone."""
        assert self._process.pid is not None
        if self._process.is_alive():
            os.kill(self._process.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it printed and what it complained of, when it has ended."""
        self._process.join(timeout)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
            raise TimeoutError(f"still at work after {timeout:g} s:\n" + "\n".join(self._texts()))
        return self._texts()

    def _texts(self) -> tuple[str, str]:
        out, err = (file.read_text() if file.exists() else "" for file in self._said)
        return out, err


def command(words: list[str]) -> Fork:
    """`lenvm WORDS...`."""
    from lenvm_lightning.cli.main import main

    return Fork(main, words)


def script(file: Path, *words: str) -> Fork:
    """`python FILE WORDS...`."""
    return Fork(_script, str(file), words)


def code(source: str, *words: str) -> Fork:
    """`python -c SOURCE WORDS...`."""
    return Fork(_code, source, words)


def finish(fork: Fork, timeout: float = 200.0) -> str:
    """What a process printed, once it has ended well."""
    out, err = fork.communicate(timeout)
    assert fork.returncode == 0, err
    return out


def _code(source: str, words: tuple[str, ...]) -> None:
    sys.argv = ["-c", *words]
    exec(compile(source, "-c", "exec"), {"__name__": "__main__"})


def _script(file: str, words: tuple[str, ...]) -> None:
    sys.argv = [file, *words]
    sys.path.insert(0, str(Path(file).parent))
    runpy.run_path(file, run_name="__main__")


def _be(said: list[Path], environment: dict[str, str], work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    for descriptor, file in zip((1, 2), said, strict=True):
        with file.open("wb") as there:
            os.dup2(there.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(work(*arguments))


def wait_until(moment: Callable[[], bool], fork: Fork, timeout: float = 200.0) -> None:
    """Wait for a moment in the life of a process."""
    end = time.monotonic() + timeout
    while not moment():
        assert fork.returncode is None, fork.communicate(1.0)
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)
