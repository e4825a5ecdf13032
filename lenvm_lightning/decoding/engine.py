"""The decode loop: completions that end leave their rows, and the next prompts take their place at once.

With a length value model every row is written under its own control of its length, at one forward of the generator and
one of the length value model a step. Without one this is plain sampling. Whatever writes tokens here is a thin adapter
over `Engine`: `generate`, `stream`, transformers' hook, the local generator of rollouts.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..models.value_model import LengthValueModel
from ..utils.threads import is_small, one_thread
from . import compatibility
from .candidate_scorer import RowRules, StepResult
from .kv_cache import FEWEST_ROWS
from .model_runner import ModelRunner, moved_to
from .requests import PrefilledPrompt, Request, RunningCompletion
from .sampling import sample_tokens
from .sampling_params import SamplingParams
from .vocabulary import forbidden_ids, stop_ids_of

Passed = TypeVar("Passed")
_AHEAD = 16  # prompts looked at, to find some that can be prefilled together
_PREFILL_TOKENS = 1024  # padded tokens of such a prefill: more of them save no time and cost memory
_STEPS_BETWEEN_LAYOUTS = 32  # to lay rows out anew copies all keys and values: about as much as one step reads
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
        self._one_thread = is_small(generator)
        self.stop_ids = stop_ids_of(generator, processor) if stop_ids is None else stop_ids
        self._stop_tensor = torch.tensor(sorted(self.stop_ids), dtype=torch.int64, device=self._device)
        self._forbidden = forbidden_ids(generator, lenvm, processor)
        self._cache = self._runner.new_cache(fewest_rows)
        self._caches = [self._cache] if self._scorer is None else [self._cache, self._scorer.cache]
        self._fewest_rows = fewest_rows
        self._max_rows = max_rows
        self._rows: list[RunningCompletion | None] = []  # of the caches; None = the row is free
        self._rules: RowRules | None = None  # of the rows; None = they have changed
        self._running = 0  # rows that are not free
        self._waiting: list[Request] = []  # looked at, not prefilled yet
        self._prefilled: deque[PrefilledPrompt] = deque()  # prompts whose keys and values wait for rows
        self._steps_left = 0  # until the next layout

    # -- the loop ---

    def run(self, requests: Iterable[Request | Passed]) -> Iterator[RunningCompletion | Passed]:
        """Yield the completions of all requests as they end; what is no request is passed on."""
        for item in self.steps(requests):
            if isinstance(item, list):
                yield from (completion for completion in item if completion.finish_reason)
            else:
                yield item

    def steps(self, requests: Iterable[Request | Passed]) -> Iterator[list[RunningCompletion] | Passed]:
        """Yield after each step the completions that it has written a token of; what is no request is passed on."""
        source = iter(requests)
        while True:
            # 1. As long as rows are free, prefill prompts that wait, and put their completions into rows.
            while self._running < self._max_rows:
                if not self._prefilled:
                    yield from self._look_ahead(source)
                    if not self._waiting:
                        break
                    with one_thread(self._one_thread):
                        self._prefill()
                if not self._fill_rows():
                    break
            if not self._running:
                return
            # 2. Write one token of every completion.
            with one_thread(self._one_thread):
                written = self._step()
            yield written

    def _look_ahead(self, source: Iterator[Request | Passed]) -> Iterator[Passed]:
        while len(self._waiting) < _AHEAD:
            item = next(source, None)
            if item is None:
                return
            if isinstance(item, Request):
                self._waiting.append(item)
            else:
                yield item

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
            row.take(of_row, result, place, self.stop_ids)
            written.append(row)
            if row.finish_reason:
                self._free(place, wipe=row.finish_reason == "error")
        # 4. Lay the rows out anew when it is time, or when many are idle and nobody waits for them.
        self._steps_left -= 1
        waits = bool(self._waiting or self._prefilled)
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
            last_tokens, logits, uniforms, generated, rules, self._stop_tensor, self._forbidden
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
        return RowRules(params, [request.control if request else None for request in requests], self._device)

    # -- prompts ---

    def why_not(self, request: Request) -> str | None:
        """Why a request cannot be written in rows of a cache; None where it can. Text was tried when it was made."""
        if not request.inputs or len(request.prompt_ids) < 2:
            return None
        return compatibility.why_not_with_images(self._runner, request.prompt_ids, request.inputs)

    @torch.inference_mode()
    def prefill_batch(self, inputs: dict[str, Any], requests: Sequence[Request], places: Sequence[int]) -> None:
        """Run a batch of prompts, images included, through both models at once, as a processor has laid it out.

        Args:
            inputs: what the models take: ``input_ids`` and ``attention_mask`` (B, T) among it.
            requests: those of the prompts that are to be answered.
            places: row of the batch that each request's prompt is.
        """
        starts = inputs["attention_mask"].long().argmax(-1).tolist()
        caches = self._prefill_inputs(inputs)
        for request, place in zip(requests, places, strict=True):
            request.prefills = [(cache, place, starts[place], offsets[place]) for cache, offsets in caches]

    def _prefill_inputs(self, inputs: dict[str, Any]) -> list[tuple[Cache, list[int]]]:
        """The cache of each model, and the rope offset of what follows each prompt."""
        return [runner.prefill_inputs(moved_to(runner.model, inputs))[1:] for runner in self._runners]

    @property
    def _runners(self) -> list[ModelRunner]:
        return [self._runner] if self._scorer is None else [self._runner, self._scorer.runner]

    @torch.inference_mode()
    def _prefill(self) -> None:
        """Prefill the first prompt that waits, and with it others that are padded to the same width."""
        first = self._waiting[0]
        group = [first]
        if not first.prefills and first.inputs:
            first.prefills = [(cache, 0, 0, offsets[0]) for cache, offsets in self._prefill_inputs(first.inputs)]
        elif not first.prefills:
            alike = [one for one in self._waiting if one.is_plain_text and one.width == first.width]
            group = alike[: max(1, _PREFILL_TOKENS // max(first.width, 1))]
            caches = [runner.prefill([one.prompt_ids[:-1] for one in group]) for runner in self._runners]
            for row, request in enumerate(group):
                request.prefills = [(cache, row, 0, 0) for cache in caches]
        taken = set(map(id, group))
        self._waiting = [request for request in self._waiting if id(request) not in taken]
        self._prefilled.extend(PrefilledPrompt(request) for request in group)

    # -- rows ---

    @torch.inference_mode()
    def _fill_rows(self) -> bool:
        """Put completions of the next prompt into free rows; False where none has room until the next layout."""
        prompt = self._prefilled[0]
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
        for cache, (prefill, prefill_row, start, offset) in zip(self._caches, request.prefills, strict=True):
            cache.fill(rows, prefill, [prefill_row] * len(rows), length, offset, start)
        for place in rows:
            self._rows[place] = prompt.begin_next()
        self._rules = None
        self._running += len(rows)
        if not prompt.left:
            request.prefills = []  # which may be large
            self._prefilled.popleft()
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
        longest = max((len(prompt.request.prompt_ids) for prompt in self._prefilled), default=0)
        free_width = longest + _STEPS_BETWEEN_LAYOUTS
        wider = sum(width > free_width for width in widths)
        order[wider:wider] = [-1] * free
        widths[wider:wider] = [free_width] * free
        # 3. Both caches; rows of the scorer's hold the candidates of a step, too.
        self._cache.lay_out(order, widths)
        if self._scorer is not None:
            tried = max((row.request.params.top_k for row in self._rows if row), default=0) + 1
            self._scorer.cache.lay_out(order, [width + tried for width in widths])
        # 4. The completions follow their rows; behind them are those that the cache has added.
        moved = [self._rows[place] if place >= 0 else None for place in order]
        self._rows = moved + [None] * (self._cache.rows - len(moved))
        self._rules = None
        self._steps_left = _STEPS_BETWEEN_LAYOUTS

    def _free(self, place: int, *, wipe: bool) -> None:
        for cache in self._caches:
            cache.free(place, wipe=wipe)
        self._rows[place] = None
        self._rules = None
        self._running -= 1
