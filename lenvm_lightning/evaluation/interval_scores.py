"""How good predicted distributions of lengths are: scores at some places of completions, and coverage by slice.

As errors by tokens written, everything counts within the limit: what remained is known of truncated completions, too,
and what was predicted is cut alike. Standard errors have prompts as their unit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributions.conformal import kaplan_meier
from ..distributions.length_distribution import LengthDistribution
from ..distributions.scores import concordance, covered, crps, pinball, pit_histogram
from .length_errors import WRITTEN
from .statistics import ratio_and_error

COVERAGES = (0.5, 0.8, 0.9)
PINBALL_LEVEL = 0.9
PIT_BINS = 10

_MOST_DOMAINS = 12  # more are names of single prompts

Quantiles = Callable[[Sequence[float]], Tensor]
"""Quantiles of N states at Q levels, shape (N, Q)."""


@dataclass(frozen=True)
class Share:
    """A share of states, with the standard error over prompts; None with a single one."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class PlaceScores:
    """How good a distribution is at some states.

    Attributes:
        states: number of them.
        prompts: that they are of.
        crps_tokens: continuous ranked probability score.
        crps_stderr: its standard error.
        pinball_tokens: pinball loss of the 90% quantile.
        coverage: of the intervals of each of `COVERAGES`.
        width_tokens: their median widths within the limit.
        concordance: share of pairs in the right order, by the predicted medians; None across places.
    """

    states: int
    prompts: int
    crps_tokens: float
    crps_stderr: float | None
    pinball_tokens: float
    coverage: dict[float, Share]
    width_tokens: dict[float, float]
    concordance: float | None


@dataclass(frozen=True)
class IntervalReport:
    """Scores of one predictor.

    Attributes:
        all: at all places together.
        written: by tokens written.
        slices: by domain, and short and long by the predicted median at the place.
        pit: share of F(remaining) in each of ten equal ranges.
        reliability: levels from .05 to .95, each with the share of states within that predicted quantile.
    """

    all: PlaceScores
    written: dict[int, PlaceScores]
    slices: dict[str, PlaceScores]
    pit: list[float]
    reliability: list[tuple[float, float]]


@dataclass(frozen=True)
class _States:
    """What is kept of N states. Shapes (N,) but for the intervals, (N, coverages)."""

    prompt: np.ndarray
    written: np.ndarray
    domain: np.ndarray
    remaining: Tensor
    left: Tensor
    truncated: Tensor
    median: Tensor
    crps: Tensor
    pinball: Tensor
    score: Tensor
    lower: Tensor
    upper: Tensor


class IntervalScores:
    """Takes completions one by one, and of each the states at `WRITTEN`."""

    def __init__(self) -> None:
        self._prompts: dict[str, int] = {}
        self._parts: list[_States] = []

    def add(
        self,
        prompt_id: str,
        domain: str,
        length: int,
        truncated: bool,
        limit: int,
        predict: Callable[[Tensor], tuple[LengthDistribution, Quantiles]],
    ) -> None:
        """Add a completion.

        Args:
            prompt_id: of its prompt.
            domain: what the prompt is about, for slices.
            length: tokens of it.
            truncated: True = it hit a limit.
            limit: tokens at most of a completion that was not truncated.
            predict: from tokens written (N,) to what is predicted there, and its quantiles; calibrated ones, where the
                predictor has them.
        """
        written = torch.tensor([at for at in WRITTEN if at < length])
        remaining = (length - written).double()
        left = ((length if truncated else limit) - written).double()
        distribution, quantiles = predict(written)
        low, high = ([0.5 + side * share / 2 for share in COVERAGES] for side in (-1, 1))
        lower, upper, one = quantiles([*low, *high, PINBALL_LEVEL]).double().tensor_split((3, 6), dim=1)
        count = len(written)
        self._parts.append(
            _States(
                prompt=np.full(count, self._prompts.setdefault(prompt_id, len(self._prompts))),
                written=written.numpy(),
                domain=np.full(count, domain, dtype=object),
                remaining=remaining,
                left=left,
                truncated=torch.full((count,), truncated),
                median=torch.minimum(distribution.median().double(), left),
                crps=crps(distribution, remaining, left).double(),
                pinball=pinball(torch.minimum(one[:, 0], left), remaining, PINBALL_LEVEL),
                score=distribution.cdf(remaining.to(distribution.longer.dtype)).double(),
                lower=lower,
                upper=upper,
            )
        )

    def compute(self) -> IntervalReport:
        """Sum up at least one completion."""
        found = self._joined()
        places = {int(at): found.written == at for at in WRITTEN if (found.written == at).any()}
        slices = {name: found.domain == name for name in dict.fromkeys(found.domain)}
        if not 1 < len(slices) <= _MOST_DOMAINS:
            slices = {}
        middle = {at: float(found.median[torch.from_numpy(here)].median()) for at, here in places.items()}
        is_long = found.median.numpy() > np.array([middle[int(at)] for at in found.written])
        slices |= {"predicted short": ~is_long, "predicted long": is_long}
        every = np.ones(len(found.written), dtype=bool)
        return IntervalReport(
            all=_scores(found, every, one_place=False),
            written={at: _scores(found, here, one_place=True) for at, here in places.items()},
            slices={name: _scores(found, here, one_place=False) for name, here in slices.items() if here.any()},
            pit=pit_histogram(found.score, found.truncated, PIT_BINS).tolist(),
            reliability=_reliability(found),
        )

    def _joined(self) -> _States:
        columns: dict[str, Any] = {}
        for name in _States.__dataclass_fields__:
            parts = [getattr(part, name) for part in self._parts]
            columns[name] = torch.cat(parts) if isinstance(parts[0], Tensor) else np.concatenate(parts)
        return _States(**columns)


def _scores(found: _States, here: np.ndarray, one_place: bool) -> PlaceScores:
    some = torch.from_numpy(here)
    of_prompts = np.unique(found.prompt[here], return_inverse=True)[1]
    counts = np.bincount(of_prompts)

    def mean(values: Tensor) -> tuple[float, float | None]:
        return ratio_and_error(np.bincount(of_prompts, values.double().numpy()), counts)

    remaining, left = found.remaining[some], found.left[some]
    coverage, width = {}, {}
    for number, share in enumerate(COVERAGES):
        lower, upper = found.lower[some, number], found.upper[some, number]
        coverage[share] = Share(*mean(covered(lower, upper, remaining, left)))
        width[share] = float((torch.minimum(upper, left) - torch.minimum(lower, left)).median())
    score, stderr = mean(found.crps[some])
    ranked = concordance(found.median[some], remaining, found.truncated[some]) if one_place else None
    return PlaceScores(
        states=int(here.sum()),
        prompts=len(counts),
        crps_tokens=score,
        crps_stderr=stderr,
        pinball_tokens=float(found.pinball[some].mean()),
        coverage=coverage,
        width_tokens=width,
        concordance=ranked,
    )


def _reliability(found: _States) -> list[tuple[float, float]]:
    """Share of states up to each level of the predicted distribution, truncated ones as Kaplan and Meier have it."""
    values, share = kaplan_meier(found.score, found.truncated)
    levels: Sequence[float] = [round(0.05 * k, 2) for k in range(1, 20)]
    curve = []
    for level in levels:
        at = int(torch.searchsorted(values, torch.tensor(level, dtype=values.dtype), right=True))
        curve.append((level, float(share[at - 1]) if at else 0.0))
    return curve
