"""Asking a generator for what a store is missing: every answer kept at once, counted, and a clean stop."""

import math
import sys
from collections.abc import Callable, Iterable
from collections.abc import Generator as PythonGenerator
from dataclasses import replace
from typing import Any

from ..decoding.sampling_params import SamplingParams
from ..errors import GeneratorError
from ..utils.progress import CompletionProgress
from .completion_store import CompletionStore
from .generators.interface import Answer, Failure, GeneratedText, Generator, PromptRequest
from .record import require_sound


def ask_for_missing(
    generator: Generator,
    requests: Iterable[PromptRequest],
    sampling: SamplingParams,
    *,
    missing: int,
    keep: Callable[[Answer], None],
    progress: CompletionProgress,
    store: CompletionStore[Any, Any],
) -> float | None:
    """Ask for completions that are not there yet, and keep each answer before the next one is taken.

    Args:
        generator: who is asked.
        requests: for what is missing; read as the generator takes them.
        sampling: how tokens are sampled.
        missing: number of completions that they ask for.
        keep: writes an answer down.
        progress: shows how far it is; opened and closed here.
        store: where answers are kept, to say what stays.

    Returns:
        Tokens a second; None where none was written.

    Raises:
        GeneratorError: the generator stopped. What is kept stays, and another call goes on from there.
        StoreError: an answer could not be written down.
    """
    answers = generator.sample(requests, sampling)
    with progress:
        try:
            answered = 0
            for answer in map(_sound, answers):
                keep(answer)
                answered += 1
                if isinstance(answer.result, GeneratedText):
                    truncated = answer.result.finish_reason == "length"
                    progress.finished(len(answer.result.token_ids), truncated=truncated)
                else:
                    progress.failed()
            if answered < missing:
                raise GeneratorError(f"{generator.name} silently stopped {missing - answered:,} answers short.")
        except GeneratorError as error:
            raise GeneratorError(f"{error}\n{store.what_stays()}") from error
        except (KeyboardInterrupt, SystemExit):
            print(f"stopped: {store.what_stays()}", file=sys.stderr, flush=True)
            raise
        finally:
            if isinstance(answers, PythonGenerator):
                answers.close()  # requests under way are abandoned
        return progress.tokens_per_s


def _sound(answer: Answer) -> Answer:
    """An answer that can be written down and read again: nonsense is a failure, whoever said it."""
    result = answer.result
    if not isinstance(result, GeneratedText):
        return answer
    if isinstance(result.logprob, float) and not math.isfinite(
        result.logprob
    ):  # a probability too small for its format
        result = replace(result, logprob=None)
    try:
        require_sound(result.text, result.token_ids, result.logprob)
    except ValueError as error:
        return replace(answer, result=Failure(f"the generator's answer cannot be kept: {error}", final=False))
    return replace(answer, result=result)
