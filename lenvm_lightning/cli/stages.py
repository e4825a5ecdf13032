"""The stages of a recipe after training: variants of it, and evaluations."""

import fnmatch
import glob
import os
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ..errors import RecipeError
from ..evaluation.settings import OF_VALUES, EvaluationSettings, read_settings
from ..rollouts.sample import is_server
from ..utils.locked_folder import differences, write_whole

_OF_RANKS = (
    "LOCAL_RANK", "RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
    "MASTER_PORT", "TORCHELASTIC_", "SLURM_",
)  # fmt: skip


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
    tasks = []
    for number, section in enumerate(recipe.get("evaluate", ())):
        task = read_settings(section, f"{where}: task {number + 1}")
        asked = task.generator or generator
        decodes_itself = asked is not None and is_server(asked) and task.task not in OF_VALUES
        own = None if decodes_itself else lenvm
        tasks.append(replace(task, generator=asked, lenvm=task.lenvm or own))
    return tasks


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
            for name in task.runs or ()
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
    from ..evaluation.tasks.compare_runs import read_results
    from .sample import sigterm_exits

    status, reports, done = 0, [], []
    for task in tasks:
        if task.task == "paper":
            continue
        with sigterm_exits():
            found = evaluate(_with_runs(task, folder), folder / "evaluate", command)
        done.append(found.results)
        print(f"{found.text}\n{found.folder}\n", flush=True)
        status = max(status, found.status)
        place = os.path.relpath(found.folder, folder)
        reports.append(found.text.replace("](", f"]({place}/"))
    if any(task.task == "paper" for task in tasks):
        from ..evaluation.tasks.paper_claims import as_markdown

        finished = [*folder.glob("results.json"), *sorted((folder / "variants").glob("*/results.json"))]
        runs = read_results([str(file.parent) for file in finished])
        reports.insert(0, as_markdown(done, runs, folder.name))
        print(reports[0])
    if len(reports) > 1:
        write_whole(folder / "report.md", "\n\n".join(reports))
        print(f"report: {folder / 'report.md'}")
    return status


def _with_runs(task: EvaluationSettings, folder: Path) -> EvaluationSettings:
    """With the folders of its runs: in a recipe `base` is the run itself, other names or patterns its variants."""
    if task.runs is None:
        return task
    found: list[str] = []
    for name in task.runs:
        variants = [file.parent for file in (folder / "variants").glob("*/results.json")]
        variants = [place for place in variants if fnmatch.fnmatchcase(place.name, name)]
        places = [folder] if name == "base" else sorted(variants) or sorted(map(Path, glob.glob(name)))
        if not places:
            raise RecipeError(f"{task.task}: no run {name!r} in {folder / 'variants'}")
        found += [str(place) for place in places]
    return replace(task, runs=list(dict.fromkeys(found)))


def run_variants(recipe: Mapping[str, Any], folder: Path) -> int:
    """Train every variant, each as a run of its own in `FOLDER/variants`; those that are complete are left alone.

    Args:
        recipe: with `fit` and `variants`; the data of `fit` are settled.
        folder: of the run.

    Returns:
        Exit status: 0, or that of the first variant that failed.

    Raises:
        RecipeError: a variant was trained with other settings.
    """
    from .recipe import vary

    plans = folder / "variants" / "recipes"
    plans.mkdir(parents=True, exist_ok=True)
    waiting: list[tuple[str, Path]] = []
    others: list[str] = []
    for name in recipe["variants"]["runs"]:
        plan, text = plans / f"{name}.yaml", yaml.safe_dump(vary(dict(recipe), name), sort_keys=False)
        begun = (folder / "variants" / name / "recipe.yaml").exists()
        if begun and plan.exists() and (old := plan.read_text(encoding="utf-8")) != text:
            changed = differences(yaml.safe_load(old), yaml.safe_load(text))
            others.append(f"{folder / 'variants' / name}: {'; '.join(changed)}")
            continue
        write_whole(plan, text)
        if not (folder / "variants" / name / "results.json").exists():
            waiting.append((name, plan))
    if others:
        raise RecipeError(
            "variants have other settings than when they were trained:\n  " + "\n  ".join(others) + "\n"
            "Delete those folders, or give the variants other names."
        )
    jobs = recipe["variants"].get("jobs", 1)
    print(f"variants: {len(waiting)} of {len(recipe['variants']['runs'])} to train, {jobs} at a time", flush=True)
    return _run_side_by_side(waiting, jobs, folder)


def _run_side_by_side(waiting: list[tuple[str, Path]], jobs: int, folder: Path) -> int:
    """Run `lightning run` for each, some at a time, with their output in `FOLDER/variants/NAME.log`."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # Where this run was a distributed one, a variant would take itself for one process of it and wait for the others.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_OF_RANKS)}
    environment = {**inherited, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    running: dict[str, subprocess.Popen[bytes]] = {}
    status = 0
    waiting = waiting[::-1]
    try:
        while running or (waiting and not status):
            while waiting and len(running) < jobs and not status:
                name, plan = waiting.pop()
                command = [sys.executable, "-m", "lenvm_lightning", "run", str(plan), "--name", name]
                with (folder / "variants" / f"{name}.log").open("ab") as log:
                    running[name] = subprocess.Popen(
                        [*command, "--runs", str(folder / "variants")], stdout=log, stderr=log, env=environment
                    )
            time.sleep(0.2)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    print(f"variant {name}: {'done' if process.returncode == 0 else 'FAILED'}", flush=True)
                    status = status or process.returncode
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    if status:
        print(f"a variant failed, see {folder / 'variants'}/*.log; the same command tries it again", file=sys.stderr)
    return status
