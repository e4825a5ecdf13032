"""Whether two LaTeX expressions mean the same, asked of math-verify in a process of its own.

Such a question may take for ever (`9^9^9^9`), inside C code that neither a thread nor a signal handler can interrupt,
and math-verify's own time limit works in the main thread only. A process can be ended from any thread. It lives as
long as this one, runs this very file, and never imports torch.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

SECONDS = 5.0  # that a question may take
_BYTES = 4 << 30  # of address space that it may take


@lru_cache(maxsize=1 << 16)
def equivalent(gold: str, answer: str, places: int = 6) -> bool:
    """Return whether `answer` means what `gold` means. The order matters: `5` answers `x=5` and is answered by it.

    Works in any thread. False too where either cannot be read, or where it takes more than `SECONDS` to tell.

    Args:
        gold: LaTeX without delimiters.
        answer: the same.
        places: decimals to which numbers are rounded where one of the two is a decimal.

    Raises:
        RuntimeError: math-verify does not start.
    """
    return _judge.ask(gold, answer, places)


class _Judge:
    """The process and the pipe to it, one question at a time."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, gold: str, answer: str, places: int) -> bool:
        with self._lock:
            process = self._process or self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps([gold, answer, places]).encode() + b"\n")
                process.stdin.flush()
                reply = process.stdout.readline()
            except OSError:
                reply = b""
            except BaseException:  # an unread reply would be taken for the next question's
                self._stop()
                raise
            if not reply:  # it ran out of time or memory
                self._stop()
            return reply == b"true\n"

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", str(Path(__file__).resolve()), str(self._seconds)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
        self._process = process
        assert process.stdout is not None
        assert process.stderr is not None
        if process.stdout.readline() != b"ready\n":
            reason = process.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
            self._stop()
            raise RuntimeError(
                f"math-verify, which compares answers, does not start: {reason}. "
                'Install it with: pip install "math-verify[antlr4_13_2]"'
            )
        return process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


_judge = _Judge()


def _forget() -> None:
    # A forked process starts its own: two writers to one pipe would read each other's replies.
    global _judge, _parents
    _parents, _judge = _judge, _Judge()


_parents: _Judge | None = None
os.register_at_fork(after_in_child=_forget)


def _serve(seconds: float) -> None:
    """Answer the questions on standard input, one a line, until it ends; die of one that takes too long."""
    import logging
    import resource

    replies, silence = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # antlr prints what it cannot read
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the one who asks will end us
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process even within C code
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    latex = [LatexExtractionConfig(boxed_match_priority=0)]

    @lru_cache(maxsize=1 << 12)
    def read(text: str) -> list:
        boxed = f"\\boxed{{{text}}}"
        return parse(boxed, latex, fallback_mode="no_fallback", parsing_timeout=None)

    os.write(replies, b"ready\n")
    os.dup2(silence, 2)
    for line in sys.stdin:
        gold, answer, places = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            same = verify(read(gold), read(answer), float_rounding=places, timeout_seconds=None)
        except Exception:  # whatever it stumbled on, it did not read an equal answer
            same = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(replies, json.dumps(bool(same)).encode() + b"\n")


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
