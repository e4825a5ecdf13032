"""Errors in tokens and scores of distributions as torchmetrics: sums that are true across batches and ranks."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from ..batch import LengthBatch
from ..distributions.conformal import Calibration, calibrate
from ..distributions.length_distribution import LengthDistribution
from ..distributions.scores import crps
from ..metrics import (
    POSITIONS,
    ErrorSums,
    boundary_errors,
    boundary_lengths,
    boundary_rows,
    error_sums,
    errors_by_position,
)


class _KeepsDigits(Metric):
    """A metric whose sums stay as precise as they are when the model around it is cast.

    torchmetrics guards against `half()` and the like, but not against `to(torch.bfloat16)`, the way of Lightning's
    `bf16-true`: sums of thousands of tokens would be kept with three digits.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Any = "") -> Any:
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)


class TokenMean(_KeepsDigits, MeanMetric):
    """Mean of values, each weighted by the number of its tokens."""


class LengthErrors(_KeepsDigits):
    """Mean absolute and relative error of the predicted remaining tokens by position, beside the best constants.

    See `metrics.errors_by_position`.
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
        """Add a batch; arguments as in `metrics.error_sums`."""
        sums = error_sums(predicted, remaining, mask, censored)
        self.absolute += sums.absolute
        self.relative += sums.relative
        self.count += sums.states
        self.positive += sums.positive
        self.lengths.append(sums.lengths)
        self.kept.append(sums.kept)

    def sync(self, *args: Any, **options: Any) -> None:
        """Gather the states of all ranks; one that met no batch takes part with empty lists of the right type."""
        for state in (self.lengths, self.kept):
            if isinstance(state, list) and not state:
                state.append(torch.zeros(0, dtype=torch.int64, device=self.device))
        super().sync(*args, **options)

    def compute(self) -> dict[str, Tensor]:
        """The errors by name, see `metrics.errors_by_position`."""
        if isinstance(self.lengths, list) and not self.lengths:  # no batch was met, hence no position
            return {}
        lengths, kept = _joined(self.lengths), _joined(self.kept)
        return errors_by_position(
            ErrorSums(self.absolute, self.relative, self.count, self.positive, lengths, kept),
        )


def _joined(state: Any) -> Tensor:
    """A state that torchmetrics keeps as a list, or, once gathered from all ranks, as one tensor."""
    return torch.cat(list(state)) if isinstance(state, list | tuple) else state


class PromptBoundaryMRE(_KeepsDigits):
    """Mean relative error of the length predicted before anything is written (Zhang et al. 2026).

    The error of a prompt is `|L_hat - L_GT| / L_GT`, see `metrics.boundary_lengths`, averaged over prompts. Prompts
    with a truncated completion have no known L_GT and are left out.

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
        """Add a batch; shapes as in `metrics.boundary_rows`, and `prompt_index` (B,) below `prompts`."""
        rows = boundary_rows(predicted, remaining, mask, censored, self.gamma)  # (B, 4)
        self.sums.index_add_(0, prompt_index, rows.to(self.sums))

    @property
    def known(self) -> Tensor:
        """True = prompt that was met and whose completions all ended. Shape (prompts,)."""
        return (self.sums[:, 0] > 0) & (self.sums[:, 3] == 0)

    def by_prompt(self) -> tuple[Tensor, Tensor]:
        """`L_GT` and `L_hat` of the known prompts, in their order. Shape (K,) each, float64."""
        return boundary_lengths(self.sums[self.known], self.gamma)

    def compute(self) -> dict[str, Tensor]:
        """`mre` and `mre_constant` over the known prompts, see `metrics.boundary_errors`."""
        return boundary_errors(*self.by_prompt())


class HeldOutScores(_KeepsDigits):
    """How well predicted distributions fit the held-out completions, and the calibration that follows.

    The score of a state is the predicted probability of at most as many tokens as remained. A model that predicts one
    number has a log-normal distribution around it, whose width these states say.
    """

    full_state_update = False
    higher_is_better = None

    state: list[Tensor]
    crps_sum: Tensor
    states: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Of each state: score, log((1 + true) / (1 + predicted)), truncated, written, prompt.
        self.add_state("state", [], dist_reduce_fx="cat")
        self.add_state("crps_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("states", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, distribution: LengthDistribution | None, batch: LengthBatch) -> None:
        """Add a batch.

        Args:
            predicted: predicted remaining tokens. Shape (B, T).
            distribution: predicted, of shape (B, T); None where the model predicts one number.
            batch: the batch.
        """
        remaining, mask = batch["remaining"], batch["mask"]
        truncated = batch["censored"][:, None] & mask
        ratio = torch.log1p(remaining.double()) - torch.log1p(predicted.double())
        score = ratio
        if distribution is not None:
            score = distribution.cdf(remaining.to(predicted.dtype)).double()
            known = mask & ~truncated
            self.crps_sum += crps(distribution, remaining)[known].double().sum()
            self.states += known.sum()
        length = torch.where(mask, remaining, 0).amax(dim=1, keepdim=True)
        columns = [score, ratio, truncated, length - remaining, batch["prompt_index"][:, None].expand_as(mask)]
        told = mask & (remaining > 0)  # nothing left is the end itself, which needs no prediction
        self.state.append(torch.stack([column.double()[told] for column in columns], dim=1))

    def sync(self, *args: Any, **options: Any) -> None:
        """Gather the states of all ranks; one that met no batch takes part with an empty list of the right type."""
        if isinstance(self.state, list) and not self.state:
            self.state.append(torch.zeros(0, 5, dtype=torch.float64, device=self.device))
        super().sync(*args, **options)

    def compute(self) -> dict[str, Tensor]:
        """`states`, of which `calibration_of` makes a calibration, and `crps_tokens` of completions that ended.

        The second only where distributions were predicted.
        """
        if isinstance(self.state, list) and not self.state:
            return {}
        found = {"states": _joined(self.state)}
        return {**found, "crps_tokens": self.crps_sum / self.states} if self.states > 0 else found


def calibration_of(scores: dict[str, Tensor]) -> Calibration | None:
    """The calibration that `HeldOutScores.compute` leads to; None with few prompts, or of what is no number."""
    if "states" not in scores:
        return None
    score, ratio, truncated, written, prompt = scores["states"].cpu().unbind(1)
    known = ratio[truncated == 0]
    spread = float(known.square().mean().sqrt().clamp(min=1e-3)) if len(known) else 1.0
    if "crps_tokens" not in scores:
        score = torch.special.ndtr(score / spread)
    if not (bool(score.isfinite().all()) and math.isfinite(spread)):
        return None
    return calibrate(score, truncated > 0, written, prompt, spread)
