"""Predictors of the remaining length that are easy to have: what a length value model is measured beside.

``regression`` knows the length of the prompt and how much is written. ``probe`` reads the hidden state that the
generator has anyway, after half of its layers, by a linear map (as TRAIL does, Shahout et al. 2024, which reads a layer
in the middle too). Both are ridge regressions of log(1 + remaining), so that their predictions are medians rather than
means, and learn from rollouts, a few states of each completion: what remained within their limit, which is known of
truncated ones, too.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import DataError
from ..inspection.rollout_values import values_of
from ..models.backbone import load_backbone, load_config
from ..models.lenvm_config import LenVMConfig
from ..models.value_model import LengthValueModel
from ..rollouts.generators.interface import Prompt
from ..rollouts.prompting import encode_prompt
from ..rollouts.read import read_rollouts
from ..utils.images import open_image

Floats = NDArray[np.float64]
Completion = tuple[Prompt, Sequence[int]]
_STATES = 16  # of a completion, to learn from
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # beside a variance of 1; the best on every fifth prompt is taken
FEWEST = 20  # completions to learn from


class LogLinear:
    """Ridge regression of log(1 + remaining tokens).

    Args:
        features: of N states. Shape (N, D).
        remaining: tokens after each. Shape (N,).
        prompts: number of the prompt that each state is of. Shape (N,).
    """

    def __init__(self, features: Floats, remaining: Floats, prompts: NDArray[np.int64]) -> None:
        self._mean, self._scale = features.mean(0), features.std(0) + 1e-8
        x, y = self._standard(features), np.log1p(remaining)
        held = prompts % 5 == 4
        errors = {}
        for ridge in _RIDGES:
            w = _solve(x[~held], y[~held], ridge)
            errors[ridge] = np.abs(np.expm1(x[held] @ w) - remaining[held]).mean() if held.any() else 0.0
        self._weights = _solve(x, y, min(errors, key=lambda ridge: errors[ridge]))
        self._most = remaining.max()  # beyond what was ever seen an exponential knows nothing

    def predict(self, features: Floats) -> Tensor:
        """Remaining tokens, at least 0 and at most what was seen in training. Shape (N,)."""
        return torch.from_numpy(np.expm1(self._standard(features) @ self._weights).clip(0.0, self._most))

    def _standard(self, features: Floats) -> Floats:
        return np.concatenate([(features - self._mean) / self._scale, np.ones((len(features), 1))], axis=1)


def _solve(x: Floats, y: Floats, ridge: float) -> Floats:
    penalty = np.eye(x.shape[1]) * ridge * len(x)
    penalty[-1, -1] = 0.0  # the constant goes free
    return np.asarray(np.linalg.solve(x.T @ x + penalty, x.T @ y), dtype=np.float64)


class LengthFeatures:
    """What is easy to know of a state: the lengths of prompt and text so far, as logarithms, and their product.

    Args:
        processor: tokenizer or processor of the generator.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._lengths: dict[str, int] = {}

    def of(self, prompt: Prompt, written: NDArray[np.int64]) -> Floats:
        """Features of states after so many tokens (N,). Shape (N, 3)."""
        if prompt.prompt_id not in self._lengths:
            images = [open_image(image) for image in prompt.images]
            self._lengths[prompt.prompt_id] = len(encode_prompt(self._processor, prompt.messages, images)[0])
        asked = np.full(len(written), np.log(self._lengths[prompt.prompt_id]))
        done = np.log1p(written)
        return np.stack([asked, done, asked * done], axis=1)

    def forget(self) -> None:
        """Forget all prompts: others may have the same ids."""
        self._lengths.clear()


class Regression:
    """From the lengths of prompt and text so far.

    Args:
        processor: tokenizer or processor of the generator.
        completions: to learn from; prompt and ids of each.

    Raises:
        DataError: too few of them.
    """

    def __init__(self, processor: Any, completions: Sequence[Completion]) -> None:
        self._features = LengthFeatures(processor)
        rows = [self._features.of(prompt, np.arange(len(ids) + 1)) for prompt, ids in completions]
        self._model = _fit(rows, completions)
        self._features.forget()

    def predict(self, prompt: Prompt, length: int) -> Tensor:
        """Remaining tokens at s_0 … s_L. Shape (L + 1,)."""
        return self._model.predict(self._features.of(prompt, np.arange(length + 1)))


class Probe:
    """From the hidden state of the generator in its middle.

    Args:
        generator: directory, hub id or embedded name.
        processor: its tokenizer or processor.
        dtype: of its weights, such as float32.
        device: where it is computed.
        completions: to learn from; prompt and ids of each.

    Raises:
        DataError: too few of them.
    """

    def __init__(
        self, generator: str, processor: Any, dtype: str, device: torch.device, completions: Sequence[Completion]
    ) -> None:
        layers = load_config(generator).get_text_config().num_hidden_layers
        backbone = load_backbone(generator, keep_layers=max(layers // 2, 1), dtype=dtype)
        # Read as a value model reads, with the hidden state for a logit.
        self._reader = LengthValueModel(backbone, LenVMConfig(gamma=0.5)).to(device).eval()
        self._reader.v_head = nn.Identity()  # type: ignore[assignment]
        self._processor = processor
        rows: list[Any] = [None] * len(completions)
        for number, hidden in self._hidden(completions):
            rows[number] = hidden[_some_states(len(hidden) - 1)]
        self._model = _fit(rows, completions, chosen=True)

    def predict(self, completions: Sequence[Completion]) -> Iterator[tuple[int, Tensor]]:
        """Number of each completion, from 0, and remaining tokens at s_0 … s_L, shape (L + 1,)."""
        for number, hidden in self._hidden(completions):
            yield number, self._model.predict(hidden)

    def _hidden(self, completions: Sequence[Completion]) -> Iterator[tuple[int, Floats]]:
        for number, hidden in values_of(self._reader, self._processor, completions):
            if isinstance(hidden, str):
                raise DataError(f"prompt {completions[number][0].prompt_id!r} cannot be read: {hidden}")
            yield number, hidden.double().numpy()


def _fit(rows: Sequence[Floats], completions: Sequence[Completion], chosen: bool = False) -> LogLinear:
    """A regression on a few states of each completion; rows hold those alone where they were chosen before."""
    if len(rows) < FEWEST:
        raise DataError(f"{len(rows)} completions are too few to learn from: take {FEWEST} or more")
    numbers: dict[str, int] = {}
    features, remaining, prompts = [], [], []
    for row, (prompt, ids) in zip(rows, completions, strict=True):
        states = _some_states(len(ids))
        features.append(row if chosen else row[states])
        remaining.append(len(ids) - states)
        prompts.append(np.full(len(states), numbers.setdefault(prompt.prompt_id, len(numbers))))
    return LogLinear(np.concatenate(features), np.concatenate(remaining).astype(float), np.concatenate(prompts))


def _some_states(length: int) -> NDArray[np.int64]:
    """States of a completion, evenly apart, the first among them and the end not."""
    return np.unique(np.linspace(0, max(length - 1, 0), _STATES).round().astype(np.int64))


def known_completions(file: Path) -> list[Completion]:
    """Prompts and ids of the completions in a file of rollouts; a prompt is one object.

    Raises:
        DataError: it cannot be read.
    """
    prompts: dict[str, Prompt] = {}
    found: list[Completion] = []
    for rollout in read_rollouts(file):
        prompt = Prompt(rollout.prompt_id, rollout.messages, tuple(rollout.images))
        if rollout.token_ids:
            found.append((prompts.setdefault(rollout.prompt_id, prompt), rollout.token_ids))
    return found
