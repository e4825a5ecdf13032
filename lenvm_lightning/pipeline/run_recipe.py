"""Running a recipe, stage by stage: what is complete is skipped, what was interrupted goes on."""

import contextlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from ..evaluation.settings import EvaluationSettings
from ..training.module import LenVMModule
from ..utils.foreign_text import without_credentials
from ..utils.locked_folder import full_disk_in_a_sentence
from .allowed_imports import imports_from, load_class
from .class_arguments import print_optional_groups
from .evaluate_stage import check_tasks, needs_generator, plan_tasks, run_tasks
from .fit_stage import FitCLI, parse_fit, print_end, run_fit
from .quiet import quieten
from .recipe import find_recipe, read_recipe
from .run_folder import RunFolder, claimed_folder, is_first_process, require_name
from .sample_stage import (
    SampleSettings,
    check_sampling,
    help_text,
    read_settings,
    release_memory,
    rollouts_file,
    run_sampling,
    settled,
    wait_for_first,
)
from .server_keys import named_servers, without_foreign_keys
from .variants import run_variants


@full_disk_in_a_sentence("What is done stays: make room, then type the same command again.")
def run_recipe(
    recipe: str,
    overrides: list[tuple[str, str | None]],
    *,
    runs: Path = Path("runs"),
    name: str | None = None,
    check: bool = False,
    fresh: bool = False,
    allow_import: Sequence[str] = (),
) -> int:
    """Run the stages of a recipe; see `lightning run --help`.

    Args:
        recipe: a YAML file, or the name of a shipped recipe.
        overrides: see `read_recipe`.
        runs: folder of all runs.
        name: of the run.
        check: look at recipe and data, do nothing.
        fresh: delete this run and train again.
        allow_import: packages beyond our own whose classes the recipe may name.

    Returns:
        Exit status.
    """
    quieten()
    with imports_from(allow_import):
        return _run_stages(recipe, overrides, runs, name, check, fresh)


def _run_stages(
    recipe: str, overrides: list[tuple[str, str | None]], runs: Path, name: str | None, check: bool, fresh: bool
) -> int:
    path = find_recipe(recipe)
    if any(key.endswith("help") for key, _ in overrides):
        return _print_help(path)
    settings = read_recipe(path, overrides)
    sampling = _plan_sampling(settings, overrides, path, runs)
    named = named_servers(overrides)
    folder_name = require_name(name, path.stem)
    if "fit" not in settings:
        return _run_without_fit(settings, sampling, path, RunFolder(runs / folder_name), check, named)
    cli = parse_fit(settings["fit"], str(path))
    if sampling is not None:
        cli.settings = {"sample": sampling.as_dict(), **cli.settings}
    tasks = _plan_tasks(cli, settings, sampling, path, RunFolder(runs / folder_name).model)
    check_tasks(tasks, settings.get("variants", {}).get("runs", ()))
    if check:
        return _check(cli, sampling, path)
    with claimed_folder(runs, path.stem, name, cli.settings, fresh, f"# resolved from {path}\n") as folder:
        status = 0
        if folder.complete:
            rank_zero_only(print)(f"{folder.path} is complete for these settings (--fresh trains again).\n")
            print_end(folder)
        else:
            status = _sample(sampling, named) if sampling is not None else 0
            if sampling is not None and not rollouts_file(sampling).exists():
                return status
            # Whether completions were sampled just now must not decide the numbers that training draws.
            if (seed := cli.config["seed_everything"]) is not False:
                L.seed_everything(seed, workers=True, verbose=False)
            status = run_fit(cli, folder, fresh) or status
        if status in (0, 3):
            tasks = _plan_tasks(cli, settings, sampling, path, folder.model)
            status = _after_fit(settings, without_foreign_keys(tasks, named), folder) or status
        return status


