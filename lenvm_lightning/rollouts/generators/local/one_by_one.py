"""The slow way, for models whose sequences cannot live in slots: ``generate``, one prompt at a time."""

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ....decoding.engine import BROKEN, Job
from ....decoding.sampling import draw
from ....decoding.sampling_params import SamplingParams
from ..interface import Answer, Failure, GeneratedText


class _Drawing(LogitsProcessor):
    """Draws the tokens itself, and leaves ``generate`` no choice but to take them."""

    def __init__(self, seeds: Sequence[int], drawing: SamplingParams, forbidden: Tensor | None) -> None:
        self.ids: list[Tensor] = []  # of each step, (n,)
        self.logprobs: list[Tensor] = []
        self._uniforms = [Random(seed) for seed in seeds]
        self._params, self._forbidden = drawing, forbidden

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniforms = torch.tensor([row.random() for row in self._uniforms], dtype=torch.float64, device=scores.device)
        ids, logprobs = draw(scores, uniforms, self._params, self._forbidden)
        self.ids.append(ids)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter_(1, ids.clamp(min=0)[:, None], 0.0)


def write_with_generate(
    model: Any,
    job: Job,
    stop: frozenset[int],
    forbidden: Tensor | None,
    text_of: Callable[[list[int]], str],
) -> Iterator[Answer]:
    """Yield the completions of one prompt; arguments as for `ContinuousBatch`.

    Their tokens come from the same seeds, but the number of completions asked for together may change how the model
    rounds.

    Args:
        model: with its vocabulary head.
        job: its key is the request.
        stop: ids that end a completion.
        forbidden: ids that are never drawn. Shape (n,), int64.
        text_of: token ids to text.
    """
    drawing = _Drawing(job.seeds, job.drawing, forbidden)
    own = model.generation_config
    # Not as an argument: what it does not name would come from the model's own, penalties among it.
    model.generation_config = GenerationConfig(
        max_new_tokens=job.max_tokens,
        do_sample=True,
        num_return_sequences=len(job.seeds),
        eos_token_id=sorted(stop) or None,
        pad_token_id=min(stop, default=0),
    )
    try:
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            inputs = job.inputs or {"input_ids": torch.tensor([job.ids], device=model.device)}
            model.generate(**inputs, logits_processor=LogitsProcessorList([drawing]))
    finally:
        model.generation_config = own
    ids, logprobs = torch.stack(drawing.ids, 1).tolist(), torch.stack(drawing.logprobs, 1).tolist()
    prompt_id = job.key.prompt.prompt_id
    for number, seed, row, row_logprobs in zip(job.key.numbers, job.seeds, ids, logprobs, strict=True):
        length = next((place for place, token in enumerate(row, 1) if token in stop or token < 0), len(row))
        if row[length - 1] < 0:
            yield Answer(prompt_id, number, Failure(BROKEN, final=True))
            continue
        kept, ended = row[:length], row[length - 1] in stop
        reason: Literal["stop", "length"] = "stop" if ended else "length"
        yield Answer(prompt_id, number, GeneratedText(text_of(kept), kept, reason, sum(row_logprobs[:length]), seed))
