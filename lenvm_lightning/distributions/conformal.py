"""Intervals that hold: levels of a predicted distribution, moved to where held-out completions say that they are.

Conformal prediction on the scale of the predicted distribution (Chernozhukov, Wüthrich and Zhu, PNAS 2021, without
putting both tails together): the score of a held-out state is `F(remaining)`, F its predicted distribution. Were F
right, a share q of the scores would be below q. Where a share q is below another level, that level is asked for q.

A truncated completion says that its score is above F(what was seen). The distribution of scores is then estimated as
Kaplan and Meier (1958) did for survival times, which takes for granted that truncation tells nothing about the score.
Levels that no held-out completion has shown stay unknown, and there is a lower bound only.

States of one completion depend on each other, and completions of one prompt do, more or less. So the correction for the
size of a band goes by as many independent states as would tell as much, see `effective_size`.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..utils.settings import is_integer, is_number
from .length_distribution import LengthDistribution

LEVELS = (0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.975)
BANDS = (0, 1, 16, 64, 256, 1024)  # tokens written at which a band begins: the prompt boundary is one of its own
_DIGITS = 6  # that are written down
FEWEST_PROMPTS = 20  # of a band; one with fewer is part of the band before it


@dataclass(frozen=True)
class Calibration:
    """Which level to ask a predicted distribution for, so that quantiles are what they say on held-out prompts.

    Attributes:
        bands: tokens written at which each band begins, ascending from 0.
        levels: the levels that quantiles shall have, ascending in (0, 1).
        asked: of each band, the level to ask for instead of each; infinity where held-out completions show none.
        prompts: held-out prompts of each band.
        spread: root mean square of log((1 + true) / (1 + predicted)), for a log-normal distribution around a value; it
            is what a model that predicts one number has.
    """

    bands: tuple[int, ...]
    levels: tuple[float, ...]
    asked: tuple[tuple[float, ...], ...]
    prompts: tuple[int, ...]
    spread: float = 1.0

    def quantile(self, distribution: LengthDistribution, q: float, written: Tensor | int) -> Tensor:
        """Tokens that a share `q` of continuations stay within, by what held-out prompts showed.

        Args:
            distribution: predicted. Of shape (...).
            q: in (0, 1).
            written: tokens written at each state, that broadcasts with it. Shape (...).

        Returns:
            Tokens, infinite where truncated completions left the level unknown. Shape (...).
        """
        level = self._level(q).to(distribution.longer.device)
        starts = torch.tensor(self.bands, device=distribution.longer.device)
        at = torch.as_tensor(written, device=distribution.longer.device)
        band = torch.searchsorted(starts, at.contiguous(), right=True) - 1
        asked = level[band].to(distribution.longer.dtype)
        return torch.where(asked < 1.0, distribution.quantile(asked), math.inf)

    def interval(
        self, distribution: LengthDistribution, coverage: float, written: Tensor | int
    ) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the interval that a share `coverage` lies in, as much below it as above."""
        tail = 0.5 * (1.0 - coverage)
        return self.quantile(distribution, tail, written), self.quantile(distribution, 1.0 - tail, written)

    def _level(self, q: float) -> Tensor:
        """The level to ask for in each band; between those that were calibrated a straight line. Shape (bands,)."""
        known = torch.tensor((0.0, *self.levels, 1.0), dtype=torch.float64)
        asked = torch.tensor([(0.0, *row, 1.0) for row in self.asked], dtype=torch.float64)
        right = int(torch.searchsorted(known, torch.tensor(q, dtype=torch.float64)).clamp(1, len(known) - 1))
        share = (q - known[right - 1]) / (known[right] - known[right - 1])
        if float(share) == 1.0:
            return asked[:, right].clamp(max=1.0)
        level = asked[:, right - 1] + share * (asked[:, right] - asked[:, right - 1])
        return torch.nan_to_num(level, nan=1.0).clamp(max=1.0)  # infinity less infinity: unknown, too


def calibrate(
    score: Tensor, truncated: Tensor, written: Tensor, prompt: Tensor, spread: float = 1.0
) -> Calibration | None:
    """Calibrate on held-out states.

    Args:
        score: predicted probability F(r) of at most as many tokens as remained, or were seen. Shape (N,).
        truncated: True = more followed. Shape (N,).
        written: tokens written at the state. Shape (N,).
        prompt: number of its prompt. Shape (N,).
        spread: see `Calibration`.

    Returns:
        None where there are fewer than 20 prompts.
    """
    starts: list[int] = []
    parts: list[Tensor] = []
    for start, stop in itertools.pairwise([*BANDS, math.inf]):
        here = (written >= start) & (written < stop)
        if starts and len(torch.unique(prompt[here])) < FEWEST_PROMPTS:
            parts[-1] = parts[-1] | here
        else:
            starts.append(int(start))
            parts.append(here)
    counts = [len(torch.unique(prompt[part])) for part in parts]
    if counts[0] < FEWEST_PROMPTS:
        return None
    asked = [_asked(score[part], truncated[part], prompt[part]) for part in parts]
    return Calibration(tuple(starts), LEVELS, tuple(asked), tuple(counts), spread)


