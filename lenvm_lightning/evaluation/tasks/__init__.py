"""What is measured: one file a task. Files of this folder name their tasks in `TASKS`, and are found by themselves.

For a task of your own, outside the package, call `register` before `lenvm_lightning.evaluation.evaluate.evaluate` or
`lenvm_lightning.cli.evaluate.main`; `examples/custom_task.py` shows how.
"""

import functools
import pkgutil
from dataclasses import Field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ...utils.settings import fields_of

if TYPE_CHECKING:
    from ..task import AnyTask

_TASKS: "dict[str, AnyTask]" = {}


def register(task: "AnyTask") -> None:
    """Make a task known under its name.

    Args:
        task: an instance; its name and its own settings must not be taken.

    Raises:
        ValueError: the name is taken, or a setting of the task means something else elsewhere.
    """
    _import_built_in()
    _add(task)


def _add(task: "AnyTask") -> None:
    from ..settings import COMMON

    problems = []
    if task.name in _TASKS:
        problems.append(f"there is a task {task.name!r} already: give yours another name")
    for name, one in fields_of(task.settings).items():
        if name in COMMON:
            problems.append(f"every task has a setting {name!r}: give that of {task.name} another name")
        for other, its in _TASKS.items():
            same = fields_of(its.settings).get(name)
            # One command line reads them all.
            if same is not None and same.metadata["kind"].parse is not one.metadata["kind"].parse:
                problems.append(f"the setting {name!r} of {task.name} is read in another way than that of {other}")
    if problems:
        raise ValueError("; ".join(problems))
    _TASKS[task.name] = task


def get(name: str) -> "AnyTask":
    """The task of this name.

    Raises:
        KeyError: there is none.
    """
    _import_built_in()
    return _TASKS[name]


def names() -> list[str]:
    """Names of all tasks, in the order of the alphabet."""
    _import_built_in()
    return sorted(_TASKS)


def own_fields(name: str) -> dict[str, Field[Any]]:
    """The settings that a task has besides those of all tasks.

    Raises:
        KeyError: there is no such task.
    """
    return fields_of(get(name).settings)


def owners(setting: str) -> list[str]:
    """Names of the tasks that have a setting of this name as their own."""
    return [name for name in names() if setting in own_fields(name)]


@functools.cache
def _import_built_in() -> None:
    """Look into the files of this folder. None of them imports torch before it is used, so that this is quick."""
    for file in pkgutil.iter_modules(__path__):
        for task in getattr(import_module(f".{file.name}", __name__), "TASKS", ()):
            _add(task)
