"""The variants stage of a recipe: the same training with other settings, some at a time."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import RecipeError
from ..utils.locked_folder import differences, write_whole
from ..utils.plain_yaml import read_yaml_file
from .allowed_imports import named_packages

_OF_RANKS = (
    "LOCAL_RANK", "RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
    "MASTER_PORT", "TORCHELASTIC_", "SLURM_",
)  # fmt: skip


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
        if begun and plan.exists() and (changed := _changed(plan, text)):
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


def _changed(plan: Path, text: str) -> list[str]:
    """In what a variant differs from what it was trained with."""
    try:
        old, _ = read_yaml_file(plan, RecipeError)
    except RecipeError as error:
        return [str(error)]
    return differences(old, yaml.safe_load(text)) if isinstance(old, dict) else [f"{plan} holds no settings"]


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
                command = [sys.executable, "-m", "lenvm_lightning", "run", str(plan), f"--name={name}"]
                command += [f"--allow-import={package}" for package in named_packages()]
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
