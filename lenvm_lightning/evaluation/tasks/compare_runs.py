"""Tasks that look at finished runs and sample nothing: `scaling` and `ablation`.

Scaling: validation loss against model size, prompts, and completions per prompt. Ablation: errors in tokens, of runs
that may differ in anything.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import DataError, EvaluationError
from ...utils.settings import TEXT, setting
from ..results import Column, Measure, Table, TableRow
from ..run_results import OF_ERRORS, check_comparable, misfit, read_results, results_of
from ..settings import EvaluationSettings, list_of
from ..statistics import spearman
from ..task import Findings, RunTask, digest

if TYPE_CHECKING:
    from matplotlib.figure import Figure


AXES = {
    "parameters": "parameters",
    "train_prompts": "training prompts",
    "completions_per_prompt": "training completions per prompt",
}
_SCALING_NOTE = "Below 0: more is better. One run a point, no error bars."
_ABLATION_NOTE = "Errors in tokens on the same held-out completions, one run each; MRE is at the prompt boundary."
_ERRORS = ("start", "25", "50", "75")


# -- the tasks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunSettings:
    """What these tasks alone can be asked."""

    runs: list[str] | None = setting(list_of(TEXT, "a list of folders"), "folders of finished runs", None)


class CompareRuns(RunTask):
    """Tables of finished runs; see `RunTask`.

    Args:
        name: of the task.
        compare: makes findings of folders, and says whether they are of the tiny world.
    """

    settings = RunSettings

    def __init__(self, name: str, compare: Callable[[Sequence[str]], tuple[Findings, bool]]) -> None:
        self.name, self._compare = name, compare

    def compare(self, settings: EvaluationSettings) -> tuple[Findings, dict[str, Any], bool]:
        """Compare the runs that are named.

        Raises:
            EvaluationError: none are, or they cannot be compared.
        """
        runs = settings.own.runs
        if not runs:
            raise EvaluationError(f"{self.name}: --runs is missing, folders of finished runs such as runs/text_lenvm")
        findings, tiny_world = self._compare(runs)
        return findings, {"runs": runs}, tiny_world

    def digest_of(self, settings: EvaluationSettings) -> str:
        """Return what tells these runs from others."""
        return digest(settings.own.runs)


def compare_scaling(folders: Sequence[str]) -> tuple[Findings, bool]:
    """Validation loss against model size, prompts and completions per prompt.

    Returns:
        What was found, and whether it is of the tiny world.

    Raises:
        DataError: no finished runs, or runs that cannot be compared.
    """
    runs = read_runs(folders)
    columns = [
        *[Column(name, title, None, ",.0f") for name, title in AXES.items()],
        Column("loss", "validation loss", "down", ".5f"),
    ]
    rows = [
        TableRow({"run": run.name}, {name: Measure(float(getattr(run, name))) for name in (*AXES, "loss")}, 1, 1)
        for run in sorted(runs, key=lambda run: (run.parameters, run.train_prompts, run.completions_per_prompt))
    ]
    lines = [
        TableRow(
            {"axis": AXES[line.axis], "runs": " ".join(run.name for run in line.runs)},
            {"slope": Measure(line.slope), "spearman": Measure(line.spearman)},
            len(line.runs),
            len(line.runs),
        )
        for line in scaling_lines(runs)
    ]
    slopes = [Column("slope", "slope, log loss / log axis", "down", "+.3f"), Column("spearman", "rank", "down", "+.2f")]
    tables = [
        Table("runs", columns, rows),
        Table("where only one thing differs", slopes, lines, [_SCALING_NOTE]),
    ]
    curves = {"lines": [{"axis": line.axis, "runs": [vars(run) for run in line.runs]} for line in scaling_lines(runs)]}
    return Findings(tables, curves, {"scaling": plot_scaling(runs)}), any(run.tiny_world for run in runs)


def compare_errors(folders: Sequence[str]) -> tuple[Findings, bool]:
    """Errors in tokens of runs that differ in anything: other targets and gammas have losses of other kinds.

    Returns:
        What was found, and whether it is of the tiny world.

    Raises:
        EvaluationError: no finished runs, or runs that were validated on other completions.
    """
    runs = read_results(folders)
    problems = [f"{name}: {problem}" for name, results in runs.items() if (problem := misfit(results, OF_ERRORS))]
    if problems:
        raise EvaluationError("these are no finished runs:\n  " + "\n  ".join(problems))
    digests = {results.get("held_out_digest") for results in runs.values()}
    if len(digests) != 1 or None in digests:
        raise EvaluationError("errors of these runs cannot be compared: they were validated on different completions")
    from ...metrics import POSITION_NAMES  # needs torch, which a command line should not wait for

    columns = [
        Column("mre", "MRE", "down"),
        *[Column(f"mae_tokens/{at}", f"MAE {POSITION_NAMES[at]}", "down", ".1f") for at in _ERRORS],
        Column("loss", "loss", None, ".5f"),
        Column("gamma", "gamma", None, ".4f"),
    ]
    rows = [
        TableRow(
            {"run": name, "target": results["target"]},
            {
                **{
                    column.name: Measure(results["metrics"].get(column.name))
                    for column in columns
                    if column.name != "gamma"
                },
                "gamma": Measure(results["gamma"]),
            },
            results["held_out_completions"],
            results["held_out_prompts"],
        )
        for name, results in runs.items()
    ]
    tiny = any(results["tiny_world"] for results in runs.values())
    return Findings([Table("errors of runs", columns, rows, [_ABLATION_NOTE])]), tiny


# -- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScalingRun:
    """A finished run.

    Attributes:
        name: of its folder.
        parameters: of the value model.
        train_prompts: prompts that it was trained on.
        completions_per_prompt: training completions per prompt, on average.
        loss: validation loss, mean over states.
        tiny_world: True = its completions are of the tiny world.
    """

    name: str
    parameters: float
    train_prompts: float
    completions_per_prompt: float
    loss: float
    tiny_world: bool


@dataclass(frozen=True)
class ScalingLine:
    """Runs that differ on one axis only.

    Attributes:
        axis: key of `AXES`.
        runs: at least two values of the axis, smallest first.
        slope: of log loss against log of the axis, least squares: -0.1 = ten times as much leaves 79% of the loss.
        spearman: rank correlation of axis and loss; negative = more is better. None where the loss does not vary.
    """

    axis: str
    runs: tuple[ScalingRun, ...]
    slope: float
    spearman: float | None


def read_runs(folders: Iterable[str | os.PathLike[str]]) -> list[ScalingRun]:
    """Read finished runs, in the order given.

    Args:
        folders: run folders, each with a `results.json`.

    Raises:
        DataError: folders that hold no finished run of a value model, all of them listed; or runs whose losses cannot
            be compared: other held-out completions, another gamma, target or loss.
    """
    found: dict[Path, dict[str, Any]] = {}
    problems = []
    for folder in dict.fromkeys(map(Path, folders)):
        results = results_of(folder)
        if isinstance(results, str):
            problems.append(f"  {folder}: {results}")
        else:
            found[folder] = results
    if problems:
        raise DataError("these are no finished runs that can be compared:\n" + "\n".join(problems))
    if not found:
        raise DataError("there are no runs to compare: name the folders of finished ones, such as runs/text_lenvm")
    check_comparable(found)
    return [
        ScalingRun(
            name=folder.name,
            parameters=results["parameters"],
            train_prompts=results["train_prompts"],
            completions_per_prompt=results["train_completions"] / results["train_prompts"],
            loss=results["metrics"]["loss"],
            tiny_world=results["tiny_world"],
        )
        for folder, results in found.items()
    ]


def scaling_lines(runs: Sequence[ScalingRun]) -> list[ScalingLine]:
    """Sets of runs that differ on one axis only, for each axis; the others agree to two digits.

    Returns:
        Lines in the order of `AXES`, those with the most runs first.
    """
    lines = []
    for axis in AXES:
        groups: dict[tuple[str, ...], list[ScalingRun]] = defaultdict(list)
        for run in runs:
            groups[tuple(f"{getattr(run, other):.2g}" for other in AXES if other != axis)].append(run)
        of_axis = [_line(axis, group) for group in groups.values() if len({_place(axis, run) for run in group}) > 1]
        lines += sorted(of_axis, key=lambda line: -len(line.runs))
    return lines


def _place(axis: str, run: ScalingRun) -> float:
    """Where a run stands on an axis, to two digits: a few rows that were left out make no other place."""
    return float(f"{getattr(run, axis):.2g}")


def _line(axis: str, group: list[ScalingRun]) -> ScalingLine:
    ordered = sorted(group, key=lambda run: (getattr(run, axis), run.name))
    x = np.log([getattr(run, axis) for run in ordered])
    y = np.log([run.loss for run in ordered])
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / np.square(x - x.mean()).sum())
    return ScalingLine(axis, tuple(ordered), slope, spearman([_place(axis, run) for run in ordered], y))


# -- plot -------------------------------------------------------------------------------------------------------------


def plot_scaling(runs: Sequence[ScalingRun]) -> "Figure":
    """Draw validation loss against each axis that varies; runs that differ on that axis only are joined.

    Args:
        runs: comparable ones, as `read_runs` gives them.

    Raises:
        DataError: no axis varies.
    """
    varying = [axis for axis in AXES if len({_place(axis, run) for run in runs}) > 1]
    if not varying:
        raise DataError(
            f"the {len(runs)} runs do not differ in {', '.join(AXES.values())}, so there is nothing to draw: name runs "
            "of different sizes or with more or fewer rollouts"
        )
    from ..plots import new_figure

    lines = scaling_lines(runs)
    figure, axes = new_figure(len(varying), 4.4)
    for panel, axis in zip(np.ravel(axes), varying, strict=True):
        panel.scatter([getattr(run, axis) for run in runs], [run.loss for run in runs], s=22, color="0.6", zorder=3)
        for line in (line for line in lines if line.axis == axis):
            places: dict[float, list[ScalingRun]] = defaultdict(list)
            for run in line.runs:
                places[_place(axis, run)].append(run)  # runs that differ by their seed: the line goes through the mean
            x = [np.mean([getattr(run, axis) for run in some]) for some in places.values()]
            panel.plot(x, [np.mean([run.loss for run in some]) for some in places.values()], marker="o", markersize=4,
                       label=f"slope {line.slope:+.2f}")  # fmt: skip
        panel.set(xscale="log", xlabel=AXES[axis])
        if panel.lines:
            panel.legend(fontsize=8, title="log loss / log axis", title_fontsize=8)
    np.ravel(axes)[0].set_ylabel("validation loss, mean over states")
    marked = any(run.tiny_world for run in runs)
    figure.suptitle(f"{'tiny world · ' if marked else ''}{len(runs)} runs", fontsize=10)
    return figure


TASKS = (CompareRuns("scaling", compare_scaling), CompareRuns("ablation", compare_errors))
