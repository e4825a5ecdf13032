"""Distributions of lengths that are easy to have: what a distributional head is measured beside.

``constant`` knows how much is written and nothing else: the lengths of completions that got as far. ``quantile
regression`` knows the length of the prompt, too. Both learn from rollouts what remained within their limit, which is
known of truncated completions, as the simple predictors of one number do.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..distributions.length_distribution import LengthDistribution, from_quantiles
from ..distributions.scores import pinball
from ..errors import DataError
from ..rollouts.generators.interface import Prompt
from .length_errors import WRITTEN
from .simple_predictors import FEWEST, Completion, LengthFeatures

_LEVELS = torch.linspace(0.5 / 40, 1 - 0.5 / 40, 40, dtype=torch.float64)
_STEPS = 1000  # of Adam: the loss after 4,000 is less than a ten-thousandth of it lower


class ConstantDistribution:
    """The lengths of known completions that had as many tokens.

    Args:
        completions: to learn from; prompt and ids of each.

    Raises:
        DataError: too few of them.
    """

    def __init__(self, completions: Sequence[Completion]) -> None:
        _check(completions)
        self._lengths = np.sort([len(ids) for _, ids in completions])

    def predict(self, written: Tensor) -> LengthDistribution:
        """What follows after so many tokens (N,)."""
        rows = []
        for at in written.tolist():
            longer = self._lengths[self._lengths > at]
            known = longer - at if len(longer) else np.ones(1)  # nobody got as far: it is about to end
            rows.append(torch.from_numpy(np.quantile(known, _LEVELS.numpy())))
        return from_quantiles(torch.stack(rows), _LEVELS)


class QuantileRegression:
    """Linear quantile regression of log(1 + remaining) on the lengths of prompt and text so far, as logarithms.

    Args:
        processor: tokenizer or processor of the generator.
        completions: to learn from; prompt and ids of each.

    Raises:
        DataError: too few of them.
    """

    def __init__(self, processor: Any, completions: Sequence[Completion]) -> None:
        _check(completions)
        self._features = LengthFeatures(processor)
        features, remaining = [], []
        for prompt, ids in completions:
            written = np.array([at for at in WRITTEN if at < len(ids)])
            features.append(self._features.of(prompt, written))
            remaining.append(len(ids) - written)
        self._features.forget()
        x = np.concatenate(features)
        self._mean, self._scale = x.mean(0), x.std(0) + 1e-8
        r = torch.from_numpy(np.concatenate(remaining)).double()
        self._most = float(r.max())
        self._weights = _fit(self._standard(x), torch.log1p(r))

    def predict(self, prompt: Prompt, written: Tensor) -> LengthDistribution:
        """What follows after so many tokens (N,) of an answer to a prompt."""
        quantiles = self._standard(self._features.of(prompt, written.numpy())) @ self._weights
        tokens = torch.expm1(quantiles).clamp(0.0, self._most)
        return from_quantiles(tokens.sort(dim=1).values, _LEVELS)  # lines of different slope may cross

    def _standard(self, features: NDArray[np.float64]) -> Tensor:
        scaled = (features - self._mean) / self._scale
        return torch.from_numpy(np.concatenate([scaled, np.ones((len(features), 1))], axis=1))


def _check(completions: Sequence[Completion]) -> None:
    if len(completions) < FEWEST:
        raise DataError(f"{len(completions)} completions are too few to learn from: take {FEWEST} or more")


def _fit(x: Tensor, y: Tensor) -> Tensor:
    """Weights of every level by the pinball loss. Shapes (N, D), (N,) to (D, levels)."""
    weights = torch.zeros(x.shape[1], len(_LEVELS), dtype=torch.float64)
    weights[-1] = torch.quantile(y, _LEVELS)
    weights.requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, _STEPS)
    with torch.enable_grad():
        for _ in range(_STEPS):
            optimizer.zero_grad()
            pinball(x @ weights, y[:, None], _LEVELS).mean().backward()
            optimizer.step()
            schedule.step()
    return weights.detach()
