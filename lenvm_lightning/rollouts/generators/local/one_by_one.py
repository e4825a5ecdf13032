"""The slow way, for models that cannot be decoded in rows of a cache: ``generate``, one prompt at a time."""

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ....decoding.prefill import Request
from ....decoding.running_completion import BROKEN
from ....decoding.sampling import sample_tokens
from ....decoding.sampling_params import SamplingParams
from ..interface import Answer, Failure, GeneratedText


class _Sampler(LogitsProcessor):
    """Samples the tokens itself, and leaves ``generate`` no choice but to take them."""

    def __init__(self, seeds: Sequence[int], params: SamplingParams, forbidden: Tensor | None) -> None:
        self.ids: list[Tensor] = []  # of each step, (n,)
        self.logprobs: list[Tensor] = []
        self._uniforms = [Random(seed) for seed in seeds]
        self._params, self._forbidden = params, forbidden

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniforms = torch.tensor([row.random() for row in self._uniforms], dtype=torch.float64, device=scores.device)
        ids, logprobs = sample_tokens(scores, uniforms, self._params, self._forbidden)
        self.ids.append(ids)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter_(1, ids.clamp(min=0)[:, None], 0.0)


class _Ends(StoppingCriteria):
    """Ends a row where its request says so, such as after a stop string."""

    def __init__(self, ends: Callable[[list[int]], bool], prompt: int) -> None:
        self._ends, self._prompt = ends, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        ended = [self._ends(row[self._prompt :].tolist()) for row in input_ids]
        return torch.tensor(ended, device=input_ids.device)


def write_with_generate(
    model: Any,
    request: Request,
    stop_ids: frozenset[int],
    forbidden: Tensor | None,
    text_of: Callable[[list[int]], str],
) -> Iterator[Answer]:
    """Yield the completions of one prompt.

    Their tokens come from the same seeds, but the number of completions asked for together may change how the model
    rounds.

    Args:
        model: with its vocabulary head.
        request: its key is what was asked.
        stop_ids: ids that end a completion.
        forbidden: ids that are never sampled. Shape (n,), int64.
        text_of: token ids to text.
    """
    sampler = _Sampler(request.seeds, request.params, forbidden)
    inputs = request.inputs or {"input_ids": torch.tensor([request.prompt_ids], device=model.device)}
    criteria = StoppingCriteriaList()
    if request.ends is not None:
        criteria.append(_Ends(request.ends, inputs["input_ids"].shape[1]))
    own = model.generation_config
    # Not as an argument: what it does not name would come from the model's own, penalties among it.
    model.generation_config = GenerationConfig(
        max_new_tokens=request.most_tokens,
        do_sample=True,
        num_return_sequences=len(request.seeds),
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=min(stop_ids, default=0),
    )
    try:
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            model.generate(**inputs, logits_processor=LogitsProcessorList([sampler]), stopping_criteria=criteria)
    finally:
        model.generation_config = own
    yield from _answers(request, sampler, stop_ids, text_of)


def _answers(
    request: Request, sampler: _Sampler, stop_ids: frozenset[int], text_of: Callable[[list[int]], str]
) -> Iterator[Answer]:
    """What was sampled, each row up to its end."""
    asked, ids, logprobs = request.key, torch.stack(sampler.ids, 1).tolist(), torch.stack(sampler.logprobs, 1).tolist()
    for place, number in enumerate(asked.numbers):
        row, length, reason = ids[place], len(ids[place]), "length"
        for count, token in enumerate(row, 1):
            at_stop = token in stop_ids or (request.ends is not None and request.ends(row[:count]))
            if token < 0 or at_stop:
                length, reason = count, "error" if token < 0 else "stop"
                break
        if reason == "error":
            yield Answer(asked.prompt.prompt_id, number, Failure(BROKEN, final=True))
            continue
        finish_reason: Literal["stop", "length"] = "stop" if reason == "stop" else "length"
        logprob, seed = sum(logprobs[place][:length]), request.seeds[place]
        text = GeneratedText(text_of(row[:length]), row[:length], finish_reason, logprob, seed)
        yield Answer(asked.prompt.prompt_id, number, text)
