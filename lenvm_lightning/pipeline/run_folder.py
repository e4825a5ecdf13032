"""Run directories: which folder a run lives in, what it was started with, whether it is complete."""

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_only

from ..errors import RecipeError
from ..utils.locked_folder import LOCK_FILE, FolderLock, differences, write_whole
from ..utils.names import is_plain_name
from ..utils.own_folder import MARKER, claim, is_free, kind_of, refuse_others
from ..utils.plain_yaml import MOST_NODES, read_yaml_file
from ..utils.reading import read_json_object

_RECIPE, _DONE = "recipe.yaml", "results.json"
_KIND = "run"
_RESERVED = ("rollouts",)  # beside the runs, where the stage `sample` writes what they share
_OTHER_PLACE = "Choose another --name, or another folder of runs (--runs)."
WRITE_AGAIN = "Delete that file: the same command writes it again, from the last checkpoint."


class RunFolder:
    """A run on disk: `recipe.yaml` (resolved), `checkpoints`, `tensorboard`, `model`, `results.json`, and its marker.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints, self.model, self.results = path / "checkpoints", path / "model", path / _DONE

    @property
    def is_run(self) -> bool:
        """Whether it is one: only such a folder is ever emptied, or a model in it replaced."""
        return kind_of(self.path) == _KIND

    @property
    def complete(self) -> bool:
        """Whether it ran to the end: the results are written last."""
        return self.results.exists()

    def settings(self) -> dict[str, Any] | None:
        """The settings it was started with; None for a folder that holds no run.

        Raises:
            RecipeError: they cannot be read.
        """
        recipe = self.path / _RECIPE
        if not recipe.exists():
            return None
        # Twice as much as a recipe may hold: defaults are written out here.
        found, _ = read_yaml_file(recipe, RecipeError, 2 * MOST_NODES)
        if not isinstance(found, dict):
            raise RecipeError(f"{recipe} must hold the settings of the run, found {type(found).__name__}")
        return found

    def claim(self) -> None:
        """Make the folder where it is missing, and mark it as that of a run.

        Raises:
            RecipeError: it holds something else.
        """
        claim(self.path, _KIND, RecipeError, _OTHER_PLACE)

    def start(self, settings: dict[str, Any], header: str) -> None:
        """Write the resolved recipe, unless it is there."""
        if self.settings() is None:
            self.claim()
            write_whole(self.path / _RECIPE, header + yaml.safe_dump(settings, sort_keys=False))

    def finish(self, results: dict[str, Any]) -> None:
        """Write the results, all or nothing."""
        write_whole(self.results, json.dumps(results, indent=2) + "\n")

    def read_results(self) -> dict[str, Any]:
        """The results.

        Raises:
            RecipeError: they cannot be read.
        """
        return read_json_object(self.results, RecipeError, WRITE_AGAIN)

    def clear(self) -> None:
        """Delete everything in it; the lock stays with its owner, and the marker where it is.

        The results go first and the settings last: killed in between, it is neither taken for complete nor do its
        checkpoints go to a run with other settings.

        Raises:
            RecipeError: it holds something else than a run.
        """
        refuse_others(self.path, _KIND, RecipeError, _OTHER_PLACE)
        order = {_DONE: 0, _RECIPE: 2}
        for path in sorted(self.path.iterdir(), key=lambda path: order.get(path.name, 1)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in (LOCK_FILE, MARKER):
                path.unlink()


def require_name(name: str | None, recipe: str) -> str:
    """The name of a run, by which its folder is called: that given, or else that of its recipe.

    Args:
        name: given by the user.
        recipe: name of the recipe.

    Raises:
        RecipeError: it cannot be the name of a folder among the runs.
    """
    found = recipe if name is None else name
    if is_plain_name(found) and found not in _RESERVED:
        return found
    said = "--name" if name is not None else "the recipe's file, which gives the run its name,"
    raise RecipeError(
        f"{said} {found!r}: the name of a run is that of one folder among the runs, without / and \\, and neither "
        f"{', '.join(['empty', '.', '..', *_RESERVED])}. Give another --name."
    )


def choose_folder(root: Path, recipe: str, name: str | None, settings: dict[str, Any], fresh: bool) -> RunFolder:
    """The folder for these settings: the run that has them already, else the first free of NAME, NAME-2, NAME-3, ….

    A folder that holds something else than a run is not free.

    Args:
        root: folder of all runs.
        recipe: name of the recipe.
        name: name given by the user; then only that folder will do.
        settings: resolved settings.
        fresh: the run that is found will be deleted, so that a named one may have other settings.

    Raises:
        RecipeError: a name that cannot be; the named folder holds a run with other settings, which are listed, or
            something else; a run whose settings cannot be read.
    """
    first = require_name(name, recipe)
    number = 1
    while True:
        folder = RunFolder(root / (first if number == 1 else f"{first}-{number}"))
        if name is not None:
            refuse_others(folder.path, _KIND, RecipeError, _OTHER_PLACE)
            if fresh:  # whatever it was started with, and however broken it is
                return folder
        elif not (folder.is_run or is_free(folder.path)):
            rank_zero_only(print)(f"{folder.path} is not empty and holds no run: left alone", file=sys.stderr)
            number += 1
            continue
        changed = _changed(folder, settings)
        if not changed:
            return folder
        if name is not None:
            raise RecipeError(
                f"{folder.path} holds a run with other settings:\n  " + "\n  ".join(changed) + "\n"
                "Choose another --name, or delete that run with --fresh."
            )
        number += 1


def _changed(folder: RunFolder, settings: dict[str, Any]) -> list[str]:
    """In what a run differs from settings; nothing where there is none."""
    try:
        old = folder.settings()
    except RecipeError as error:
        raise RecipeError(
            f"{error}\nSo nobody knows which settings that run has: put the file back, or delete the run with "
            f"--name {folder.path.name} --fresh."
        ) from error
    return differences(old, settings) if old is not None else []


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
        RecipeError: see `choose_folder`.
        StoreError: another process has it.
    """
    while True:
        folder = choose_folder(root, recipe, name, settings, fresh)
        if (folder.complete and not fresh) or not is_first_process():
            yield folder
            return
        with FolderLock(folder.path):
            folder.claim()
            if fresh:
                folder.clear()
            if not _changed(folder, settings):
                folder.start(settings, header)
                yield folder
                return
        # Somebody else took it for other settings between our look and our lock.


def is_first_process() -> bool:
    """Whether this is the first process of a distributed run, or the only one of an ordinary one."""
    return getattr(rank_zero_only, "rank", 0) == 0 and LightningEnvironment().node_rank() == 0
