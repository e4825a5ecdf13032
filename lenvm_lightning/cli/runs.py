"""Run directories: which folder a run lives in, what it was started with, whether it is complete."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from ..errors import RecipeError

_RECIPE, _DONE = "recipe.yaml", "results.json"


class RunFolder:
    """A run on disk: ``recipe.yaml`` (resolved), ``checkpoints``, ``tensorboard``, ``model``, ``results.json``.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints, self.model, self.results = path / "checkpoints", path / "model", path / _DONE

    @property
    def complete(self) -> bool:
        """Whether it ran to the end: the results are written last."""
        return self.results.exists()

    def settings(self) -> dict[str, Any] | None:
        """The settings it was started with; None for a folder that holds no run."""
        recipe = self.path / _RECIPE
        return yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.exists() else None

    def start(self, settings: dict[str, Any], header: str) -> None:
        """Write the resolved recipe, unless it is there."""
        if self.settings() is None:
            self.path.mkdir(parents=True, exist_ok=True)
            text = header + yaml.safe_dump(settings, sort_keys=False)
            part = self.path / f".{_RECIPE}"
            part.write_text(text, encoding="utf-8")
            part.replace(self.path / _RECIPE)

    def finish(self, results: dict[str, Any]) -> None:
        """Write the results, all or nothing."""
        part = self.path / f".{_DONE}"
        part.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        part.replace(self.results)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """``key: old -> new`` for every setting in which two trees differ."""
    found = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return found


def choose_folder(root: Path, recipe: str, name: str | None, settings: dict[str, Any], fresh: bool) -> RunFolder:
    """The folder for these settings: the run that has them already, else the first free of NAME, NAME-2, NAME-3, ….

    Args:
        root: folder of all runs.
        recipe: name of the recipe.
        name: name given by the user; then only that folder will do.
        settings: resolved settings.
        fresh: delete the run that was found.

    Raises:
        RecipeError: the named folder holds a run with other settings; they are listed.
    """
    number = 1
    while True:
        folder = RunFolder(root / (name or (recipe if number == 1 else f"{recipe}-{number}")))
        old = folder.settings()
        changed = differences(old, settings) if old is not None else []
        if not changed or (fresh and name):
            break
        if name:
            raise RecipeError(
                f"{folder.path} holds a run with other settings:\n  " + "\n  ".join(changed) + "\n"
                "Choose another --name, or delete that run with --fresh."
            )
        number += 1
    if fresh and folder.path.exists():
        shutil.rmtree(folder.path)
    return folder
