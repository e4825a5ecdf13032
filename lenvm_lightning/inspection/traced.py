"""What a length value model thought while a text was written: the candidates of every step, and who was chosen."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..decoding.generate import Completion
from ..decoding.text_stream import TextStream
from ..rollouts.generators.interface import Prompt
from ..values import remaining_to_value
from .read import CandidateReading, CompletionReading, TokenReading

_SHOWN = 12  # candidates of a step; the rest have little between them


def readings_of_traces(
    prompt: Prompt, completions: Sequence[Completion], tokenizer: Any, gamma: float
) -> Iterator[CompletionReading]:
    """Completions that were written with ``trace=True``, as they are inspected; those without a token are left out.

    Args:
        prompt: of all of them.
        completions: with their traces.
        tokenizer: of the generator.
        gamma: discount of the length value model.
    """
    for completion in completions:
        steps = completion.trace or []
        if not steps:
            continue
        stream = TextStream(tokenizer)
        texts = [stream.add(step.token_id, last=number == len(steps)) for number, step in enumerate(steps, 1)]
        # After a token it is what it was before the next one; after the last one, what its candidate promised. Where a
        # stop text ended it, that is what the model thought; an end token has no text, and nothing follows it.
        ended = completion.finish_reason == "stop"
        after = [step.remaining for step in steps[1:]]
        after.append(0.0 if ended and not texts[-1] else _promised(steps[-1]))
        values = remaining_to_value(torch.tensor(after, dtype=torch.float64), gamma) + 0.0  # -0.0 reads oddly
        tokens = [
            TokenReading(step.token_id, text, value, left, left + 1 - step.remaining, _candidates(step, tokenizer))
            for step, text, left, value in zip(steps, texts, after, values.tolist(), strict=True)
        ]
        images = [image for image in prompt.images if isinstance(image, str)]
        name = f"{completion.index}{' (failed)' if completion.finish_reason == 'error' else ''}"
        yield CompletionReading(
            prompt.prompt_id, prompt.messages, images, name, steps[0].remaining, tokens, truncated=not ended
        )


def _promised(step: Any) -> float:
    """Tokens that were to follow the chosen candidate; one less than before, where nothing was scored."""
    after = dict(zip(step.candidates, step.remaining_after, strict=True))
    return float(after.get(step.token_id, max(step.remaining - 1, 0.0)))


def _candidates(step: Any, tokenizer: Any) -> list[CandidateReading]:
    """The likeliest candidates under the control, the chosen one among them."""
    found = [
        CandidateReading(tokenizer.decode([token]), prob, left, guided, token == step.token_id)
        for token, prob, left, guided in zip(
            step.candidates, step.probs, step.remaining_after, step.guided, strict=True
        )
    ]
    found.sort(key=lambda candidate: (not candidate.chosen, -candidate.guided, -candidate.prob))
    return found[:_SHOWN]
