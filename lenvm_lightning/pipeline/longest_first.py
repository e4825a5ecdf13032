"""Prompts whose answers are expected to be long are started first: the batch does not end with one straggler."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..errors import RecipeError
from ..evaluation.prediction import Prediction, predict_lengths
from ..models import embedded
from ..rollouts.generators.interface import Generator, Prompt
from ..rollouts.sample import PromptOrder, is_server, model_of
from .sample_stage import release_memory

Predictions = Callable[[Iterator[Prompt]], Iterable[tuple[Prompt, Prediction | str]]]
"""Prompts to each, in order, with what is expected of its completion, or why nothing is; see `predict_lengths`."""


def value_model_for(generator: str, lenvm: str | None) -> str:
    """The length value model that predicts: the one named, else the embedded one of an embedded generator.

    Raises:
        RecipeError: none was named, and there is none for this generator.
    """
    found = lenvm or embedded.value_model_of(model_of(generator))
    if found is None:
        raise RecipeError(
            f"longest_first needs lenvm, a length value model of the completions of {model_of(generator)}: only it "
            "knows before they are written which will be long (--lenvm NAME_OR_DIR)"
        )
    return found


def order_by(predicted: Predictions, say: Callable[[str], None] | None = None) -> PromptOrder:
    """The order in which prompts with the longest expected completions come first.

    Prompts without a prediction come before all others, for they may be long; those that are expected to be equally
    long keep their order.

    Args:
        predicted: predicts.
        say: told in a sentence what was found; None tells nobody.
    """

    def order(prompts: Iterator[Prompt]) -> list[str]:
        began = time.monotonic()
        expected: dict[str, float] = {}
        unknown = 0
        for prompt, found in predicted(prompts):
            unknown += isinstance(found, str)
            expected[prompt.prompt_id] = float("inf") if isinstance(found, str) else found.expected_tokens
        known = [length for length in expected.values() if length != float("inf")]
        if say is not None and known:
            say(
                f"longest first: {len(known):,} prompts are expected to be answered with {min(known):,.0f} to "
                f"{max(known):,.0f} tokens (predicted in {time.monotonic() - began:.1f} s)"
                + (f"; {unknown:,} without a prediction come before them" if unknown else "")
            )
        return sorted(expected, key=lambda prompt_id: -expected[prompt_id])

    return order


def longest_first(source: str, lenvm: str, generator: Generator, options: dict[str, Any]) -> PromptOrder:
    """The order by what a length value model expects at the end of each prompt.

    It is loaded when the order is asked for, and let go of before anything is sampled.

    Args:
        source: of the generator, as it was named.
        lenvm: directory, hub id or embedded name.
        generator: loaded or reached; its vocabulary has to be that of the length value model.
        options: of the generator; its ``device``, and the ``processor`` of a server's model.

    Raises:
        LenVMError: when the order is asked for: the length value model cannot be loaded, or has another tokenizer.
    """
    from ..models.dtypes import open_value_model
    from ..models.processors import load_processor, tokenizer_of
    from ..rollouts.generators.local.loading import place_for, require_same_tokens

    def predicted(prompts: Iterator[Prompt]) -> Iterator[tuple[Prompt, Prediction | str]]:
        processor = getattr(generator, "processor", None)
        if processor is None:  # a server's model writes in the vocabulary of the length value model
            processor = load_processor(options.get("processor") or lenvm)
        require_same_tokens(tokenizer_of(processor), lenvm)
        device = place_for(None if is_server(source) else options.get("device"))
        model = open_value_model(lenvm, gamma=None, dtype=None, device=device, generator=model_of(source))
        if model.config.until is not None:
            raise RecipeError(
                f"longest_first needs whole lengths, but {lenvm} counts to {model.config.until!r}: name another lenvm"
            )
        yield from predict_lengths(model.eval(), processor, prompts)
        del model
        release_memory()

    return order_by(predicted, lambda text: print(text, file=sys.stderr, flush=True))
