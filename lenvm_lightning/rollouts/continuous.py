"""Continuous batching: finished completions leave their slots, and the next prompts take their place at once."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ..decoding import SlotDecoder
from ..sampling import draw
from ..slots import SlotCache, round_up
from .generation import Answer, Completion, Failure, Sampling, completion_seed

BROKEN = Failure("the model's logits are NaN or infinite, or leave no token to draw", final=True)
_AHEAD = 16  # prompts looked at, to find some that can be prefilled together
_PREFILL_TOKENS = 1024  # padded tokens of such a prefill
_SORT_EVERY = 8  # steps


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
        return round_up(len(self.ids) - 1)


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
        self._cache = SlotCache()
        self._most = self._free = slots
        self._slots: list[_Writing | None] = []  # one a row of the cache
        self._waiting: list[Job] = []
        self._ready: deque[_Prefilled] = deque()
        self._steps = 0

    def run(self, jobs: Iterable[Job | Answer]) -> Iterator[Answer]:
        """Yield the completions of all jobs as they end; answers among the jobs are passed on."""
        source = iter(jobs)
        while True:
            while self._free:
                if not self._ready:
                    yield from self._look_ahead(source)
                    if not self._waiting:
                        break
                    self._prefill()
                self._fill()
            if self._free == self._most:
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
    def _fill(self) -> None:
        """Put completions of the next prompt into free slots."""
        prompt = self._ready[0]
        job, length, count = prompt.job, len(prompt.job.ids) - 1, min(self._free, len(prompt.left))
        # Twice as many each time, up to the most: slots that no prompt needs cost no memory.
        taken = self._most - self._free
        self._cache.reserve(min(self._most, max(taken + count, 2 * len(self._slots))), length + 1)
        self._slots += [None] * (self._cache.rows - len(self._slots))
        rows = [row for row, writing in enumerate(self._slots) if writing is None][:count]
        self._cache.fill(rows, prompt.cache, [prompt.row] * count, length, prompt.offset)
        for row in rows:
            number = prompt.left.popleft()
            seed = completion_seed(self._sampling.seed, job.prompt_id, number)
            self._slots[row] = _Writing(job.prompt_id, number, seed, Random(seed), job.ids[-1])
        self._free -= count
        if not prompt.left:
            self._ready.popleft()

    @torch.inference_mode()
    def _step(self) -> list[Answer]:
        """Write one token of every completion; return those that it ends."""
        rows = self._slots[: self._cache.used]
        device = self._decoder.model.device
        feed = torch.tensor([[row.feed if row else 0] for row in rows])
        logits = self._decoder.forward(self._cache, feed.to(device, non_blocking=True)).logits[:, -1]
        uniforms = torch.tensor(
            [writing.uniforms.random() if writing else 0.0 for writing in rows], dtype=torch.float64
        )
        drawn = draw(logits, uniforms.to(device, non_blocking=True), **self._draw)
        tokens, logprobs = torch.stack([part.double() for part in drawn]).tolist()  # the one wait for the device
        answers = []
        for row, (writing, token, logprob) in enumerate(zip(rows, map(int, tokens), logprobs, strict=True)):
            if writing is None:
                continue
            writing.feed = token
            writing.ids.append(token)
            writing.logprob += logprob
            if token < 0 or token in self._stop or len(writing.ids) == self._sampling.max_tokens:
                answers.append(Answer(writing.prompt_id, writing.number, self._result(writing)))
                self._slots[row] = None
                self._cache.free(row, wipe=token < 0)
        self._free += len(answers)
        self._tidy()
        return answers

    def _result(self, writing: _Writing) -> Completion | Failure:
        if writing.feed < 0:
            return BROKEN
        text, ended = self._text_of(writing.ids), writing.feed in self._stop
        return Completion(text, writing.ids, "stop" if ended else "length", writing.logprob, writing.seed)

    def _tidy(self) -> None:
        """Keep slots in the order of their lengths where that is of use, and the free ones last when nobody waits."""
        self._steps += 1
        holes = self._free and not self._waiting and not self._ready
        if holes or (self._decoder.spans and self._steps % _SORT_EVERY == 0):
            self._slots = [self._slots[row] for row in self._cache.sort()]
