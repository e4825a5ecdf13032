"""The batch ends when a share of its completions has ended: a token limit that is found on the way.

To a statistician that is type II censoring: all completions start together, the experiment ends with the k-th end, and
what has not ended is right-censored there. Rows are fewer than completions, so "there" is told in tokens and not in
seconds: the limit is the k-th smallest length, k being the share of all completions wanted, rounded up. Lengths depend
on seeds alone, so the limit does too, and neither speed nor order, rows nor interruptions move it.
"""

import heapq
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any


class QuantileLimit:
    """What is known of the limit so far: it starts at ``max_tokens`` and only falls, to what it is in the end.

    Call it for the number of tokens, from any thread.

    Args:
        quantile: share of the completions that end by themselves, in (0, 1).
        wanted: number of completions of the batch; those that fail count as not ended.
        max_tokens: that no completion has more of, whatever the others do.

    Attributes:
        needed: k, the number of completions that end by themselves.
    """

    def __init__(self, quantile: float, wanted: int, max_tokens: int) -> None:
        self.needed = ended_in(quantile, wanted)
        self._max_tokens = max_tokens
        self.forget()

    def forget(self) -> None:
        """Forget all ends."""
        self._longest_first: list[int] = []  # the k smallest lengths, with their sign turned
        self._tokens = self._max_tokens

    def ended(self, length: int) -> None:
        """Count a completion that has ended by itself, with so many tokens, the end included."""
        if len(self._longest_first) < self.needed:
            heapq.heappush(self._longest_first, -length)
        else:
            heapq.heappushpop(self._longest_first, -length)
        if len(self._longest_first) == self.needed:
            self._tokens = min(self._max_tokens, -self._longest_first[0])

    def __call__(self) -> int:
        """Tokens after which a completion is truncated, as far as is known; the final limit is no greater."""
        return self._tokens


def ended_in(quantile: float, wanted: int) -> int:
    """How many of so many completions a share is, rounded up: the share as it is typed, so .55 of 100 are 55."""
    return math.ceil(Fraction(repr(quantile)) * wanted)


def truncated_at(line: dict[str, Any], limit: int, text_of: Callable[[list[int]], str]) -> dict[str, Any]:
    """A record as it would be had its completion been sampled with this limit.

    Args:
        line: a record of ours, with ``token_ids``; left as it is.
        limit: tokens, fewer than ``max_tokens``.
        text_of: the text of token ids.

    Returns:
        The record itself where its completion ended by then. Otherwise one with the first ``limit`` tokens,
        ``finish_reason: length``, and no log-probability: of most only that of more tokens is known, and which these
        are is a matter of speed.
    """
    if len(line["token_ids"]) <= limit and line["finish_reason"] == "stop":
        return line
    ids = line["token_ids"][:limit]
    return {**line, "completion": text_of(ids), "token_ids": ids, "finish_reason": "length", "logprob": None}
