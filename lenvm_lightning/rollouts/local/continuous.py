"""Continuous batching: finished completions leave their slots, and the next prompts take their place at once."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ...decoding import PADDING, SlotDecoder
from ...sampling import draw
from ...slots import FEWEST_ROWS, round_up
from ..generation import Answer, Completion, Failure, Sampling, completion_seed

BROKEN = Failure("the model's logits are NaN or infinite, or leave no token to draw", final=True)
_AHEAD = 16  # prompts looked at, to find some that can be prefilled together
_PREFILL_TOKENS = 1024  # padded tokens of such a prefill
_LAYOUT = 32  # steps between layouts of the slots


@dataclass
class Job:
    """Completions to write for one prompt.

    Attributes:
        prompt_id: of the prompt.
        numbers: which completions.
        ids: token ids of the prompt, at least one.
        inputs: what else the model takes, tensors of its pictures; empty for text.
    """

    prompt_id: str
    numbers: Sequence[int]
    ids: list[int]
    inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Columns of its prefill, which is of all tokens but the last: that one is fed by the first step."""
        return round_up(len(self.ids) - 1, PADDING)


@dataclass
class _Prefilled:
    """A prompt whose keys and values wait for slots: row ``row`` of ``cache``."""

    job: Job
    cache: Cache
    row: int
    offset: int
    left: deque[int]


@dataclass
class _Writing:
    """A completion in a slot; ``feed`` is the token that the next step takes."""

    prompt_id: str
    number: int
    seed: int
    uniforms: Random
    feed: int
    ids: list[int] = field(default_factory=list)
    logprob: float = 0.0


def draw_settings(sampling: Sampling, forbidden: Tensor | None) -> dict[str, Any]:
    """Arguments of :func:`~lenvm_lightning.sampling.draw`."""
    names = ("temperature", "top_k", "top_p", "min_p")
    return {"forbidden": forbidden, **{name: getattr(sampling, name) for name in names}}