def _run_without_fit(
    settings: dict[str, Any],
    sampling: SampleSettings | None,
    path: Path,
    folder: RunFolder,
    check: bool,
    named: frozenset[str],
) -> int:
    """A recipe that only samples, or only measures."""
    tasks = plan_tasks(settings, str(path), sampling.generator if sampling else None)
    check_tasks(tasks, ())
    if check:
        if sampling is not None:
            check_sampling(sampling)
        for task in tasks:
            print(f"evaluate: {task.task} of {without_credentials(task.generator or 'the embedded pair')}")
        return 0
    if tasks:
        folder.claim()
    status = run_sampling(*without_foreign_keys([sampling], named), wait=True) if sampling is not None else 0
    return run_tasks(without_foreign_keys(tasks, named), folder.path, _typed()) or status if tasks else status


def _plan_tasks(
    cli: FitCLI, settings: dict[str, Any], sampling: SampleSettings | None, path: Path, model: Path
) -> list[EvaluationSettings]:
    """What is measured in the end, of the model that will be in this folder; tasks without a generator are left out."""
    if isinstance(cli.model, LenVMModule):
        tasks = plan_tasks(settings, str(path), sampling.generator if sampling else None, str(model))
    else:  # it trains a generator
        tasks = plan_tasks(settings, str(path), str(model))
    return [task for task in tasks if task.generator is not None or not needs_generator(task)]


def _after_fit(settings: dict[str, Any], tasks: list[EvaluationSettings], folder: RunFolder) -> int:
    """Variants and evaluations of a run that has been trained."""
    if not is_first_process():
        return 0
    release_memory()
    if "variants" in settings and (status := run_variants(settings, folder.path)):
        return status
    if len(tasks) < len(settings.get("evaluate", ())):
        print("evaluate: left out, nobody says which generator wrote these rollouts (--evaluate.generator NAME)")
    return run_tasks(tasks, folder.path, _typed()) if tasks else 0


def _typed() -> str:
    """The command line, for reports."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _plan_sampling(
    settings: dict[str, Any], overrides: list[tuple[str, str | None]], path: Path, runs: Path
) -> SampleSettings | None:
    """The sample stage of a recipe, with its folder; training reads what it writes, unless the recipe says otherwise.

    None where there is no such stage, or where the command line names other rollouts.
    """
    if "sample" not in settings:
        return None
    for key, value in overrides:
        if key.startswith("fit.data.") and key.rpartition(".")[2] in ("files", "dataset"):
            rank_zero_only(print)(f"sample: left out, --{key} {value} names other rollouts", file=sys.stderr)
            del settings["sample"]
            return None
    sampling = settled(read_settings(settings["sample"], str(path)), runs)
    if "fit" in settings:
        data = settings["fit"]["data"].setdefault("init_args", {})
        if data.get("files") is None and data.get("dataset") is None:
            data["files"] = str(rollouts_file(sampling))
    return sampling


def _sample(sampling: SampleSettings, named: frozenset[str]) -> int:
    if not is_first_process():
        wait_for_first(sampling)
        return 0
    try:
        return run_sampling(*without_foreign_keys([sampling], named), wait=True)
    finally:
        release_memory()


def _check(cli: FitCLI, sampling: SampleSettings | None, path: Path) -> int:
    if sampling is not None and not check_sampling(sampling):
        print(f"{path} is ready to sample; its data can be looked at once that is done.")
        return 0
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    print(f"{path} and its data are ready to train on.")
    return 0


def _print_help(path: Path) -> int:
    settings = read_recipe(path, [])
    print(f"sample stage, --sample.KEY VALUE:\n{help_text()}\n")
    fit = settings.get("fit", {})
    words = ["--help"] + [f"--{part}.help={fit[part]['class_path']}" for part in ("model", "data") if part in fit]
    for word in words if fit else ():
        with contextlib.suppress(SystemExit):
            FitCLI([word])
        print()
    if "model" in fit:
        print_optional_groups(load_class(fit["model"]["class_path"]), "model")
    return 0
