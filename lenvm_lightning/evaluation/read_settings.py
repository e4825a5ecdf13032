"""Settings of tasks from recipes and command lines: read, and what is wrong with them told all at once."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field
from typing import Any

from ..errors import EvaluationError, nearest
from ..utils.settings import misfits
from . import tasks
from .settings import COMMON, EvaluationSettings


def fields_of_task(task: Any) -> dict[str, Field[Any]]:
    """The settings of a task, those included that it alone has; of an unknown one those of all tasks."""
    own = tasks.own_fields(task) if task in tasks.names() else _own_of_all()
    return {**COMMON, **own}


def _own_of_all() -> dict[str, Field[Any]]:
    found: dict[str, Field[Any]] = {}
    for name in tasks.names():
        found |= tasks.own_fields(name)
    return found


def read_settings(section: Mapping[str, Any], where: str) -> EvaluationSettings:
    """Settings from what a recipe or a command line gives.

    Args:
        section: names and values; those that are None are left out.
        where: what they are of, for the message.

    Raises:
        EvaluationError: unknown names, values that cannot be, no task; all of it at once.
    """
    given = {key: value for key, value in section.items() if value is not None}
    problems = [problem for _, problem in mistakes(given)]
    if problems:
        raise EvaluationError(f"{where} cannot be evaluated:\n  " + "\n  ".join(problems))
    common = {key: value for key, value in given.items() if key in COMMON}
    own = {key: value for key, value in given.items() if key not in COMMON}
    return EvaluationSettings(**common, own=tasks.get(given["task"]).settings(**own))


def mistakes(section: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, problem) of every setting that cannot be; the key is empty where one is missing.

    Args:
        section: names and values, as people gave them.
    """
    task = section.get("task")
    known, every = fields_of_task(task), {**COMMON, **_own_of_all()}
    for key in section:
        if key in known:
            continue
        if key in every:
            yield key, f"{key} is a setting of {' and '.join(tasks.owners(key))}, not of {task}"
        else:
            yield key, f"{key!r} is no setting of a task{nearest(str(key), known) or '; known: ' + ', '.join(known)}"
    if "task" not in section:
        yield "", "task is missing"
    elif task not in tasks.names():
        hint = nearest(str(task), tasks.names())
        yield "task", f"task must be one of {', '.join(tasks.names())}, found {task!r}{hint}"
    yield from misfits({key: value for key, value in section.items() if key != "task"}, known)


def has(task: Any, key: str) -> bool:
    """Whether a setting means something to a task: only those that other tasks alone have do not."""
    return key in fields_of_task(task) or not tasks.owners(key)


def options_of_command_line() -> Iterator[tuple[str, Field[Any], str]]:
    """(name, field, help) of every setting of every task; the help says which task a setting belongs to."""
    for name, one in COMMON.items():
        help_text = one.metadata["meaning"]
        yield name, one, f"{help_text}: {', '.join(tasks.names())}" if name == "task" else help_text
    for name, one in _own_of_all().items():
        meanings: dict[str, list[str]] = {}
        for owner in tasks.owners(name):
            meanings.setdefault(tasks.own_fields(owner)[name].metadata["meaning"], []).append(owner)
        told = "; ".join(f"{', '.join(owners)}: {meaning}" for meaning, owners in meanings.items())
        yield name, one, told


def parser_of(one: Field[Any]) -> Callable[[str], Any]:
    """What reads a word of the command line for a setting; of a list, each of its words."""
    return one.metadata["kind"].parse


def default_of(one: Field[Any]) -> str:
    """The default of a setting for its help; empty where there is none to tell."""
    return "" if one.default in (None, False, MISSING) else f" (default: {one.default})"
