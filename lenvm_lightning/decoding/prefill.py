"""What the engine is asked to write, and its prompts: read by both models, those of one width together."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import GenerationError, named
from ..guidance import Control
from ..models.value_model import LengthValueModel
from ..utils.memory import is_of_memory
from .compatibility import require_same_after_images
from .kv_layout import round_up
from .model_runner import PADDING, ModelRunner, Prefill, moved_to
from .sampling_params import SamplingParams

_END = object()  # of a source of requests: None may be an item of it
_AHEAD = 16  # prompts looked at, to find some that can be prefilled together
_PREFILL_TOKENS = 1024  # padded tokens of such a prefill: more of them save no time and cost memory


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
        limit: tokens after which a completion is truncated, where that is less than ``params.max_tokens``; asked at
            every step, for it may fall while one is written.
    """

    key: Any
    prompt_ids: list[int]
    seeds: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    control: Control | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    ends: Callable[[list[int]], bool] | None = None
    prefills: list[Prefill] = field(default_factory=list)
    limit: Callable[[], int] | None = None

    @property
    def most_tokens(self) -> int:
        """Tokens after which a completion is truncated, now."""
        most = self.params.max_tokens
        return most if self.limit is None else min(most, self.limit())

    @property
    def width(self) -> int:
        """Columns of its prefill, which is of all tokens but the last: that one is fed by the first step."""
        return round_up(len(self.prompt_ids) - 1, PADDING)

    @property
    def is_plain_text(self) -> bool:
        """Whether it can be prefilled beside other texts."""
        return not self.inputs and not self.prefills


@dataclass
class PrefilledPrompt:
    """A prompt whose keys and values wait for rows.

    Attributes:
        request: what it is of.
        left: seeds, by their place, of completions that have not begun.
    """

    request: Request
    left: deque[int]


class Prefiller:
    """Prompts on their way into rows: looked at, prefilled, and waiting until rows are free.

    Args:
        readers: the models that read a prompt, the generator first; beside the runner of a length value model that
            model itself.
    """

    def __init__(self, readers: Sequence[tuple[ModelRunner, LengthValueModel | None]]) -> None:
        self._readers = readers
        self.images_are_checked = False  # that the models say in rows what they say on their own, after images
        self._waiting: list[Request] = []  # looked at, not prefilled yet
        self.prefilled: deque[PrefilledPrompt] = deque()

    @property
    def has_waiting(self) -> bool:
        """Whether there are prompts, read or not, that have completions to begin."""
        return bool(self._waiting or self.prefilled)

    @property
    def has_unread(self) -> bool:
        """Whether there are prompts to prefill."""
        return bool(self._waiting)

    def clear(self) -> None:
        """Forget all prompts."""
        self._waiting.clear()
        self.prefilled.clear()

    def look_ahead(self, source: Iterator[Any]) -> Iterator[Any]:
        """Take requests from a source, a few; what is no request is yielded."""
        while len(self._waiting) < _AHEAD:
            item = next(source, _END)
            if item is _END:
                return
            if isinstance(item, Request):
                self._waiting.append(item)
            else:
                yield item

    def prefill(self) -> list[tuple[Request, str]]:
        """Prefill the first prompt that waits, and with it others that are padded to the same width.

        Returns:
            Those that a model cannot read, and why; the others go on.
        """
        first = self._waiting[0]
        group = [first]
        if first.is_plain_text:
            alike = [one for one in self._waiting if one.is_plain_text and one.width == first.width]
            group = alike[: max(1, _PREFILL_TOKENS // max(first.width, 1))]
        taken = set(map(id, group))
        self._waiting = [request for request in self._waiting if id(request) not in taken]
        failed = self._read(group)
        wrong = {id(request) for request, _ in failed}
        read = (request for request in group if id(request) not in wrong)
        self.prefilled.extend(PrefilledPrompt(one, deque(range(len(one.seeds)))) for one in read)
        return failed

    @torch.inference_mode()
    def _read(self, group: Sequence[Request]) -> list[tuple[Request, str]]:
        """Run prompts through all models, together; where that fails, each on its own, to find those that fail."""
        first = group[0]
        try:
            if not first.prefills and first.inputs:
                self.prefill_batch(first.inputs, [first], [0])
            elif not first.prefills:
                caches = [runner.prefill([one.prompt_ids[:-1] for one in group]) for runner, _ in self._readers]
                for row, request in enumerate(group):
                    request.prefills = [Prefill(cache, row) for cache in caches]
        except Exception as error:
            if is_of_memory(error):  # no prompt's fault alone
                raise
            if len(group) == 1:
                return [(first, str(error) if isinstance(error, GenerationError) else named(error))]
            return [failure for request in group for failure in self._read([request])]
        return []

    @torch.inference_mode()
    def prefill_batch(self, inputs: dict[str, Any], requests: Sequence[Request], places: Sequence[int]) -> None:
        """Run a batch of prompts, images included, through both models at once, as a processor has laid it out.

        Args:
            inputs: what the models take: ``input_ids`` and ``attention_mask`` (B, T) among it.
            requests: those of the prompts that are to be answered.
            places: row of the batch that each request's prompt is.

        Raises:
            GenerationError: a model that cannot be decoded in rows after images.
        """
        mask = inputs["attention_mask"].bool()
        starts = mask.long().argmax(-1).tolist()
        # What the models say after the last column is of use for prompts that end there: not before padding.
        ending = [n for n, place in enumerate(places) if mask[place, -1] and len(requests[n].prompt_ids) > 1]
        prompts = [requests[n].prompt_ids for n in ending]
        prefills = []
        for runner, lenvm in self._readers:
            output, cache, offsets = runner.prefill_inputs(moved_to(runner.model, inputs))
            of_requests = [Prefill(cache, place, starts[place], offsets[place]) for place in places]
            if ending:
                require_same_after_images(runner, lenvm, output, [of_requests[n] for n in ending], prompts)
            prefills.append(of_requests)
        self.images_are_checked |= bool(ending)  # by all models, not by the first alone
        for request, *of_models in zip(requests, *prefills, strict=True):
            request.prefills = of_models
