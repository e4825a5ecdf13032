"""The decode loop: completions that end leave their slots, and the next prompts take their place at once.

With a `Guide` every row is written under its own control of its length, at one forward of the generator
and one of the length value model a step. Without one this is plain sampling.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor
from transformers import Cache

from ..guidance import Control
from ..utils.threads import is_small, one_thread
from .candidate_scorer import Choice, Guide, Rules
from .kv_cache import FEWEST_ROWS, round_up
from .model_runner import PADDING, SlotDecoder
from .sampling import draw
from .sampling_params import SamplingParams

BROKEN = "the model's logits are NaN or infinite, or leave no token to draw"
Passed = TypeVar("Passed")
_AHEAD = 16  # prompts looked at, to find some that can be prefilled together
_PREFILL_TOKENS = 1024  # padded tokens of such a prefill
_LAYOUT = 32  # steps between layouts of the slots


@dataclass(frozen=True)
class Prefix:
    """A prompt that was prefilled: row ``row`` of ``cache`` from column ``start`` on, all tokens but the last.

    Attributes:
        cache: what its model returned.
        row: of the cache.
        start: padding before the prompt.
        offset: what its pictures add to the positions of what follows.
    """

    cache: Cache
    row: int = 0
    start: int = 0
    offset: int = 0


@dataclass
class Job:
    """Completions to write for one prompt.

    Attributes:
        key: whatever the caller knows it by.
        ids: token ids of the prompt, at least one.
        seeds: of its completions, one each.
        max_tokens: tokens of a completion, its end included; longer ones are cut.
        drawing: how its tokens are drawn.
        control: of its length; None leaves it to the base model.
        inputs: what else the models take, tensors of its pictures; empty for text.
        ends: whether what was written so far is to end here, such as with a stop string.
        prefixes: of the generator and of the guide, where somebody has prefilled it already.
    """

    key: Any
    ids: list[int]
    seeds: Sequence[int]
    max_tokens: int
    drawing: SamplingParams = field(default_factory=SamplingParams)
    control: Control | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    ends: Callable[[list[int]], bool] | None = None
    prefixes: tuple[Prefix, ...] = ()

    @property
    def width(self) -> int:
        """Columns of its prefill, which is of all tokens but the last: that one is fed by the first step."""
        return round_up(len(self.ids) - 1, PADDING)


@dataclass
class Row:
    """A completion that is being written, or was.

    Attributes:
        job: what it is of.
        index: which of the job's seeds is its own.
        ids: tokens written so far.
        logprob: sum of the log-probabilities (nats) that the generator gave them, before temperature, truncation and
            control.
        remaining: tokens still to come, by the guide; None without one.
        finish: ``stop`` = an end token or a stop string, ``length`` = ``max_tokens``, ``error`` = `BROKEN`; None
            while it is being written.
        choice: what the last step decided for all rows, and ``place``, which of them this is; None without a guide.
    """

    job: Job
    index: int
    feed: int
    uniforms: Random
    ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    remaining: float | None = None
    finish: Literal["stop", "length", "error"] | None = None
    choice: Choice | None = None
    place: int = 0


@dataclass
class _Ready:
    """A prompt whose keys and values wait for slots."""

    job: Job
    prefixes: tuple[Prefix, ...]
    left: deque[int]


class ContinuousBatch(Generic[Passed]):
    """Writes completions in a fixed number of slots.

    Args:
        decoder: the generator.
        slots: completions written side by side.
        stop: ids that end a completion.
        forbidden: ids that are never drawn. Shape (n,), int64.
        guide: the length value model beside it; None where no job has a control.
    """

    def __init__(
        self,
        decoder: SlotDecoder,
        slots: int,
        stop: frozenset[int],
        forbidden: Tensor | None = None,
        guide: Guide | None = None,
    ) -> None:
        self._decoder = decoder
        self._guide = guide
        self._device = decoder.model.device
        self._small = is_small(decoder.model)
        self._stop = stop
        self._stop_ids = torch.tensor(sorted(stop), dtype=torch.int64, device=self._device)
        self._forbidden = forbidden
        self._fewest = FEWEST_ROWS if guide is None else guide.fewest_rows
        self._cache = decoder.slots(self._fewest)
        self._caches = [self._cache] if guide is None else [self._cache, guide.cache]
        self._most = slots
        self._rows: list[Row | None] = []  # of the caches
        self._rules: Rules | None = None  # of the rows; None = they have changed
        self._live = 0
        self._waiting: list[Job] = []
        self._ready: deque[_Ready] = deque()
        self._steps_left = 0  # until the next layout

    def run(self, jobs: Iterable[Job | Passed]) -> Iterator[Row | Passed]:
        """Yield the completions of all jobs as they end; what is no job is passed on."""
        for item in self.steps(jobs):
            if isinstance(item, list):
                yield from (row for row in item if row.finish)
            else:
                yield item

    def steps(self, jobs: Iterable[Job | Passed]) -> Iterator[list[Row] | Passed]:
        """Yield after each step the rows that it has written a token of; what is no job is passed on."""
        source = iter(jobs)
        while True:
            while self._live < self._most:
                if not self._ready:
                    yield from self._look_ahead(source)
                    if not self._waiting:
                        break
                    with one_thread(self._small):
                        self._prefill()
                if not self._fill():
                    break
            if not self._live:
                return
            with one_thread(self._small):
                written = self._step()
            yield written

    def _look_ahead(self, source: Iterator[Job | Passed]) -> Iterator[Passed]:
        while len(self._waiting) < _AHEAD:
            job = next(source, None)
            if job is None:
                return
            if isinstance(job, Job):
                self._waiting.append(job)
            else:
                yield job

    @torch.inference_mode()
    def _prefill(self) -> None:
        """Prefill the first prompt that waits, and with it others that are padded to the same width."""
        first = self._waiting[0]
        decoders = [self._decoder] if self._guide is None else [self._decoder, self._guide.decoder]
        if first.prefixes:
            group, prefixes = [first], [first.prefixes]
        elif first.inputs:
            group = [first]
            inputs = [first.inputs] if self._guide is None else [first.inputs, self._guide.moved(first.inputs)]
            results = [decoder.prefill_inputs(own)[1:] for decoder, own in zip(decoders, inputs, strict=True)]
            prefixes = [tuple(Prefix(cache, offset=offsets[0]) for cache, offsets in results)]
        else:
            group = [job for job in self._waiting if not (job.inputs or job.prefixes) and job.width == first.width]
            group = group[: max(1, _PREFILL_TOKENS // max(first.width, 1))]
            caches = [decoder.prefill([job.ids[:-1] for job in group]) for decoder in decoders]
            prefixes = [tuple(Prefix(cache, row) for cache in caches) for row in range(len(group))]
        taken = set(map(id, group))
        self._waiting = [job for job in self._waiting if id(job) not in taken]
        self._ready.extend(
            _Ready(job, own, deque(range(len(job.seeds)))) for job, own in zip(group, prefixes, strict=True)
        )

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
        for cache, prefix in zip(self._caches, prompt.prefixes, strict=True):
            cache.fill(rows, prefix.cache, [prefix.row] * len(rows), length, prefix.offset, prefix.start)
        for place in rows:
            index = prompt.left.popleft()
            self._rows[place] = Row(job, index, job.ids[-1], Random(job.seeds[index]))
        self._rules = None
        self._live += len(rows)
        if not prompt.left:
            self._ready.popleft()
        return True

    def _rows_for(self, length: int) -> list[int]:
        """Free rows with room for so many tokens and those of the steps until the next layout, narrow ones first."""
        free = [place for place, row in enumerate(self._rows) if row is None]
        if not self._cache.tight:  # rows grow together, when the longest must
            return free
        return [place for place in reversed(free) if self._cache.widths[place] >= length + self._steps_left]

    def _lay_out(self, free: int) -> None:
        """Sort the rows by their lengths, with room for some steps, and so many free ones for the prompts that wait."""
        lengths = self._cache.lengths
        order = sorted((place for place, row in enumerate(self._rows) if row), key=lambda place: -lengths[place])
        widths = [lengths[place] + _LAYOUT for place in order]
        longest = max([len(prompt.job.ids) for prompt in self._ready], default=0)
        before = sum(width > longest + _LAYOUT for width in widths)
        order[before:before], widths[before:before] = [-1] * free, [longest + _LAYOUT] * free
        most = 0
        for cache in self._caches:
            cache.lay_out(order, [width + most for width in widths])
            most = self._guide_width()  # the guide's rows hold the candidates of a step too
        rows = [self._rows[place] if place >= 0 else None for place in order]
        self._rows = rows + [None] * (self._cache.rows - len(rows))
        self._rules = None
        self._steps_left = _LAYOUT

    def _guide_width(self) -> int:
        return max([row.job.drawing.top_k for row in self._rows if row], default=0) + 1

    @torch.inference_mode()
    def _step(self) -> list[Row]:
        """Write one token of every completion, and free the rows of those that it ends."""
        rows = self._rows
        feed = torch.tensor([[row.feed if row else 0] for row in rows]).to(self._device, non_blocking=True)
        logits = self._decoder.forward(self._cache, feed).logits[:, -1]
        uniforms = torch.tensor([row.uniforms.random() if row else 0.0 for row in rows], dtype=torch.float64)
        numbers, choice = self._draw(feed, logits, uniforms.to(self._device, non_blocking=True))
        written = []
        for place, (row, token, logprob, *after) in enumerate(zip(rows, *numbers.tolist(), strict=True)):  # one wait
            if row is None:
                continue
            row.feed = int(token)
            row.ids.append(row.feed)
            row.logprob += logprob
            row.remaining = after[0] if after else None
            row.choice, row.place = choice, place
            row.finish = self._finish(row)
            written.append(row)
            if row.finish:
                self._free(place, wipe=row.finish == "error")
        self._steps_left -= 1
        waits = bool(self._waiting or self._ready)
        # Compiled steps keep their rows: another number of them would have to be compiled, which takes longer.
        idle = not (waits or self._cache.static) and len(self._rows) > max(self._fewest, 1.2 * self._live)
        if self._live and (idle or (self._cache.tight and self._steps_left <= 0)):
            self._lay_out(self._most - self._live if waits else 0)
        return written

    def _draw(self, feed: Tensor, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Choice | None]:
        """Tokens, log-probabilities and, with a guide, what remains after them, of all rows. Shape (2 or 3, B)."""
        if self._rules is None:
            jobs = [row.job if row else None for row in self._rows]
            # Without a guide free rows are drawn too, and forgotten: to leave them out costs more.
            free = None if self._guide else next(job.drawing for job in jobs if job)
            drawings = [job.drawing if job else free for job in jobs]
            self._rules = Rules(drawings, [job.control if job else None for job in jobs], self._device)
        if self._guide is None:
            result = torch.zeros(2, len(logits), dtype=torch.float64, device=logits.device)
            for part, drawing in self._rules.unguided:
                whole = len(self._rules.unguided) == 1
                chosen = (logits, uniforms) if whole else (logits[part], uniforms[part])
                drawn = draw(*chosen, drawing, self._forbidden)
                result[:, part] = torch.stack([numbers.double() for numbers in drawn])
            return result, None
        generated = torch.tensor([len(row.ids) if row else 0 for row in self._rows])
        choice = self._guide.choose(
            feed, logits, uniforms, generated.to(self._device), self._rules, self._stop_ids, self._forbidden
        )
        return torch.stack([choice.tokens.double(), choice.logprobs.double(), choice.after.double()]), choice

    def _finish(self, row: Row) -> Literal["stop", "length", "error"] | None:
        if row.feed < 0:
            return "error"
        if row.feed in self._stop or (row.job.ends is not None and row.job.ends(row.ids)):
            return "stop"
        return "length" if len(row.ids) == row.job.max_tokens else None

    def _free(self, place: int, *, wipe: bool) -> None:
        for cache in self._caches:
            cache.free(place, wipe=wipe)
        self._rows[place] = None
        self._rules = None
        self._live -= 1