class ContinuousBatch:
    """Writes completions in a fixed number of slots.

    Args:
        decoder: the model.
        slots: completions written side by side.
        sampling: how tokens are drawn.
        stop: ids that end a completion.
        forbidden: ids that are never drawn. Shape (n,), int64.
        text_of: token ids to text.
    """

    def __init__(
        self,
        decoder: SlotDecoder,
        slots: int,
        sampling: Sampling,
        stop: frozenset[int],
        forbidden: Tensor | None,
        text_of: Callable[[list[int]], str],
    ) -> None:
        self._decoder = decoder
        self._sampling = sampling
        self._stop = stop
        self._text_of = text_of
        self._draw = draw_settings(sampling, forbidden)
        self._cache = decoder.slots()
        self._most = slots
        self._rows: list[_Writing | None] = []  # of the cache
        self._live = 0
        self._waiting: list[Job] = []
        self._ready: deque[_Prefilled] = deque()
        self._steps_left = 0  # until the next layout

    def run(self, jobs: Iterable[Job | Answer]) -> Iterator[Answer]:
        """Yield the completions of all jobs as they end; answers among the jobs are passed on."""
        source = iter(jobs)
        while True:
            while self._live < self._most:
                if not self._ready:
                    yield from self._look_ahead(source)
                    if not self._waiting:
                        break
                    self._prefill()
                if not self._fill():
                    break
            if not self._live:
                return
            yield from self._step()

    def _look_ahead(self, source: Iterator[Job | Answer]) -> Iterator[Answer]:
        while len(self._waiting) < _AHEAD:
            job = next(source, None)
            if job is None:
                return
            if isinstance(job, Answer):
                yield job
            else:
                self._waiting.append(job)

    @torch.inference_mode()
    def _prefill(self) -> None:
        """Prefill the first prompt that waits, and with it others that are padded to the same width."""
        first = self._waiting[0]
        offset = 0
        if first.inputs:
            group = [first]
            _, cache, offset = self._decoder.prefill_inputs(first.inputs)
        else:
            group = [job for job in self._waiting if not job.inputs and job.width == first.width]
            group = group[: max(1, _PREFILL_TOKENS // max(first.width, 1))]
            cache = self._decoder.prefill([job.ids[:-1] for job in group])
        taken = set(map(id, group))
        self._waiting = [job for job in self._waiting if id(job) not in taken]
        self._ready.extend(_Prefilled(job, cache, row, offset, deque(job.numbers)) for row, job in enumerate(group))

    @torch.inference_mode()
    def _fill(self) -> bool:
        """Put completions of the next prompt into free rows; False where none has room until the next layout."""
        prompt = self._ready[0]
        job, length, count = prompt.job, len(prompt.job.ids) - 1, min(len(prompt.left), self._most - self._live)
        rows = self._rows_for(length)
        if not rows and (not self._live or len(self._rows) < self._most):
            # Twice as many each time: slots that no prompt needs cost no memory.
            self._lay_out(min(self._most - self._live, max(count, len(self._rows))))
            rows = self._rows_for(length)
        rows = rows[:count]
        if not rows:
            return False
        self._cache.fill(rows, prompt.cache, [prompt.row] * len(rows), length, prompt.offset)
        for row in rows:
            number = prompt.left.popleft()
            seed = completion_seed(self._sampling.seed, job.prompt_id, number)
            self._rows[row] = _Writing(job.prompt_id, number, seed, Random(seed), job.ids[-1])
        self._live += len(rows)
        if not prompt.left:
            self._ready.popleft()
        return True

    def _rows_for(self, length: int) -> list[int]:
        """Free rows with room for so many tokens and those of the steps until the next layout, narrow ones first."""
        free = [row for row, writing in enumerate(self._rows) if writing is None]
        if not self._cache.tight:  # rows grow together, when the longest must
            return free
        return [row for row in reversed(free) if self._cache.widths[row] >= length + self._steps_left]

    def _lay_out(self, free: int) -> None:
        """Sort the rows by their lengths, with room for some steps, and so many free ones for the prompts that wait."""
        lengths = self._cache.lengths
        order = sorted((row for row, writing in enumerate(self._rows) if writing), key=lambda row: -lengths[row])
        widths = [lengths[row] + _LAYOUT for row in order]
        longest = max([len(prompt.job.ids) for prompt in self._ready], default=0)
        place = sum(width > longest + _LAYOUT for width in widths)
        order[place:place], widths[place:place] = [-1] * free, [longest + _LAYOUT] * free
        self._cache.lay_out(order, widths)
        rows = [self._rows[row] if row >= 0 else None for row in order]
        self._rows = rows + [None] * (self._cache.rows - len(rows))
        self._steps_left = _LAYOUT

    @torch.inference_mode()
    def _step(self) -> list[Answer]:
        """Write one token of every completion; return those that it ends."""
        rows = self._rows
        device = self._decoder.model.device
        feed = torch.tensor([[row.feed if row else 0] for row in rows])
        logits = self._decoder.forward(self._cache, feed.to(device, non_blocking=True)).logits[:, -1]
        uniforms = torch.tensor([row.uniforms.random() if row else 0.0 for row in rows], dtype=torch.float64)
        drawn = draw(logits, uniforms.to(device, non_blocking=True), **self._draw)
        tokens, logprobs = torch.stack([part.double() for part in drawn]).tolist()  # the one wait for the device
        answers = []
        for place, (writing, token, logprob) in enumerate(zip(rows, map(int, tokens), logprobs, strict=True)):
            if writing is None:
                continue
            writing.feed = token
            writing.ids.append(token)
            writing.logprob += logprob
            if token < 0 or token in self._stop or len(writing.ids) == self._sampling.max_tokens:
                answers.append(Answer(writing.prompt_id, writing.number, self._result(writing)))
                self._rows[place] = None
                self._cache.free(place, wipe=token < 0)
        self._live -= len(answers)
        self._steps_left -= 1
        waits = bool(self._waiting or self._ready)
        idle = not waits and len(self._rows) > max(FEWEST_ROWS, 1.2 * self._live)
        if self._live and (idle or (self._cache.tight and self._steps_left <= 0)):
            self._lay_out(self._most - self._live if waits else 0)
        return answers

    def _result(self, writing: _Writing) -> Completion | Failure:
        if writing.feed < 0:
            return BROKEN
        text, ended = self._text_of(writing.ids), writing.feed in self._stop
        return Completion(text, writing.ids, "stop" if ended else "length", writing.logprob, writing.seed)
