"""What the engine is asked to write, and what is being written."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

from transformers import Cache

from ..guidance import Control
from .candidate_scorer import StepResult
from .kv_layout import round_up
from .model_runner import PADDING
from .sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "error"]
BROKEN = "the model's logits are NaN or infinite, or leave no token to sample"
BROKEN_UNDER_CONTROL = (
    "logits, values or probabilities under the control are NaN or infinite, or leave no token to sample"
)
Prefill = tuple[Cache, int, int, int]
"""Where a prompt is, all tokens but the last: cache, its row, the column it starts at, its rope offset."""


@dataclass
class Request:
    """Completions to write for one prompt.

    Attributes:
        key: whatever the caller knows it by.
        prompt_ids: token ids, at least one.
        seeds: of its completions, one each; that of ``params`` is not read.
        params: how its tokens are sampled, and how many at most.
        control: of its length; None leaves it to the base model.
        inputs: what else the models take, tensors of its images; empty for text.
        ends: whether what was written so far is to end here, such as with a stop string; None where nothing says so.
        prefills: of the generator and of the length value model, once they have read the prompt.
    """

    key: Any
    prompt_ids: list[int]
    seeds: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    control: Control | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    ends: Callable[[list[int]], bool] | None = None
    prefills: list[Prefill] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Columns of its prefill, which is of all tokens but the last: that one is fed by the first step."""
        return round_up(len(self.prompt_ids) - 1, PADDING)

    @property
    def is_plain_text(self) -> bool:
        """Whether it can be prefilled beside other texts."""
        return not self.inputs and not self.prefills


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
        finish_reason: ``stop`` = an end token or a stop string, ``length`` = truncated at ``max_tokens``, ``error`` =
            see ``error``; None while it is being written.
        result: what the last step decided for all rows, and ``place``, which of them this is; None without a scorer.
    """

    request: Request
    index: int
    last_token: int
    uniforms: Random
    token_ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    remaining: float | None = None
    finish_reason: FinishReason | None = None
    result: StepResult | None = None
    place: int = 0

    def take(self, numbers: Sequence[float], result: StepResult | None, place: int, stop_ids: frozenset[int]) -> None:
        """Count in what a step has chosen: token, log-probability and, with a scorer, what remains after it."""
        token, logprob, *after = numbers
        self.last_token = int(token)
        self.token_ids.append(self.last_token)
        self.logprob += logprob
        self.remaining = after[0] if after else None
        self.result, self.place = result, place
        self.finish_reason = self._finish(stop_ids)

    def _finish(self, stop_ids: frozenset[int]) -> FinishReason | None:
        if self.last_token < 0:
            return "error"
        ends = self.request.ends
        if self.last_token in stop_ids or (ends is not None and ends(self.token_ids)):
            return "stop"
        return "length" if len(self.token_ids) == self.request.params.max_tokens else None

    @property
    def error(self) -> str | None:
        """Why it failed; None where it did not."""
        if self.finish_reason != "error":
            return None
        return BROKEN if self.request.control is None else BROKEN_UNDER_CONTROL


class PrefilledPrompt:
    """A prompt whose keys and values wait for rows.

    Attributes:
        request: what it is of.
        left: seeds, by their place, of completions that have not begun.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.left = deque(range(len(request.seeds)))

    def begin_next(self) -> RunningCompletion:
        """The next completion; its first step feeds the last token of the prompt."""
        index = self.left.popleft()
        return RunningCompletion(self.request, index, self.request.prompt_ids[-1], Random(self.request.seeds[index]))
