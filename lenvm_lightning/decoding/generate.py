"""``generate``: a transformers generator, a length value model beside it, and a control of the length for every row."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from ..guidance import Control
from ..models.value_model import LengthValueModel
from .arguments import Arguments, RequestBatch
from .running_completion import FinishReason, RunningCompletion
from .sampling_params import GUIDED_SAMPLING


@dataclass(frozen=True)
class TokenTrace:
    """How one token was chosen.

    Attributes:
        token_id: the choice.
        value: of the state before it, -(1 - gamma ** remaining).
        remaining: tokens still to come before it.
        candidates: ids, the likeliest first; empty where nothing had to be scored.
        probs: of the base model, after temperature and truncation.
        remaining_after: tokens that would follow each candidate.
        guided: what was sampled from.
    """

    token_id: int
    value: float
    remaining: float
    candidates: list[int]
    probs: list[float]
    remaining_after: list[float]
    guided: list[float]


@dataclass
class Completion:
    """One completion.

    Attributes:
        prompt: which of the prompts it is of.
        index: which of its n completions.
        token_ids: generated, the end token included where there is one.
        finish_reason: ``stop`` = an end token or a stop string, ``length`` = truncated at max_tokens, ``error`` = see
            ``error``.
        logprob: sum of the log-probabilities (nats) that the generator gave the tokens, before temperature, truncation
            and control.
        error: why it ended, or was never begun.
        trace: one entry for each of ``token_ids``, where asked for.
    """

    prompt: int
    index: int
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "error"
    logprob: float = 0.0
    error: str | None = None
    trace: list[TokenTrace] | None = None


@dataclass(frozen=True)
class Token:
    """A token as it is written.

    Attributes:
        prompt: which of the prompts it is of.
        index: which of its n completions.
        token_id: the token; -1 where there is none, for an error.
        remaining: tokens still to come after it, by the length value model; None without one.
        finish_reason: of the completion, where this is its last token.
    """

    prompt: int
    index: int
    token_id: int
    remaining: float | None
    finish_reason: FinishReason | None


def generate(
    generator: PreTrainedModel,
    lenvm: LengthValueModel | None,
    inputs: Any,
    *,
    control: Control | Sequence[Control | None] | None = None,
    n: int = 1,
    max_tokens: int | Sequence[int | None] | None = None,
    temperature: float | Sequence[float] = GUIDED_SAMPLING.temperature,
    top_k: int | Sequence[int] = GUIDED_SAMPLING.top_k,
    top_p: float | Sequence[float] = GUIDED_SAMPLING.top_p,
    min_p: float | Sequence[float] = GUIDED_SAMPLING.min_p,
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] = (),
    eos_token_id: int | Sequence[int] | None = None,
    tokenizer: Any = None,
    ends: Callable[[int, list[int]], bool] | None = None,
    compile: bool = False,
    trace: bool = False,
) -> list[Completion]:
    """Write completions whose length is controlled.

    What may differ from prompt to prompt can be given as a list, one entry a prompt. What ``temperature``, ``top_k``,
    ``top_p``, ``min_p`` and ``stop`` mean and may be is said at `SamplingParams`; under a control at most 64 tokens are
    candidates, and at temperature 0 the likeliest token under the control is taken.

    Args:
        generator: decoder with a vocabulary head, text or text and images.
        lenvm: length value model of the same vocabulary; None where nothing is controlled.
        inputs: what a processor returns for a batch of prompts (``input_ids``, ``attention_mask``, ``pixel_values``,
            …), padded on either side; or token ids, shape (B, T); or a list of token ids for each prompt.
        control: of the length, see `guidance`; None is the base model.
        n: completions of each prompt.
        max_tokens: of a completion, its end included; where None, a little more than twice the target, or 512, and
            never more than the context window holds.
        temperature: see `SamplingParams`; the defaults of all four are `GUIDED_SAMPLING`.
        top_k: likewise.
        top_p: likewise.
        min_p: likewise.
        seed: a prompt's completions depend on its own seed alone; a single number s stands for s, s + 1, ….
        stop: see `SamplingParams`; needs ``tokenizer``.
        eos_token_id: ids that end a completion; where None, those that the generator names.
        tokenizer: what decodes them.
        ends: whether a completion is to end, called with the number of its prompt and the tokens written.
        compile: compile the steps of both models with torch.compile, on a GPU into CUDA graphs. That takes a minute or
            so for each of a few shapes, once in a process, and pays in long runs. Rounding differs from that of models
            that are not compiled, as it does between one batch and another.
        trace: keep how each token was chosen.

    Returns:
        The n completions of the first prompt, then those of the second, …

    Raises:
        GenerationError: arguments that mean nothing or contradict each other, all of them named; another vocabulary;
            no prompt that can be answered. A single bad prompt only fails its own completions.

    Example:
        >>> generate(generator, lenvm, inputs, control=EqualTo(128))                    # doctest: +SKIP
        >>> generate(generator, lenvm, inputs, control=[Tilt(-5), None], n=4)           # doctest: +SKIP
    """
    arguments = Arguments(
        generator, lenvm, inputs, control, n, max_tokens, temperature, top_k, top_p, min_p, seed, stop, eos_token_id,
        tokenizer, ends, compile,
    )  # fmt: skip
    batch = RequestBatch(arguments)
    done = {
        (prompt, index): Completion(prompt, index, error=reason)
        for prompt, reason in batch.failed
        for index in range(n)
    }
    traces: dict[tuple[int, int], list[TokenTrace]] = {}
    for written in batch.steps():
        for one in written:
            key = (one.request.key, one.index)
            if trace and one.result is not None:
                traces.setdefault(key, []).append(_trace(one, batch.gamma))
            if one.finish_reason:
                ids = one.token_ids[:-1] if one.error else one.token_ids
                steps = traces[key][: len(ids)] if key in traces else None
                done[key] = Completion(*key, ids, one.finish_reason, one.logprob, one.error, steps)
    return [done[key] for key in sorted(done)]


def stream(generator: PreTrainedModel, lenvm: LengthValueModel | None, inputs: Any, **settings: Any) -> Iterator[Token]:
    """Yield tokens as they are written; arguments and errors as for `generate`, ``trace`` apart."""
    return _tokens(RequestBatch(Arguments(generator, lenvm, inputs, **settings)))


def _tokens(batch: RequestBatch) -> Iterator[Token]:
    for prompt, _ in batch.failed:
        yield from (Token(prompt, index, -1, None, "error") for index in range(batch.n))
    for written in batch.steps():
        for one in written:
            yield Token(one.request.key, one.index, one.last_token, one.remaining, one.finish_reason)


def _trace(one: RunningCompletion, gamma: float) -> TokenTrace:
    result, place = one.result, one.place
    assert result is not None
    kept = (result.probs[place] > 0).nonzero().flatten()
    if not one.was_guided:  # nobody chose among candidates
        kept = kept[:0]
    columns = (result.ids, result.probs, result.remaining, result.guided)
    ids, probs, after, guided = (column[place, kept].tolist() for column in columns)
    before = float(result.before[place])
    return TokenTrace(one.last_token, math.expm1(before * math.log(gamma)), before, ids, probs, after, guided)
