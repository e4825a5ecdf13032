"""How well lengths are predicted: at the prompt boundary against many completions, and along each of them.

At the boundary and by position the numbers are those of validation (`metrics`), of completions that ended; standard
errors, bias and correlation are added. Those that ended are the short ones, so a predictor that knows of the long ones
looks worse there than one that does not. By tokens written, every completion counts: what remains *within the limit*,
`min(L, limit) - written`, is known of truncated ones, too, and predictions are cut alike. (Survival analysis calls the
mean of that the restricted mean survival time.)
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..metrics import POSITION_NAMES, POSITIONS, tokens_at, weighted_median
from ..training.metrics import LengthErrors, PromptBoundaryMRE
from .statistics import ratio_and_error, spearman

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHARES = {"start": 0.0, "25": 0.25, "50": 0.50, "75": 0.75}
WRITTEN = (0, 16, 64, 256, 1024)  # tokens


@dataclass(frozen=True)
class PromptLength:
    """A prompt whose completions all ended.

    Attributes:
        prompt_id: its id.
        completions: sampled for it.
        expected_tokens: `L_GT = ln(1 - mean(1 - gamma ** L_i)) / ln gamma`.
        predicted_tokens: predicted at s_0, before anything was written.
    """

    prompt_id: str
    completions: int
    expected_tokens: float
    predicted_tokens: float


@dataclass(frozen=True)
class PositionError:
    """Mean absolute error at a position of completions.

    Attributes:
        completions: that have this position.
        mae_tokens: of the value model.
        mae_tokens_stderr: standard error with prompts as the unit; None with a single prompt.
        mae_tokens_constant: of the constant that does best at this position of these very completions.
        spearman: rank correlation of predicted and true; None where one does not vary, and by share of a completion.
    """

    completions: int
    mae_tokens: float
    mae_tokens_stderr: float | None
    mae_tokens_constant: float
    spearman: float | None = None


@dataclass(frozen=True)
class LengthReport:
    """Errors of predicted lengths. Standard errors are over prompts, None with a single one.

    A completion that was truncated at the token limit has no known length: it is left out of the errors by position, as
    in validation, and counts by tokens written, where lengths are those within the limit. At the prompt boundary its
    whole prompt is left out, since the completions that ended are the short ones and their mean would be too low. So
    the prompts that stay are rather the short ones: a large `prompts_left_out` says that the report is about those
    only.

    Attributes:
        prompts: whose completions all ended; the numbers at the prompt boundary are about these.
        prompts_left_out: with a truncated completion.
        completions: of all prompts.
        completions_truncated: those that hit the token limit.
        mre: mean of `|L_hat - L_GT| / L_GT` over prompts (Zhang et al. 2026); like all numbers at the prompt boundary
            None where every prompt has a truncated completion.
        mre_stderr: its standard error.
        mre_constant: the MRE of the best constant for these very prompts.
        constant_tokens: that constant.
        mre_of_sampling: about what a perfect predictor would score, because L_GT comes from a few sampled completions:
            mean of `sqrt(2 / pi) * standard error of L_GT / L_GT`; None where a prompt has a single completion.
        bias_tokens: mean of `L_hat - L_GT`; positive = predicted too long.
        bias_tokens_stderr: its standard error.
        spearman: rank correlation of `L_hat` and `L_GT` over prompts; None where one of them does not vary.
        positions: errors by position, keys as in `POSITIONS`.
        written: errors of what remains within the limit, by tokens written, keys of `WRITTEN`, of all completions that
            went on then.
        by_prompt: the prompts at the boundary.
    """

    prompts: int
    prompts_left_out: int
    completions: int
    completions_truncated: int
    mre: float | None
    mre_stderr: float | None
    mre_constant: float | None
    constant_tokens: float | None
    mre_of_sampling: float | None
    bias_tokens: float | None
    bias_tokens_stderr: float | None
    spearman: float | None
    positions: dict[str, PositionError]
    written: dict[int, PositionError]
    by_prompt: tuple[PromptLength, ...]


class LengthPredictions:
    """Takes completions one by one and keeps of each what the report needs.

    Args:
        gamma: discount of the value model.
    """

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma
        self._errors = LengthErrors()
        self._prompts: dict[str, int] = {}  # id -> number
        self._rows: list[tuple[int, int, float, bool]] = []  # prompt, L, L_hat at s_0, truncated
        self._sums: dict[str, dict[int, list[float]]] = {name: defaultdict(lambda: [0.0, 0.0]) for name in POSITIONS}
        self._at: dict[int, list[tuple[int, int, float, int]]] = {}  # written -> see _at_written

    def add(self, prompt_id: str, predicted: Tensor, truncated: bool, limit: int) -> None:
        """Add a completion.

        Args:
            prompt_id: of its prompt.
            predicted: predicted remaining tokens at its states s_0 … s_L. Shape (L + 1,), L >= 1.
            truncated: True = it hit a limit, with its last token.
            limit: tokens at most of a completion that was not.

        Raises:
            ValueError: a completion without tokens.
        """
        length = len(predicted) - 1
        if length < 1:
            raise ValueError(f"a completion of {prompt_id} has no tokens")
        prompt = self._prompts.setdefault(prompt_id, len(self._prompts))
        self._rows.append((prompt, length, float(predicted[0]), truncated))
        most = length if truncated else limit
        for written in WRITTEN:
            if written < length:
                row = (prompt, length - written, float(predicted[written]), most - written)
                self._at.setdefault(written, []).append(row)
        if truncated:
            return
        remaining = torch.arange(length, -1, -1)
        self._errors.update(
            predicted[None], remaining[None], torch.ones(1, length + 1, dtype=torch.bool), torch.tensor([False])
        )
        error = (predicted.double() - remaining).abs()
        for name in POSITIONS:
            here = error if name == "all" else error[tokens_at(torch.tensor([length]), _SHARES[name])]
            total = self._sums[name][prompt]
            total[0] += float(here.sum())
            total[1] += len(here)

    def compute(self) -> LengthReport:
        """Sum up.

        Raises:
            DataError: there are no completions.
        """
        if not self._rows:
            raise DataError("there are no completions whose lengths could be predicted")
        boundary = PromptBoundaryMRE(len(self._prompts), self.gamma)
        prompt, length, start, truncated = (torch.tensor(column) for column in zip(*self._rows, strict=True))
        boundary.update(
            start[:, None], length[:, None], torch.ones(len(truncated), 1, dtype=torch.bool), truncated, prompt
        )
        known = [name for name, known in zip(self._prompts, boundary.known.tolist(), strict=True) if known]
        found = {name: float(x) for name, x in boundary.compute().items()}
        truth, predicted = (x.numpy() for x in boundary.by_prompt())
        lengths: dict[str, list[int]] = {name: [] for name in self._prompts}
        names = list(self._prompts)
        for number, tokens, _, _ in self._rows:
            lengths[names[number]].append(tokens)
        of_known = [np.array(lengths[name]) for name in known]
        return LengthReport(
            prompts=len(known),
            prompts_left_out=len(self._prompts) - len(known),
            completions=len(self._rows),
            completions_truncated=sum(truncated for *_, truncated in self._rows),
            mre=found.get("mre"),
            mre_stderr=_error(np.abs(predicted - truth) / truth),
            mre_constant=found.get("mre_constant"),
            constant_tokens=_constant(truth),
            mre_of_sampling=_mre_of_sampling(of_known, truth, self.gamma),
            bias_tokens=float((predicted - truth).mean()) if known else None,
            bias_tokens_stderr=_error(predicted - truth),
            spearman=spearman(truth, predicted),
            positions=self._by_position(),
            written={written: _at_written(rows) for written, rows in sorted(self._at.items())},
            by_prompt=tuple(
                PromptLength(name, len(some), float(true), float(ours))
                for name, some, true, ours in zip(known, of_known, truth, predicted, strict=True)
            ),
        )

    def _by_position(self) -> dict[str, PositionError]:
        if all(truncated for *_, truncated in self._rows):
            return {}
        found = {name: float(x) for name, x in self._errors.compute().items()}
        errors = {}
        for name in POSITIONS:
            sums, counts = zip(*self._sums[name].values(), strict=True)
            _, stderr = ratio_and_error(sums, counts)
            errors[name] = PositionError(
                sum(not truncated for *_, truncated in self._rows),
                found[f"mae_tokens/{name}"],
                stderr,
                found[f"mae_tokens_constant/{name}"],
            )
        return errors


def _at_written(rows: Sequence[tuple[int, int, float, int]]) -> PositionError:
    """Errors after so many tokens; rows of (prompt, remaining, predicted, tokens that the limit leaves)."""
    prompts, remaining, predicted, left = (np.array(column) for column in zip(*rows, strict=True))
    predicted = np.minimum(predicted, left)
    errors = np.abs(predicted - remaining)
    of_prompts = np.unique(prompts, return_inverse=True)[1]
    mean, stderr = ratio_and_error(np.bincount(of_prompts, errors), np.bincount(of_prompts))
    constant = weighted_median(torch.from_numpy(remaining), torch.ones(len(remaining)))
    best = float(np.abs(remaining - np.minimum(float(constant), left)).mean())
    return PositionError(len(rows), mean, stderr, best, spearman(predicted, remaining))


def _constant(truth: np.ndarray) -> float | None:
    """The length that is nearest to all, relative to each; None without any."""
    if not len(truth):
        return None
    return float(weighted_median(torch.from_numpy(truth), 1.0 / torch.from_numpy(truth)))


def _error(of_prompts: np.ndarray) -> float | None:
    """Standard error of a mean over prompts; None with a single one, or none."""
    if not len(of_prompts):
        return None
    return ratio_and_error(of_prompts, np.ones(len(of_prompts)))[1]


def _mre_of_sampling(lengths: Sequence[np.ndarray], truth: np.ndarray, gamma: float) -> float | None:
    """See `LengthReport`; by the delta method `dL = dm / (m * -ln gamma)`, m the mean of `gamma ** L_i`."""
    if min(map(len, lengths), default=0) < 2:
        return None
    errors = []
    for some, true in zip(lengths, truth, strict=True):
        survival = np.exp(some * math.log(gamma) - some.min() * math.log(gamma))  # in units of the largest
        stderr = survival.std(ddof=1) / math.sqrt(len(some)) / survival.mean() / -math.log(gamma)
        errors.append(math.sqrt(2 / math.pi) * stderr / true)
    return float(np.mean(errors))


def plot_prediction(report: LengthReport, notice: str = "") -> "Figure":
    """Draw predicted against true length of each prompt, and the error by position beside the best constant.

    Args:
        report: what to draw.
        notice: title, such as `tiny world`.
    """
    from .plots import new_figure

    figure, (left, right) = new_figure(2)
    if report.by_prompt:
        _plot_boundary(left, report)
    else:
        left.set_title("every prompt has a truncated completion", fontsize=10)
        left.set_axis_off()
    _plot_positions(right, report)
    if notice:
        figure.suptitle(notice, fontsize=10)
    return figure


def _plot_boundary(left: "Axes", report: LengthReport) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    truth = [prompt.expected_tokens for prompt in report.by_prompt]
    ours = [prompt.predicted_tokens for prompt in report.by_prompt]
    low, high = 0.8 * min(truth + ours), 1.25 * max(truth + ours)
    left.plot([low, high], [low, high], color="0.6", linewidth=1, label="predicted = true")
    assert report.constant_tokens is not None
    left.axhline(report.constant_tokens, color="0.6", linewidth=1, linestyle=":", label="best constant")
    left.scatter(truth, ours, s=14, alpha=0.6, color="tab:blue", edgecolors="none")
    left.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.set_minor_formatter(NullFormatter())
    left.set(xlabel="true expected length, tokens", ylabel="predicted before writing, tokens")
    score = f"mean relative error {report.mre:.1%}, constant {report.mre_constant:.1%}"
    left.set_title(f"{report.prompts} prompts: {score}", fontsize=10)
    left.legend(loc="upper left", fontsize=8)


def _plot_positions(right: "Axes", report: LengthReport) -> None:
    at = np.arange(len(report.positions))
    errors = list(report.positions.values())
    right.bar(at - 0.2, [e.mae_tokens for e in errors], 0.4, yerr=[e.mae_tokens_stderr or 0.0 for e in errors],
              capsize=2, color="tab:blue", label="LenVM (± standard error)")  # fmt: skip
    right.bar(at + 0.2, [e.mae_tokens_constant for e in errors], 0.4, color="0.75", label="best constant")
    right.set_xticks(at, [POSITION_NAMES[name].replace(" ", "\n", 1) for name in report.positions], fontsize=8)
    right.set_ylabel("mean absolute error, tokens")
    right.set_title(f"{report.completions - report.completions_truncated} completions: error by position", fontsize=10)
    right.legend(fontsize=8)