def _asked(score: Tensor, truncated: Tensor, prompt: Tensor) -> tuple[float, ...]:
    """For each level the score that a share of that level does not exceed, a little further out for a small sample."""
    values, share_below = kaplan_meier(score, truncated)
    wider = 1.0 + 1.0 / effective_size(score, prompt)
    found = []
    for level in LEVELS:
        share = level * wider if level > 0.5 else 1.0 - (1.0 - level) * wider if level < 0.5 else level
        if share <= 0.0:
            found.append(0.0)
            continue
        at = int(torch.searchsorted(share_below, torch.tensor(share, dtype=share_below.dtype)))
        found.append(float(values[at]) if at < len(values) else math.inf)
    return tuple(found)


def effective_size(score: Tensor, prompt: Tensor) -> float:
    """How many independent states would tell as much of the distribution of scores as these.

    Of n independent ones, the share below a level p varies by `p (1 - p) / n`. Here it varies as prompts differ: by the
    sum over prompts of `(states below - p · states)^2`, over the squared number of all states. Both are added up over
    the `LEVELS`. One state a prompt gives the number of prompts, prompts that do not differ nearly that of states.
    A single prompt with most of the states would be taken for many: the levels are its own.

    Args:
        score: shape (N,).
        prompt: number of the prompt of each. Shape (N,).

    Returns:
        At least 1, at most N.
    """
    _, own = torch.unique(prompt, return_inverse=True)
    ascending = score.double().sort().values
    level = ascending[[min(int(level * len(score)), len(score) - 1) for level in LEVELS]]
    below = (score.double()[:, None] <= level).double()  # (N, levels)
    share = below.mean(dim=0)
    off = torch.zeros(int(own.max()) + 1, len(LEVELS), dtype=torch.float64, device=score.device)
    off.index_add_(0, own, below - share)
    varies = float(off.square().sum()) / len(score) ** 2
    found = float((share * (1.0 - share)).sum()) / varies if varies > 0 else float(len(score))
    return min(max(found, 1.0), float(len(score)))


def kaplan_meier(score: Tensor, truncated: Tensor) -> tuple[Tensor, Tensor]:
    """Distribution of scores of which some are only known to be exceeded.

    Args:
        score: shape (N,).
        truncated: True = the true score is above this one. Shape (N,).

    Returns:
        The known scores, ascending, and the share of all true scores up to each. Shape (E,) each, float64.
    """
    order = torch.argsort(score.double() + truncated * 1e-12, stable=True)  # known ones first among equals
    score, known = score.double()[order], ~truncated[order]
    at_risk = torch.arange(len(score), 0, -1, dtype=torch.float64, device=score.device)
    survive = torch.cumprod(torch.where(known, (at_risk - 1.0) / at_risk, 1.0), dim=0)
    return score[known], 1.0 - survive[known]


def calibration_to_plain(calibration: Calibration | None) -> dict[str, Any]:
    """What `lenvm_config.json` says; infinity, which JSON does not know, is null there."""
    if calibration is None:
        return {}
    rows = [[None if math.isinf(level) else round(level, _DIGITS) for level in row] for row in calibration.asked]
    return {**asdict(calibration), "asked": rows, "spread": round(calibration.spread, _DIGITS)}


def calibration_from_plain(plain: Mapping[str, Any]) -> Calibration:
    """The calibration again that `calibration_to_plain` wrote down.

    Raises:
        ValueError: it says something else.
    """
    try:
        asked = tuple(tuple(math.inf if level is None else level for level in row) for row in plain["asked"])
        bands, levels, prompts = (tuple(plain[name]) for name in ("bands", "levels", "prompts"))
        found = Calibration(bands, levels, asked, prompts, plain["spread"])
    except (KeyError, TypeError) as error:
        raise ValueError("calibration must say bands, levels, asked, prompts and spread") from error
    whole = all(map(is_integer, bands)) and all(map(is_integer, prompts))
    fits = len(asked) == len(bands) == len(prompts) and all(_asks(row, len(levels)) for row in asked)
    problems = {
        "bands must ascend from 0": _ascends(bands, 0) and bands[0] == 0 and bands[-1] < 2**31,
        "bands and prompts must be whole numbers": whole,
        "levels must ascend between 0 and 1": _ascends(levels, 0.0) and levels[0] > 0.0 and levels[-1] < 1.0,
        "asked must have a row for each band, with an ascending level or null for each of levels": fits,
        "spread must be a positive number": is_number(found.spread) and 0 < found.spread < 100,
    }
    if wrong := [name for name, holds in problems.items() if not holds]:
        raise ValueError("calibration: " + "; ".join(wrong))
    return found


def _ascends(values: Sequence[Any], low: float) -> bool:
    if not 1 <= len(values) <= 1024 or not all(map(is_number, values)) or values[0] < low:
        return False
    return all(a < b for a, b in itertools.pairwise(values))


def _asks(row: Sequence[Any], levels: int) -> bool:
    if len(row) != levels or not all(level == math.inf or is_number(level) for level in row):
        return False
    return all(a <= b for a, b in itertools.pairwise((0.0, *row)))
