"""Distributions of lengths in a report: tables of their scores, a reliability diagram and a histogram of PIT."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .interval_scores import COVERAGES, IntervalReport, PlaceScores
from .results import Column, Measure, Table, TableRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def interval_tables(reports: Mapping[str, IntervalReport]) -> list[Table]:
    """Tables of some predictors, ours first: by tokens written, and ours by slice."""
    ours = next(iter(reports.values()))
    by_written = [
        _row({"predictor": name, "written": str(at)}, scores)
        for at in ours.written
        for name, report in reports.items()
        if (scores := report.written.get(at)) is not None
    ]
    every = [_row({"predictor": name, "written": "all of these"}, report.all) for name, report in reports.items()]
    slices = [_row({"slice": name}, scores) for name, scores in ours.slices.items()]
    return [
        Table(
            "distributions, by tokens written",
            _columns(),
            by_written + every,
            [
                "Within the limit, of all completions that went on then. CRPS: the error in tokens of a whole "
                "distribution; of a single number it is the absolute error. Rank: share of pairs of completions whose "
                "predicted medians are in the right order."
            ],
        ),
        Table(
            "intervals, by slice",
            _columns(),
            slices,
            ["Of the length value model. Short and long: by the median that is predicted after as many tokens."],
        ),
    ]


def _columns() -> list[Column]:
    return [
        Column("crps_tokens", "CRPS, tokens", "down", ".1f"),
        Column("pinball_tokens", "pinball loss of the 90% quantile", "down", ".1f"),
        *(Column(f"coverage_{100 * share:.0f}", f"in the {share:.0%} interval", None, ".3f") for share in COVERAGES),
        *(Column(f"width_{100 * share:.0f}", f"median width, {share:.0%}", "down", ".0f") for share in COVERAGES),
        Column("concordance", "rank", "up", ".3f"),
    ]


def _row(label: dict[str, str], scores: PlaceScores) -> TableRow:
    measures = {
        "crps_tokens": Measure(scores.crps_tokens, scores.crps_stderr),
        "pinball_tokens": Measure(scores.pinball_tokens),
    }
    for share in COVERAGES:
        measures[f"coverage_{100 * share:.0f}"] = Measure(scores.coverage[share].value, scores.coverage[share].stderr)
        measures[f"width_{100 * share:.0f}"] = Measure(scores.width_tokens[share])
    if scores.concordance is not None:
        measures["concordance"] = Measure(scores.concordance)
    return TableRow(label, measures, scores.states, scores.prompts)


def plot_intervals(report: IntervalReport, notice: str = "") -> "Figure":
    """Draw how often lengths are within predicted quantiles, and where in their distributions they lie.

    Args:
        report: of one predictor.
        notice: title, such as `tiny world`.
    """
    from .plots import new_figure

    figure, (left, right) = new_figure(2)
    levels, shares = zip(*report.reliability, strict=True)
    left.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="as it should be")
    left.plot(levels, shares, marker="o", markersize=3, color="tab:blue", label="as predicted")
    left.plot(
        COVERAGES,
        [report.all.coverage[share].value for share in COVERAGES],
        linestyle="none",
        marker="s",
        markersize=5,
        color="tab:orange",
        label="calibrated intervals",
    )
    left.set(xlabel="level of the quantile or interval", ylabel="share of lengths within", xlim=(0, 1), ylim=(0, 1))
    left.set_title("reliability", fontsize=10)
    left.legend(fontsize=8)
    bins = len(report.pit)
    right.bar([(k + 0.5) / bins for k in range(bins)], report.pit, 0.9 / bins, color="tab:blue")
    right.axhline(1 / bins, color="0.6", linewidth=1)
    right.set(xlabel="predicted probability of at most the true length", ylabel="share of states", xlim=(0, 1))
    right.set_title("PIT, before calibration", fontsize=10)
    if notice:
        figure.suptitle(notice, fontsize=10)
    return figure
