"""The decode loop: completions that end leave their rows, and the next prompts take their place at once.

With a length value model every row is written under its own control of its length, at one forward of the generator and
one of the length value model a step. Without one this is plain sampling. Whatever writes tokens here is a thin adapter
over `Engine`: `generate`, `stream`, transformers' hook, the local generator of rollouts.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import GenerationError, named
from ..guidance import Control
from ..models.processors import tokenizer_of
from ..models.value_model import LengthValueModel
from ..utils.threads import is_small, one_thread
from . import compatibility
from .candidate_scorer import MOST_CANDIDATES, RowRules, StepResult
from .end_tokens import EndTokens, SegmentEnds
from .kv_cache import FEWEST_ROWS
from .model_runner import ModelRunner
from .prefill import Prefiller, Request
from .running_completion import RunningCompletion
from .sampling import sample_tokens
from .sampling_params import SamplingParams
from .segments import Segment, segment_of, why_not_until
from .vocabulary import forbidden_ids, stop_ids_of

Passed = TypeVar("Passed")
_STEPS_BETWEEN_LAYOUTS = 32  # to lay rows out anew copies all keys and values, which a step only reads
_SPARE_ROWS = 1.2  # rows for each running completion beyond which idle ones are taken away


class Engine(Generic[Passed]):
    """Writes completions in a fixed number of rows.

    Args:
        generator: decoder with a vocabulary head, in eval mode.
        lenvm: length value model of the same vocabulary; None where no request has a control.
        processor: of the generator, or its tokenizer; where given, ids that it has no token for are never sampled.
        stop_ids: ids that end a completion; where None, those that the generator names.
        max_rows: completions written side by side.
        fewest_rows: rows of both caches that there are at least; where None, `FEWEST_ROWS` without a length value model
            and 1 with one.
        compiled: compile the steps of both models, see `compiled`.

    Attributes:
        stop_ids: that end a completion.
        counts_to_the_end: False = the length value model counts to the end of a segment.

    Raises:
        GenerationError: a model that cannot be decoded in rows of a cache, see `compatibility`.
    """

    def __init__(
        self,
        generator: PreTrainedModel,
        lenvm: LengthValueModel | None = None,
        *,
        processor: Any = None,
        stop_ids: frozenset[int] | None = None,
        max_rows: int = 256,
        fewest_rows: int | None = None,
        compiled: bool = False,
    ) -> None:
        self._runner = compatibility.open_runner(generator, compiled)
        if fewest_rows is None:
            fewest_rows = FEWEST_ROWS if lenvm is None else 1
        self._scorer = None if lenvm is None else compatibility.open_scorer(lenvm, fewest_rows, compiled)
        self._device = generator.device
        self._one_thread = is_small(generator) and (lenvm is None or is_small(lenvm.backbone))
        self.stop_ids = stop_ids_of(generator, processor) if stop_ids is None else stop_ids
        self._stop_tensor = torch.tensor(sorted(self.stop_ids), dtype=torch.int64, device=self._device)
        self._tokenizer = tokenizer_of(processor)
        self._forbidden = forbidden_ids(generator, lenvm, processor)
        self._cache = self._runner.new_cache(fewest_rows)
        self._caches = [self._cache] if self._scorer is None else [self._cache, self._scorer.cache]
        readers: list[tuple[ModelRunner, LengthValueModel | None]] = [(self._runner, None)]
        if self._scorer is not None:
            readers.append((self._scorer.runner, self._scorer.lenvm))
        self._prompts = Prefiller(readers)
        self.counts_to_the_end = lenvm is None or lenvm.config.until is None
        self._fewest_rows = fewest_rows
        self._max_rows = max_rows
        self._rows: list[RunningCompletion | None] = []  # of the caches; None = the row is free
        self._rules: RowRules | None = None  # of the rows; None = they have changed
        self._running = 0  # rows that are not free
        self._steps_left = 0  # until the next layout

    @property
    def max_rows(self) -> int:
        """Completions written side by side at most."""
        return self._max_rows

    # -- the loop ---

    def run(self, requests: Iterable[Request | Passed]) -> Iterator[RunningCompletion | Passed]:
        """Yield the completions of all requests as they end; what is no request is passed on."""
        for item in self.steps(requests):
            if isinstance(item, list):
                yield from (completion for completion in item if completion.finish_reason)
            else:
                yield item

    def steps(self, requests: Iterable[Request | Passed]) -> Generator[list[RunningCompletion] | Passed, None, None]:
        """Yield after each step the completions that it has written a token of; what is no request is passed on.

        One run at a time; a run that is abandoned takes its completions with it.
        """
        try:
            yield from self._write(iter(requests))
        finally:
            self._abandon()

    def _write(self, source: Iterator[Request | Passed]) -> Iterator[list[RunningCompletion] | Passed]:
        while True:
            # 1. As long as rows are free, prefill prompts that wait, and put their completions into rows.
            while self._running < self._max_rows:
                if not self._prompts.prefilled:
                    yield from self._prompts.look_ahead(source)
                    if not self._prompts.has_unread:
                        break
                    with one_thread(self._one_thread):
                        unread = self._prompts.prefill()
                    for request, reason in unread:
                        yield RunningCompletion.failed(request, reason)
                    continue
                if not self._fill_rows():
                    break
            if not self._running:
                return
            # 2. Write one token of every completion.
            with one_thread(self._one_thread):
                written = self._step()
            yield written

    @torch.inference_mode()
    def _step(self) -> list[RunningCompletion]:
        """Write one token of every completion, and free the rows of those that it ends."""
        rows = self._rows
        # 1. Feed the tokens chosen last to the generator.
        last_tokens = torch.tensor([[row.last_token if row else 0] for row in rows])
        last_tokens = last_tokens.to(self._device, non_blocking=True)
        logits = self._runner.forward(self._cache, last_tokens).logits[:, -1]
        # 2. Choose the next ones, each row with a uniform number of its own.
        uniforms = torch.tensor([row.uniforms.random() if row else 0.0 for row in rows], dtype=torch.float64)
        numbers, result = self._choose(last_tokens, logits, uniforms.to(self._device, non_blocking=True))
        # 3. Take them from the device: the one wait of a step. Then count them in, and free the rows of the ended.
        written = []
        for place, (row, of_row) in enumerate(zip(rows, numbers.tolist(), strict=True)):
            if row is None:
                continue
            had_control = row.control is not None
            row.take(of_row, result, place, self.stop_ids)
            if had_control and row.control is None:  # its segment has ended, and the rest is the base model's
                self._rules = None
            written.append(row)
            if row.finish_reason:
                self._free(place, wipe=row.finish_reason == "error")
        # 4. Lay the rows out anew when it is time, or when many are idle and nobody waits for them.
        self._steps_left -= 1
        waits = self._prompts.has_waiting
        # Compiled steps keep their rows: another number of them would have to be compiled, which takes longer.
        may_shrink = not (waits or self._cache.static)
        idle = may_shrink and len(self._rows) > max(self._fewest_rows, _SPARE_ROWS * self._running)
        if self._running and (idle or (self._cache.grouped and self._steps_left <= 0)):
            self._lay_out(self._max_rows - self._running if waits else 0)
        return written

    def _choose(self, last_tokens: Tensor, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, StepResult | None]:
        """Tokens, log-probabilities and, with a scorer, what remains after them, of all rows. Shape (B, 2 or 3)."""
        rules = self._rules or self._new_rules()
        self._rules = rules
        if self._scorer is None:
            numbers = torch.zeros(len(logits), 2, dtype=torch.float64, device=logits.device)
            for part, params in rules.unguided:
                whole = len(rules.unguided) == 1
                of_part = (logits, uniforms) if whole else (logits[part], uniforms[part])
                tokens, logprobs = sample_tokens(*of_part, params, self._forbidden)
                numbers[part] = torch.stack([tokens.double(), logprobs.double()], 1)
            return numbers, None
        generated = torch.tensor([len(row.token_ids) if row else 0 for row in self._rows]).to(self._device)
        result = self._scorer.choose(
            last_tokens, logits, uniforms, generated, rules, self._end_tokens(logits), self._forbidden
        )
        columns = (result.tokens, result.logprobs, result.after)
        return torch.stack([column.double() for column in columns], 1), result

    def _new_rules(self) -> RowRules:
        requests = [row.request if row else None for row in self._rows]
        free: SamplingParams | None = None
        if self._scorer is None:
            # Free rows are sampled too, and forgotten: to leave them out costs more.
            free = next(request.params for request in requests if request)
        params = [request.params if request else free for request in requests]
        return RowRules(params, [row.control if row else None for row in self._rows], self._device)

    def _end_tokens(self, logits: Tensor) -> EndTokens:
        """What ends the rows in this step, those with an open segment by what is written of its text."""
        open_rows = {
            place: (row.segment, row.segment.place(row.token_ids))
            for place, row in enumerate(self._rows)
            if row is not None and row.segment is not None and row.control is not None
        }
        if not open_rows:
            return EndTokens(self._stop_tensor)
        return SegmentEnds(self._stop_tensor, open_rows, logits.shape, self._device)

    def _segment(self, control: Control | None) -> Segment | None:
        """What the length value model counts to, and a control acts on; None where that is the end, or nobody knows.

        Raises:
            GenerationError: the control counts to something else than the length value model.
        """
        if self._scorer is None:
            return None
        until = self._scorer.lenvm.config.until
        if against := why_not_until(control, until, self._tokenizer):
            raise GenerationError(against)
        if until is None or self._tokenizer is None:
            return None
        try:
            return segment_of(until, self._tokenizer)
        except GenerationError:  # without a control only what remains is told, to wherever it ends
            return None

    # -- prompts ---

    def why_not(self, request: Request) -> str | None:
        """Why a request with images cannot be written in rows of a cache; None where it can.

        The first prompt with images is read for that. Whether text can be written was checked when the engine was made.
        """
        if not request.inputs or self._prompts.images_are_checked:
            return None
        try:
            self._prompts.prefill_batch(request.inputs, [request], [0])
        except GenerationError as error:
            return str(error)
        except (ValueError, TypeError, IndexError, AttributeError, NotImplementedError) as error:
            return named(error)
        return None

    def prefill_batch(self, inputs: dict[str, Any], requests: Sequence[Request], places: Sequence[int]) -> None:
        """Read a batch of prompts, images included, at once; see `Prefiller.prefill_batch`."""
        self._prompts.prefill_batch(inputs, requests, places)

    # -- rows ---

    @torch.inference_mode()
    def _fill_rows(self) -> bool:
        """Put completions of the next prompt into free rows; False where none has room until the next layout."""
        prompt = self._prompts.prefilled[0]
        request = prompt.request
        length = len(request.prompt_ids) - 1  # the last token is fed by the first step
        count = min(len(prompt.left), self._max_rows - self._running)
        rows = self._rows_for(length)
        if not rows and (not self._running or len(self._rows) < self._max_rows):
            # Twice as many each time: rows that no prompt needs cost no memory.
            self._lay_out(min(self._max_rows - self._running, max(count, len(self._rows))))
            rows = self._rows_for(length)
        rows = rows[:count]
        if not rows:
            return False
        for cache, one in zip(self._caches, request.prefills, strict=True):
            cache.fill(rows, one.cache, [one.row] * len(rows), length, offset=one.offset, start=one.start)
        segment = self._segment(request.control)
        for place in rows:
            self._rows[place] = RunningCompletion.of(request, prompt.left.popleft(), segment)
        self._rules = None
        self._running += len(rows)
        if not prompt.left:
            request.prefills = []  # which may be large
            self._prompts.prefilled.popleft()
        return True

    def _rows_for(self, length: int) -> list[int]:
        """Free rows with room for so many tokens and those of the steps until the next layout, narrow ones first."""
        free = [place for place, row in enumerate(self._rows) if row is None]
        if not self._cache.grouped:  # rows grow together, when the longest must
            return free
        return [place for place in reversed(free) if self._cache.layout.widths[place] >= length + self._steps_left]

    def _lay_out(self, free: int) -> None:
        """Sort the rows by their lengths, with room for some steps, and so many free ones for the prompts that wait."""
        # 1. Rows in use, the longest first.
        lengths = self._cache.lengths
        order = [place for place, row in enumerate(self._rows) if row]
        order.sort(key=lambda place: -lengths[place])
        widths = [lengths[place] + _STEPS_BETWEEN_LAYOUTS for place in order]
        # 2. Free rows among them, where their width belongs: that of the longest prompt that waits.
        longest = max((len(prompt.request.prompt_ids) for prompt in self._prompts.prefilled), default=0)
        free_width = longest + _STEPS_BETWEEN_LAYOUTS
        wider = sum(width > free_width for width in widths)
        order = [*order[:wider], *[-1] * free, *order[wider:]]
        widths = [*widths[:wider], *[free_width] * free, *widths[wider:]]
        # 3. Both caches; rows of the scorer's hold the candidates of a step, too.
        self._cache.lay_out(order, widths)
        if self._scorer is not None:
            wanted = [row.request.params.top_k or MOST_CANDIDATES for row in self._rows if row]
            tried = min(max(wanted, default=0), MOST_CANDIDATES) + 1
            self._scorer.cache.lay_out(order, [width + tried for width in widths])
        # 4. The completions follow their rows; behind them are those that the cache has added.
        moved = [self._rows[place] if place >= 0 else None for place in order]
        self._rows = moved + [None] * (self._cache.rows - len(moved))
        self._rules = None
        self._steps_left = _STEPS_BETWEEN_LAYOUTS

    def _abandon(self) -> None:
        """Forget everything that has not ended."""
        self._prompts.clear()
        for place, row in enumerate(self._rows):
            if row is not None:
                self._free(place, wipe=False)

    def _free(self, place: int, *, wipe: bool) -> None:
        for cache in self._caches:
            cache.free(place, wipe=wipe)
        self._rows[place] = None
        self._rules = None
        self._running -= 1
