"""Tasks that look at finished runs and sample nothing: ``scaling`` and ``ablation``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import EvaluationError
from ...metrics import POSITION_NAMES
from ..results import Column, Measure, Row, Table
from ..task import Findings
from .scaling import AXES, RESULTS, plot_scaling, read_runs, scaling_lines

_SCALING_NOTE = "Below 0: more is better. One run a point, no error bars."
_ABLATION_NOTE = "Errors in tokens on the same held-out completions, one run each; MRE is at the prompt boundary."
_ERRORS = ("start", "25", "50", "75")


def scaling(folders: Sequence[str]) -> tuple[Findings, bool]:
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
        Row({"run": run.name}, {name: Measure(float(getattr(run, name))) for name in (*AXES, "loss")}, 1, 1)
        for run in sorted(runs, key=lambda run: (run.parameters, run.train_prompts, run.completions_per_prompt))
    ]
    lines = [
        Row(
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


def read_results(folders: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Results of finished runs, by the name of their folder.

    Raises:
        EvaluationError: some are none; all of them are listed.
    """
    found, problems = {}, []
    for folder in map(Path, folders):
        try:
            found[folder.name] = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            problems.append(f"{folder}: {error}")
    if problems:
        raise EvaluationError("these are no finished runs:\n  " + "\n  ".join(problems))
    return found


def ablation(folders: Sequence[str]) -> tuple[Findings, bool]:
    """Errors in tokens of runs that differ in anything: other targets and gammas have losses of other kinds.

    Returns:
        What was found, and whether it is of the tiny world.

    Raises:
        EvaluationError: no finished runs, or runs that were validated on other completions.
    """
    runs = read_results(folders)
    digests = {results.get("held_out_digest") for results in runs.values()}
    if len(digests) != 1 or None in digests:
        raise EvaluationError("errors of these runs cannot be compared: they were validated on different completions")
    columns = [
        Column("mre", "MRE", "down"),
        *[Column(f"mae_tokens/{at}", f"MAE {POSITION_NAMES[at]}", "down", ".1f") for at in _ERRORS],
        Column("loss", "loss", None, ".5f"),
        Column("gamma", "gamma", None, ".4f"),
    ]
    rows = [
        Row(
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
