"""The expected length of completions, before anything is generated."""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

from ..inspection.rollout_values import values_of
from ..models.value_model import LengthValueModel
from ..rollouts.generators.interface import Prompt


def predict_lengths(
    lenvm: LengthValueModel, processor: Any, prompts: Iterable[Prompt], batch: int = 16
) -> Iterator[tuple[Prompt, float | str]]:
    """Predict at the prompt boundary, s_0.

    Args:
        lenvm: in eval mode.
        processor: tokenizer, or processor of a vision-language model.
        prompts: with or without images.
        batch: prompts that are read before the first of them is answered.

    Yields:
        Each prompt, in order, with the tokens that its completion is expected to have, the end included: the length
        that the mean value stands for, at most the mean length; or why there is no prediction.
    """
    left = iter(prompts)
    while part := list(itertools.islice(left, batch)):
        found = dict(values_of(lenvm, processor, ((prompt, []) for prompt in part), window=batch))
        for number, prompt in enumerate(part):
            logits = found[number]
            if isinstance(logits, str):
                yield prompt, logits
                continue
            length = float(lenvm.remaining(logits)[0])
            yield prompt, length if math.isfinite(length) else f"the length value model predicts {length}: it is broken"
