"""How far a long piece of work is, said in the same words by sampling, evaluation and training.

On a terminal a bar, in a log file a line every now and then: what is done of what, tokens/s, time spent, time left, and
what else the work has to say, such as the share of truncated completions or the loss.
"""

import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from tqdm import tqdm

_LINE_SECONDS = 20.0  # a log file of a day has some thousand lines then
_BAR_SECONDS = 0.1  # faster than anybody reads
_TICK_SECONDS = 0.5  # how often somebody looks, where no completion ends for minutes


class Progress:
    """A bar on a terminal, a line every ``seconds`` in a log file. A context manager.

    Args:
        name: what is being done, such as ``sample``.
        unit: what is counted, such as ``completions``.
        total: how many there will be; None where nobody knows.
        done: how many there are already.
        seconds: between two lines where stderr is no terminal.
        clock: tells seconds; they never go back.
    """

    def __init__(
        self,
        name: str,
        unit: str,
        total: int | None,
        done: int = 0,
        *,
        seconds: float = _LINE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._unit, self._total, self._first = name, unit, total, done
        self._seconds, self._clock = seconds, clock
        self._bar: tqdm | None = None
        self._began = self._shown = clock()

    def __enter__(self) -> "Progress":
        """Start the clock, and draw the bar where there is a terminal."""
        self._began = self._shown = self._clock()
        if sys.stderr.isatty():
            # tqdm's own rate and time left know nothing of tokens, so only its bar is used.
            form = f"{{desc}}: {{percentage:3.0f}}%|{{bar}}| {{n_fmt}}/{{total_fmt}} {self._unit}{{postfix}}"
            self._bar = tqdm(
                desc=self._name, total=self._total, initial=self._first, bar_format=form, dynamic_ncols=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @property
    def seconds_spent(self) -> float:
        """Since the beginning."""
        return self._clock() - self._began

    @property
    def is_due(self) -> bool:
        """Whether `show` would show anything now: what is expensive to find out can wait until then."""
        return self._clock() - self._shown >= (self._seconds if self._bar is None else _BAR_SECONDS)

    def show(
        self,
        done: int,
        *,
        tokens_per_s: float | None = None,
        seconds_left: float | None = None,
        facts: Mapping[str, str] | None = None,
        at_once: bool = False,
    ) -> None:
        """Show how far the work is, unless it was shown a moment ago.

        Args:
            done: how many there are now.
            tokens_per_s: None where it is not known yet.
            seconds_left: None where it is not known yet.
            facts: more to say, by name.
            at_once: show it however little time has passed.
        """
        if not (at_once or self.is_due):
            return
        self._shown = self._clock()
        parts = [] if tokens_per_s is None else [f"{tokens_per_s:,.0f} tokens/s"]
        parts += [f"{clock_text(self.seconds_spent)} elapsed"]
        parts += [] if seconds_left is None else [f"{clock_text(seconds_left)} left"]
        parts += [f"{name} {value}" for name, value in (facts or {}).items()]
        text = ", ".join(parts)
        if self._bar is not None:
            self._bar.n = done
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.refresh()
        else:
            of = "" if self._total is None else f"/{self._total:,}"
            print(f"{self._name}: {done:,}{of} {self._unit}, {text}", file=sys.stderr, flush=True)


class CompletionProgress:
    """Progress of completions, many of which are written at the same time. A context manager.

    Tokens of completions that are under way count, so that the rate is right from the first seconds on. Time left is a
    bound until the first completion ends, and an estimate from then on. While it is open, a thread shows how far things
    are even where none ends.

    Args:
        name: what is being done, such as ``sample``.
        total: completions wanted.
        tokens_written: tells how many tokens the generator has written so far, those of completions under way included.
            Where it counts finished ones only, progress knows no more.
        limit: tokens after which a completion is truncated.
        there: completions that were there before.
        tokens_there: tokens of those.
        truncated: how many of those were truncated.
        failed: completions that cannot be had.
        seconds: between two lines where stderr is no terminal.
        clock: tells seconds; they never go back.
        ticks: whether a thread shows it from time to time.
    """

    def __init__(
        self,
        name: str,
        total: int,
        tokens_written: Callable[[], int],
        limit: int,
        *,
        there: int = 0,
        tokens_there: int = 0,
        truncated: int = 0,
        failed: int = 0,
        seconds: float = _LINE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        ticks: bool = True,
    ) -> None:
        self._progress = Progress(name, "completions", total, there + failed, seconds=seconds, clock=clock)
        self._total, self._limit, self._ticks = total, limit, ticks
        self._tokens_written, self._written_before = tokens_written, 0
        self._finished, self._finished_tokens = there, tokens_there
        self._truncated, self._failed = truncated, failed
        self._new_tokens = 0  # of completions that were finished since the beginning
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "CompletionProgress":
        """Start the clock."""
        self._written_before = self._tokens_written()
        self._progress.__enter__()
        if self._ticks:
            self._thread = threading.Thread(target=self._keep_showing, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the thread and finish the bar."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        if sys.stderr.isatty():
            self.show(at_once=True)  # the bar stays at what was reached
        self._progress.__exit__(kind, error, trace)

    def finished(self, tokens: int, *, truncated: bool) -> None:
        """Count a completion that is there."""
        with self._lock:
            self._finished += 1
            self._finished_tokens += tokens
            self._new_tokens += tokens
            self._truncated += truncated
        self.show()

    def failed(self) -> None:
        """Count a completion that cannot be had."""
        with self._lock:
            self._failed += 1
        self.show()

    @property
    def tokens(self) -> int:
        """Tokens written since the beginning, those of completions under way included."""
        return max(self._new_tokens, self._tokens_written() - self._written_before)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second since the beginning; None before the first."""
        tokens = self.tokens
        return tokens / max(1e-9, self._progress.seconds_spent) if tokens else None

    @property
    def seconds_left(self) -> float | None:
        """Time until all are there, at the rate until now; None before the first one is.

        Lengths of completions are spread so widely that one which is under way has in the mean about as much to come as
        one that has not begun: the short ones are not among those under way for long. So each that is missing counts
        whole, however much of it is written. At the very end, when few long ones are left and the rate falls, this says
        too little.
        """
        rate = self.tokens_per_s
        under_way = self.tokens - self._new_tokens
        length = expected_length(self._finished, self._finished_tokens, under_way, self._limit)
        if rate is None or length is None:
            return None
        return (self._total - self._finished - self._failed) * length / rate

    @property
    def most_seconds_left(self) -> float | None:
        """Time until all are there if each is as long as it may be; None before the first token."""
        rate = self.tokens_per_s
        return None if rate is None else (self._total - self._finished - self._failed) * self._limit / rate

    def show(self, *, at_once: bool = False) -> None:
        """Show how far it is, unless it was shown a moment ago."""
        with self._lock:
            if not (at_once or self._progress.is_due):
                return
            share = self._truncated / self._finished if self._finished else 0.0
            facts = {"truncated": f"{share:.1%}"}
            if self.seconds_left is None and self.most_seconds_left is not None:
                facts = {"left at most": clock_text(self.most_seconds_left), **facts}
            self._progress.show(
                self._finished + self._failed,
                tokens_per_s=self.tokens_per_s,
                seconds_left=self.seconds_left,
                facts=facts,
                at_once=True,
            )

    def _keep_showing(self) -> None:
        while not self._closed.wait(_TICK_SECONDS):
            try:
                self.show()
            except (OSError, ValueError):  # nobody reads stderr any more; whoever writes next is told so
                return


def expected_length(finished: int, finished_tokens: int, under_way: int, limit: int) -> float | None:
    """Tokens that a completion will have in the mean, guessed while many are still being written.

    The mean of the finished ones is too low, for the short ones finish first. All tokens written, divided by the number
    of finished completions, is too high, for those under way bring tokens but do not count yet. The truth lies between
    them, and their geometric mean is close to it: both errors are of the order of completions under way to finished.

    Args:
        finished: number of finished completions.
        finished_tokens: tokens of these.
        under_way: tokens written so far of completions that are not finished.
        limit: tokens that none can have more of.

    Returns:
        The expected length; None where nothing is finished.
    """
    if not finished_tokens:
        return None
    too_low = finished_tokens / finished
    too_high = (finished_tokens + under_way) / finished
    return min(math.sqrt(too_low * too_high), float(limit))


def time_left(seconds_spent: float, done: int, left: int) -> float | None:
    """Time for what is left, where every part takes as long as those that are done; None before the first."""
    return seconds_spent / done * left if done > 0 else None


def clock_text(seconds: float) -> str:
    """A time for people, such as ``1:05`` or ``2:03:59``."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
