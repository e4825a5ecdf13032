"""The expected length of completions, before anything is generated, and how sure that is."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..inspection.rollout_values import values_of
from ..models.value_model import LengthValueModel
from ..rollouts.generators.interface import Prompt


@dataclass(frozen=True)
class Prediction:
    """What is expected of a completion.

    Attributes:
        expected_tokens: the length that the mean value stands for, the end included; at most the mean length.
        quantiles: tokens that a share q of completions stays within, by q; None where truncated completions left that
            unknown.
    """

    expected_tokens: float
    quantiles: dict[float, float | None]


def predict_lengths(
    lenvm: LengthValueModel,
    processor: Any,
    prompts: Iterable[Prompt],
    batch: int = 16,
    quantiles: Sequence[float] = (),
) -> Iterator[tuple[Prompt, Prediction | str]]:
    """Predict at the prompt boundary, s_0.

    Args:
        lenvm: in eval mode.
        processor: tokenizer, or processor of a vision-language model.
        prompts: with or without images.
        batch: prompts that are read before the first of them is answered.
        quantiles: levels in (0, 1) that are asked for, too.

    Yields:
        Each prompt, in order, with what is expected of its completion; or why there is no prediction.

    Raises:
        CheckpointError: quantiles of a model that does not say how sure it is.
    """
    if quantiles:
        lenvm.require_distribution()
    left = iter(prompts)
    while part := list(itertools.islice(left, batch)):
        pairs: list[tuple[Prompt, list[int]]] = [(prompt, []) for prompt in part]
        found = dict(values_of(lenvm, processor, pairs, window=batch, all_heads=bool(quantiles)))
        for number, prompt in enumerate(part):
            outputs = found[number]
            yield prompt, outputs if isinstance(outputs, str) else _prediction(lenvm, outputs, quantiles)


def _prediction(lenvm: LengthValueModel, outputs: Tensor, quantiles: Sequence[float]) -> Prediction | str:
    length = float(lenvm.remaining(outputs[:, 0] if quantiles else outputs)[0])
    if not math.isfinite(length):
        return f"the length value model predicts {length}: it is broken"
    return Prediction(length, quantiles_at(lenvm, outputs[0], 0, quantiles))


def quantiles_at(
    lenvm: LengthValueModel, outputs: Tensor, written: int, quantiles: Sequence[float]
) -> dict[float, float | None]:
    """Quantiles of what remains at a state, by their levels; None where truncated completions left them unknown.

    Args:
        lenvm: that says how sure it is.
        outputs: of all heads at the state. Shape (1 + K,).
        written: tokens written.
        quantiles: levels in (0, 1).
    """
    if not quantiles:
        return {}
    found = zip(quantiles, lenvm.quantiles(outputs, quantiles, written).tolist(), strict=True)
    return {q: tokens if math.isfinite(tokens) else None for q, tokens in found}
