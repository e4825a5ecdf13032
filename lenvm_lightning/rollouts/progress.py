"""How far sampling is: a bar on a terminal, a line every now and then in a log file."""

import sys
import time

from tqdm import tqdm

from .summary import Tally


class SamplingProgress:
    """Completions done of all, tokens/s, time left, share cut. A context manager.

    Args:
        done: completions that were there before.
        total: completions wanted.
        tally: of all completions that are there; read, never changed.
        seconds: between two lines where stderr is no terminal.
    """

    def __init__(self, done: int, total: int, tally: Tally, seconds: float = 20.0) -> None:
        self._first, self._done, self._total, self._tally, self._every = done, done, total, tally, seconds
        self._tokens = 0

    def __enter__(self) -> "SamplingProgress":
        """Draw the bar."""
        self._bar = tqdm(
            desc="sample",
            total=self._total,
            initial=self._done,
            unit="completion",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._began = self._told = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        """Finish the bar."""
        self._bar.close()

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second since the beginning; None where there was none."""
        return self._tokens / max(1e-9, time.monotonic() - self._began) if self._tokens else None

    def add(self, tokens: int) -> None:
        """Advance by a completion."""
        self._done += 1
        self._tokens += tokens
        facts = {"tokens/s": f"{self.tokens_per_s or 0:,.0f}", "cut": f"{self._tally.cut_share:.1%}"}
        if not self._bar.disable:
            self._bar.set_postfix(facts, refresh=False)
            self._bar.update()
        elif time.monotonic() - self._told >= self._every:
            self._told = time.monotonic()
            spent = self._told - self._began
            left = spent / (self._done - self._first) * (self._total - self._done)
            print(
                f"sampled {self._done:,}/{self._total:,}, {tqdm.format_interval(spent)} elapsed, "
                f"{tqdm.format_interval(left)} left" + "".join(f", {name} {value}" for name, value in facts.items()),
                file=sys.stderr,
                flush=True,
            )
