"""What an evaluation is asked to do: one frozen dataclass, for the command line and for recipes alike.

Settings that mean something to one task only are a dataclass of that task (`Task.settings`); people type them beside
the others, and `EvaluationSettings.own` holds them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ..decoding.sampling_params import SamplingParams
from ..errors import EvaluationError, nearest
from ..utils.settings import COUNT, NUMBER, OPTIONS, TEXT, Kind, misfits, setting, setting_of
from . import tasks


def list_of(item: Kind, called: str) -> Kind:
    """A list of different values of a kind."""

    def fits(value: Any) -> bool:
        return isinstance(value, list) and 0 < len(value) == len(set(map(repr, value))) and all(map(item.fits, value))

    return Kind(item.parse, fits, f"{called}, each once")


def one_of(*known: str) -> Kind:
    """One of some words."""
    return Kind(str, lambda value: value in known, f"one of {', '.join(known)}")


def _parse_source(text: str) -> Any:
    return yaml.safe_load(text) if text.startswith("{") else text


TRUTH = Kind(lambda text: text.lower() in ("1", "true", "yes"), lambda value: isinstance(value, bool), "true or false")
_SOURCE = Kind(
    _parse_source,
    lambda value: TEXT.fits(value) or (isinstance(value, dict) and bool(value)),
    "a name, a file, a folder, a hub id, or {source: mathvision, path: ...}",
)


@dataclass(frozen=True)
class EvaluationSettings:
    """One task. What is None is chosen by the data source of the task, see its protocol.

    Attributes:
        own: the settings that this task alone has, an instance of its `settings`.
    """

    task: str = setting(TEXT, "what to measure")
    generator: str | None = setting(
        TEXT, "an embedded model, a directory, a hub id, or a server's http:// address", None
    )
    lenvm: str | None = setting(TEXT, "a length value model of the same vocabulary", None)
    gamma: float | None = setting(NUMBER, "of a length value model whose folder does not say", None)
    data: str | dict[str, Any] | None = setting(
        _SOURCE, "a local copy in the source's own layout, a hub id, or `tiny`", None
    )
    systems: list[str] | None = setting(
        list_of(TEXT, "a list of systems, such as [base, ours, tilt:-5]"), "systems to measure side by side", None
    )
    compare: bool = setting(TRUTH, "measure the systems that one compares in this task, see its protocol", False)
    limit: int | None = setting(COUNT, "only so many questions: for smoke tests, not for results", None)
    n: int | None = setting(COUNT, "completions of each question", None)
    temperature: float | None = setting_of(SamplingParams, "temperature", None)
    top_k: int | None = setting_of(SamplingParams, "top_k", None)
    top_p: float | None = setting_of(SamplingParams, "top_p", None)
    min_p: float | None = setting_of(SamplingParams, "min_p", None)
    max_tokens: int | None = setting_of(SamplingParams, "max_tokens", None)
    seed: int = setting_of(SamplingParams, "seed")
    dtype: str | None = setting(TEXT, "of the weights, such as bfloat16", None)
    device: str | None = setting(TEXT, "such as cuda:1", None)
    model: str | None = setting(TEXT, "which model, where a server has several", None)
    options: dict[str, Any] | None = setting(OPTIONS, "more for the generator, such as {concurrency: 64}", None)
    out: str | None = setting(TEXT, "folder of the results (default: results/TASK-GENERATOR-DIGEST)", None)
    own: Any = field(default=None)

    @property
    def data_is_file(self) -> bool:
        """Whether the data are files, which have no splits by name."""
        place = str((self.data.get("path") if isinstance(self.data, dict) else self.data) or "")
        return place.endswith(".jsonl") or Path(place).is_file()

    @property
    def guides_by_itself(self) -> bool:
        """Whether the generator is a server of the research code, which has a length value model of its own."""
        return (self.options or {}).get("server") == "research"

    def as_dict(self) -> dict[str, Any]:
        """All settings side by side, as people give them."""
        values = asdict(self)
        return {**values, **(values.pop("own") or {})}


COMMON = {f.name: f for f in fields(EvaluationSettings) if f.name != "own"}
"""Settings that every task has."""
WHERE = ("out", "dtype", "device", "options")  # settings that do not decide what is measured


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


def filled(settings: EvaluationSettings, defaults: Mapping[str, Any]) -> EvaluationSettings:
    """Settings with what is not given taken from a protocol.

    Args:
        settings: as given.
        defaults: values of settings, those of the task included.
    """
    common = {name: value for name, value in defaults.items() if name in COMMON and getattr(settings, name) is None}
    own = {
        name: value for name, value in defaults.items() if name not in COMMON and getattr(settings.own, name) is None
    }
    return replace(settings, **common, own=replace(settings.own, **own))


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
