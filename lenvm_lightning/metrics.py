"""Errors in tokens, each beside the best constant predictor, as sums and counts: true across batches and ranks.

Positions: ``start`` is the prompt boundary s_0, ``25``, ``50``, ``75`` are those percent of the completion, ``all``
is every state. Rows that hit their token limit have no known length and are left out.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from .values import remaining_to_value, value_to_remaining

POSITIONS = ("all", "start", "25", "50", "75")
POSITION_NAMES = {"all": "all positions", "start": "prompt boundary", "25": "25% written", "50": "50% written",
                  "75": "75% written"}  # fmt: skip
_SHARES = (0.0, 0.25, 0.50, 0.75)


def weighted_median(x: Tensor, weight: Tensor) -> Tensor:
    """The smallest entry with at least half of the weight at or below it: it minimises ``sum(weight * |x - c|)``."""
    order = torch.argsort(x)
    cumulated = torch.cumsum(weight[order], dim=0)
    return x[order][torch.searchsorted(cumulated, 0.5 * cumulated[-1])]


def _best_constant(x: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Least mean |x - c|, and least mean |x - c| / x over x > 0, of any constant c; x occurs ``count`` times."""
    total = count.sum()
    absolute = (count * (x - weighted_median(x, count)).abs()).sum() / total
    positive = x > 0
    x, count = x[positive], count[positive]
    relative = (count * (x - weighted_median(x, count / x)).abs() / x).sum() / count.sum()
    return absolute, relative


