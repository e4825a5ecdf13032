"""Run directories: which folder a run lives in, what it was started with, whether it is complete."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_only

from ..errors import RecipeError
from ..utils.locked_folder import LOCK_FILE, FolderLock, differences, write_whole

_RECIPE, _DONE = "recipe.yaml", "results.json"


class RunFolder:
    """A run on disk: `recipe.yaml` (resolved), `checkpoints`, `tensorboard`, `model`, `results.json`.

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
            write_whole(self.path / _RECIPE, header + yaml.safe_dump(settings, sort_keys=False))

    def finish(self, results: dict[str, Any]) -> None:
        """Write the results, all or nothing."""
        write_whole(self.results, json.dumps(results, indent=2) + "\n")

    def clear(self) -> None:
        """Delete everything in it; the lock stays with its owner.

        The results go first and the settings last: killed in between, it is neither taken for complete nor do its
        checkpoints go to a run with other settings.
        """
        order = {_DONE: 0, _RECIPE: 2}
        for path in sorted(self.path.iterdir(), key=lambda path: order.get(path.name, 1)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK_FILE:
                path.unlink()


def choose_folder(root: Path, recipe: str, name: str | None, settings: dict[str, Any], fresh: bool) -> RunFolder:
    """The folder for these settings: the run that has them already, else the first free of NAME, NAME-2, NAME-3, ….

    Args:
        root: folder of all runs.
        recipe: name of the recipe.
        name: name given by the user; then only that folder will do.
        settings: resolved settings.
        fresh: the run that is found will be deleted, so that a named one may have other settings.

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
    return folder


@contextlib.contextmanager
def claimed_folder(
    root: Path, recipe: str, name: str | None, settings: dict[str, Any], fresh: bool, header: str
) -> Iterator[RunFolder]:
    """The folder for these settings, as `choose_folder` finds it: locked, begun, and emptied where `fresh`.

    A complete run that is only looked at is not locked, nor does any process of a distributed run but the first lock.

    Args:
        root: folder of all runs.
        recipe: name of the recipe.
        name: name given by the user.
        settings: resolved settings.
        fresh: delete the run that is found.
        header: first line of its `recipe.yaml`.

    Raises:
        RecipeError: the named folder holds a run with other settings.
        StoreError: another process has it.
    """
    while True:
        folder = choose_folder(root, recipe, name, settings, fresh)
        if (folder.complete and not fresh) or not is_first_process():
            yield folder
            return
        with FolderLock(folder.path):
            if fresh:
                folder.clear()
            old = folder.settings()
            if old is None or not differences(old, settings):
                folder.start(settings, header)
                yield folder
                return
        # Somebody else took it for other settings between our look and our lock.


def is_first_process() -> bool:
    """Whether this is the first process of a distributed run, or the only one of an ordinary one."""
    return getattr(rank_zero_only, "rank", 0) == 0 and LightningEnvironment().node_rank() == 0
