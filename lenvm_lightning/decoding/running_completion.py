"""A completion that is being written in a row of the engine."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from ..guidance import Control
from .candidate_scorer import StepResult
from .prefill import Request
from .segments import Segment

FinishReason = Literal["stop", "length", "error"]
BROKEN = "the model's logits are NaN or infinite, or leave no token to sample"
BROKEN_UNDER_CONTROL = (
    "logits, values or probabilities under the control are NaN or infinite, or leave no token to sample"
)


@dataclass
class RunningCompletion:
    """A completion that is being written, or was.

    Attributes:
        request: what it is of.
        index: which of the request's seeds is its own.
        last_token: what the next step feeds.
        uniforms: where the numbers come from that its tokens are sampled with.
        token_ids: written so far.
        logprob: sum of the log-probabilities (nats) that the generator gave them, before temperature, truncation and
            control.
        remaining: tokens still to come, by the length value model; None without one.
        finish_reason: ``stop`` = an end token or a stop string, ``length`` = truncated at its limit, ``error`` =
            see ``error``; None while it is being written.
        unread: why a model cannot read its prompt; None where it can.
        result: what the last step decided for all rows, and ``place``, which of them this is; None without a scorer.
        segment: what the length value model counts to, and where a control stops acting; None where it never does.
        is_open: True = the text that ends the segment has not been written.
        was_guided: True = the last token was chosen under the control.
    """

    request: Request
    index: int
    last_token: int
    uniforms: Random
    token_ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    remaining: float | None = None
    finish_reason: FinishReason | None = None
    unread: str | None = None
    result: StepResult | None = None
    place: int = 0
    segment: Segment | None = None
    is_open: bool = True
    was_guided: bool = False

    @property
    def control(self) -> Control | None:
        """What the next token is chosen under; None behind the end of its segment, as without a control."""
        return self.request.control if self.is_open else None

    def take(self, numbers: Sequence[float], result: StepResult | None, place: int, stop_ids: frozenset[int]) -> None:
        """Count in what a step has chosen: token, log-probability and, with a scorer, what remains after it."""
        token, logprob, *after = numbers
        self.last_token = int(token)
        self.token_ids.append(self.last_token)
        self.logprob += logprob
        self.remaining = after[0] if after else None
        self.result, self.place = result, place
        self.was_guided = self.control is not None
        if self.segment is not None:
            self.is_open = self.is_open and not self.segment.is_ended_by(self.token_ids)
            self.remaining = self.remaining if self.is_open else 0.0
        self.finish_reason = self._finish(stop_ids)

    def _finish(self, stop_ids: frozenset[int]) -> FinishReason | None:
        if self.last_token < 0:
            return "error"
        ends = self.request.ends
        if self.last_token in stop_ids or (ends is not None and ends(self.token_ids)):
            return "stop"
        return "length" if len(self.token_ids) >= self.request.most_tokens else None

    @classmethod
    def of(cls, request: Request, index: int, segment: Segment | None = None) -> "RunningCompletion":
        """One that begins: its first step feeds the last token of the prompt."""
        return cls(request, index, request.prompt_ids[-1], Random(request.seeds[index]), segment=segment)

    @classmethod
    def failed(cls, request: Request, reason: str) -> "list[RunningCompletion]":
        """Those of a prompt that cannot be read: they end before they begin."""
        count = range(len(request.seeds))
        return [cls(request, k, -1, Random(), finish_reason="error", unread=reason) for k in count]

    @property
    def error(self) -> str | None:
        """Why it failed; None where it did not."""
        if self.finish_reason != "error" or self.unread is not None:
            return self.unread
        return BROKEN if self.request.control is None else BROKEN_UNDER_CONTROL