class _KeepsDigits(Metric):
    """A metric whose sums stay as precise as they are when the model around it is cast.

    torchmetrics guards against ``half()`` and the like, but not against ``to(torch.bfloat16)``, the way of Lightning's
    ``bf16-true``: sums of thousands of tokens would be kept with three digits.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Any = "") -> Any:
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)


class TokenMean(_KeepsDigits, MeanMetric):
    """Mean of values, each weighted by the number of its tokens."""


class LengthErrors(_KeepsDigits):
    """Mean absolute and relative error of the predicted remaining tokens by position, beside the best constants.

    The constant of a position is the one that would have done best on these very completions: no predictor that
    ignores the text can beat it. Relative errors skip the EOS state, where nothing remains.
    """

    full_state_update = False
    higher_is_better = False

    absolute: Tensor
    relative: Tensor
    count: Tensor
    positive: Tensor
    lengths: list[Tensor]
    kept: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(len(POSITIONS), dtype=torch.float64)
        for name in ("absolute", "relative", "count", "positive"):
            self.add_state(name, zeros.clone(), dist_reduce_fx="sum")
        self.add_state("lengths", [], dist_reduce_fx="cat")
        self.add_state("kept", [], dist_reduce_fx="cat")

    def update(self, predicted: Tensor, remaining: Tensor, mask: Tensor, censored: Tensor) -> None:
        """Add a batch.

        Args:
            predicted: predicted remaining tokens. Shape (B, T).
            remaining: true remaining tokens. Shape (B, T).
            mask: True = state with a count. Shape (B, T).
            censored: True = row without a known length. Shape (B,).
        """
        mask = mask & ~censored[:, None]
        error = (predicted.double() - remaining).abs()
        length = torch.where(mask, remaining, -1).amax(dim=1)  # (B,), -1 in censored rows
        for i, where in enumerate([mask, *_states_at(length, remaining, mask)]):
            positive = where & (remaining > 0)
            self.absolute[i] += error[where].sum()
            self.relative[i] += (error[positive] / remaining[positive]).sum()
            self.count[i] += where.sum()
            self.positive[i] += positive.sum()
        rows = length >= 0
        self.lengths.append(length[rows])
        self.kept.append(mask.sum(dim=1)[rows] - 1)

    def sync(self, *args: Any, **options: Any) -> None:
        """Gather the states of all ranks; one that met no batch takes part with empty lists of the right type."""
        for state in (self.lengths, self.kept):
            if isinstance(state, list) and not state:
                state.append(torch.zeros(0, dtype=torch.int64, device=self.device))
        super().sync(*args, **options)

    def compute(self) -> dict[str, Tensor]:
        """``mae_tokens/P``, ``relative_error/P`` and the same with ``_constant`` for each position P met."""
        out: dict[str, Tensor] = {}
        for i, name in enumerate(POSITIONS):
            if self.count[i] == 0:
                continue
            out[f"mae_tokens/{name}"] = self.absolute[i] / self.count[i]
            out[f"relative_error/{name}"] = self.relative[i] / self.positive[i].clamp(min=1)
            absolute, relative = _best_constant(*self._true_remaining(i))
            out[f"mae_tokens_constant/{name}"] = absolute
            out[f"relative_error_constant/{name}"] = relative
        return out

    def _true_remaining(self, position: int) -> tuple[Tensor, Tensor]:
        """The true remaining tokens met at a position, and how often each."""
        lengths, kept = _joined(self.lengths), _joined(self.kept)
        if position > 0:
            passed = tokens_at(lengths, _SHARES[position - 1])
            values, count = torch.unique((lengths - passed)[passed <= kept], return_counts=True)
            return values.double(), count.double()
        # A completion of length L of which k tokens were kept has the states L, L - 1, …, L - k, once each.
        steps = torch.zeros(int(lengths.max()) + 2, dtype=torch.float64, device=lengths.device)
        ones = torch.ones_like(lengths, dtype=torch.float64)
        steps.index_add_(0, lengths - kept, ones)
        steps.index_add_(0, lengths + 1, -ones)
        return torch.arange(len(steps), dtype=torch.float64, device=steps.device), steps.cumsum(0)


def _joined(state: Any) -> Tensor:
    return torch.cat(list(state)) if isinstance(state, list | tuple) else state


def tokens_at(length: Tensor, share: float) -> Tensor:
    """Tokens generated when ``share`` of a completion of ``length`` tokens is written, rounded down."""
    return torch.floor(length * share).to(length.dtype)


def _states_at(length: Tensor, remaining: Tensor, mask: Tensor) -> list[Tensor]:
    """For each share, the mask (B, T) of the one state of each row that sits there."""
    return [mask & (remaining == (length - tokens_at(length, share))[:, None]) for share in _SHARES]


class PromptBoundaryMRE(_KeepsDigits):
    """Mean relative error of the length predicted before anything is written (Zhang et al. 2026).

    Per prompt with completions of lengths L_i: ``mu = mean(1 - gamma ** L_i)``, ``L_GT = ln(1 - mu) / ln gamma``;
    the error is ``|L_hat - L_GT| / L_GT`` with L_hat predicted at s_0, averaged over prompts. Prompts with a censored
    completion have no known L_GT and are left out.

    Args:
        prompts: number of held-out prompts.
        gamma: discount.
    """

    full_state_update = False
    higher_is_better = False

    sums: Tensor

    def __init__(self, prompts: int, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma
        self.add_state("sums", torch.zeros(prompts, 4, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self, predicted: Tensor, remaining: Tensor, mask: Tensor, censored: Tensor, prompt_index: Tensor
    ) -> None:
        """Add a batch; shapes as in `LengthErrors`, and ``prompt_index`` (B,) below ``prompts``."""
        length = torch.where(mask, remaining, -1).amax(dim=1)  # (B,)
        boundary = mask & (remaining == length[:, None])
        at_start = torch.where(boundary, predicted.double(), 0.0).sum(dim=1)
        g = -remaining_to_value(length.double(), self.gamma)
        row = torch.stack([torch.ones_like(g), g, at_start, censored.double()], dim=1)  # (B, 4)
        self.sums.index_add_(0, prompt_index, row.to(self.sums))

    @property
    def known(self) -> Tensor:
        """True = prompt that was met and whose completions all ended. Shape (prompts,)."""
        return (self.sums[:, 0] > 0) & (self.sums[:, 3] == 0)

    def by_prompt(self) -> tuple[Tensor, Tensor]:
        """``L_GT`` and ``L_hat`` of the known prompts, in their order. Shape (K,) each, float64."""
        sums = self.sums[self.known]
        return value_to_remaining(-sums[:, 1] / sums[:, 0], self.gamma), sums[:, 2] / sums[:, 0]

    def compute(self) -> dict[str, Tensor]:
        """``mre`` and ``mre_constant``, the least that one predicted length for all prompts can reach."""
        truth, predicted = self.by_prompt()
        if len(truth) == 0:
            return {}
        constant = weighted_median(truth, 1.0 / truth)
        return {
            "mre": ((predicted - truth).abs() / truth).mean(),
            "mre_constant": ((constant - truth).abs() / truth).mean(),
        }
