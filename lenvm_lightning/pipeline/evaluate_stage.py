"""The stages of a recipe after training: variants of it, and evaluations."""

import fnmatch
import glob
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..evaluation import tasks as evaluation_tasks
from ..evaluation.read_settings import read_settings
from ..evaluation.settings import EvaluationSettings
from ..evaluation.task import RecipeTask, Task
from ..rollouts.sample import is_server
from ..utils.locked_folder import write_whole


def plan_tasks(
    recipe: Mapping[str, Any], where: str, generator: str | None = None, lenvm: str | None = None
) -> list[EvaluationSettings]:
    """The evaluate stage of a recipe.

    Args:
        recipe: as `read_recipe` returns it.
        where: its file, for messages.
        generator: whom tasks measure that name none.
        lenvm: the length value model of tasks that name none; that of the run.

    Raises:
        EvaluationError: settings that cannot be.
    """
    planned = []
    for number, section in enumerate(recipe.get("evaluate", ())):
        settings = read_settings(section, f"{where}: task {number + 1}")
        asked = settings.generator or generator
        task = evaluation_tasks.get(settings.task)
        reads_values = isinstance(task, Task) and task.needs_lenvm
        decodes_itself = asked is not None and is_server(asked) and not reads_values
        own = None if decodes_itself else lenvm
        planned.append(replace(settings, generator=asked, lenvm=settings.lenvm or own))
    return planned


def needs_generator(task: EvaluationSettings) -> bool:
    """Whether a task measures a generator; others look at what was measured or written before."""
    return isinstance(evaluation_tasks.get(task.task), Task) and getattr(task.own, "rollouts", None) is None


def check_tasks(tasks: list[EvaluationSettings], variants: Collection[str]) -> None:
    """Look at what tasks would do, before hours are spent on what comes before them.

    Args:
        tasks: settled.
        variants: names of the recipe's variants.

    Raises:
        LenVMError: systems that are none, data that are not there, runs that nobody trains.
    """
    from ..evaluation.evaluate import check

    for task in tasks:
        check(task)
        missing = [
            name
            for name in _runs_of(task)
            if name != "base" and not fnmatch.filter(variants, name) and not glob.glob(name)
        ]
        if missing:
            raise RecipeError(
                f"{task.task}: no variant is called {', '.join(missing)} (there are {', '.join(variants)})"
            )


def run_tasks(tasks: list[EvaluationSettings], folder: Path, command: str) -> int:
    """Run the tasks, and write `report.md` with all of their reports.

    Args:
        tasks: settled.
        folder: of the run; each task gets one of its own below `evaluate`.
        command: what was typed, for the reports.

    Returns:
        Exit status: 0, or 3 where completions failed.
    """
    from ..evaluation.evaluate import evaluate
    from ..evaluation.run_results import read_results
    from .sample_stage import sigterm_exits

    status, reports, done = 0, [], []
    for task in tasks:
        if isinstance(evaluation_tasks.get(task.task), RecipeTask):
            continue
        with sigterm_exits():
            found = evaluate(_with_runs(task, folder), folder / "evaluate", command)
        done.append(found.results)
        print(f"{found.text}\n{found.folder}\n", flush=True)
        status = max(status, found.status)
        place = os.path.relpath(found.folder, folder)
        reports.append(found.text.replace("](", f"]({place}/"))
    for task in tasks:
        summary = evaluation_tasks.get(task.task)
        if isinstance(summary, RecipeTask):
            finished = [*folder.glob("results.json"), *sorted((folder / "variants").glob("*/results.json"))]
            runs = read_results([str(file.parent) for file in finished])
            reports.insert(0, summary.as_markdown(done, runs, folder.name))
            print(reports[0])
    if len(reports) > 1:
        write_whole(folder / "report.md", "\n\n".join(reports))
        print(f"report: {folder / 'report.md'}")
    return status


def _runs_of(task: EvaluationSettings) -> list[str]:
    """Runs that a task compares, as the recipe names them."""
    return getattr(task.own, "runs", None) or []


def _with_runs(task: EvaluationSettings, folder: Path) -> EvaluationSettings:
    """With the folders of its runs: in a recipe `base` is the run itself, other names or patterns its variants."""
    if not _runs_of(task):
        return task
    found: list[str] = []
    for name in _runs_of(task):
        variants = [file.parent for file in (folder / "variants").glob("*/results.json")]
        variants = [place for place in variants if fnmatch.fnmatchcase(place.name, name)]
        places = [folder] if name == "base" else sorted(variants) or sorted(map(Path, glob.glob(name)))
        if not places:
            raise RecipeError(f"{task.task}: no run {name!r} in {folder / 'variants'}")
        found += [str(place) for place in places]
    return replace(task, own=replace(task.own, runs=list(dict.fromkeys(found))))
