"""What an evaluation is asked to do: one frozen dataclass, for the command line and for recipes alike."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ..decoding.sampling_params import SamplingParams
from ..errors import EvaluationError, nearest
from ..utils.settings import COUNT, NUMBER, OPTIONS, TEXT, Kind, misfits, setting, setting_of
from .tasks.lifebench import CONTROLS

TASKS = ("lifebench", "gsm8k", "math500", "vqa", "length", "tokens", "scaling", "ablation", "paper")
OF_VALUES = ("length", "tokens")  # they measure the length value model itself
_OF = {
    "lengths": ("lifebench",),
    "wishes": ("lifebench",),
    "languages": ("lifebench",),
    "soften": ("lifebench",),
    "threshold": ("tokens",),
    "runs": ("scaling", "ablation"),
}
"""Settings that mean something to some tasks only."""
WITHOUT_GENERATOR = ("scaling", "ablation", "paper")  # they look at what others have done


def _list_of(item: Kind, called: str) -> Kind:
    def fits(value: Any) -> bool:
        return isinstance(value, list) and 0 < len(value) == len(set(map(repr, value))) and all(map(item.fits, value))

    return Kind(item.parse, fits, f"{called}, each once")


def _one_of(*known: str) -> Kind:
    return Kind(str, lambda value: value in known, f"one of {', '.join(known)}")


def _parse_source(text: str) -> Any:
    return yaml.safe_load(text) if text.startswith("{") else text


_SOURCE = Kind(
    _parse_source,
    lambda value: TEXT.fits(value) or (isinstance(value, dict) and bool(value)),
    "a name, a file, a folder, a hub id, or {source: mathvision, path: ...}",
)
_TRUTH = Kind(lambda text: text.lower() in ("1", "true", "yes"), lambda value: isinstance(value, bool), "true or false")


@dataclass(frozen=True)
class EvaluationSettings:
    """One task. What is None is chosen by the task, see its protocol."""

    task: str = setting(_one_of(*TASKS), "what to measure: " + ", ".join(TASKS))
    generator: str | None = setting(
        TEXT, "an embedded model, a directory, a hub id, or a server's http:// address", None
    )
    lenvm: str | None = setting(TEXT, "a length value model of the same vocabulary", None)
    gamma: float | None = setting(NUMBER, "of a length value model whose folder does not say", None)
    data: str | dict[str, Any] | None = setting(
        _SOURCE, "a local copy in the source's own layout, a hub id, or `tiny`", None
    )
    systems: list[str] | None = setting(
        _list_of(TEXT, "a list of systems, such as [base, ours, tilt:-5]"), "systems to measure side by side", None
    )
    compare: bool = setting(_TRUTH, "measure the systems that one compares in this task, see its protocol", False)
    limit: int | None = setting(COUNT, "only so many questions: for smoke tests, not for results", None)
    n: int | None = setting(COUNT, "completions of each question", None)
    lengths: list[int] | None = setting(
        _list_of(COUNT, "a list of lengths"), "lifebench: lengths to wish for, tokens", None
    )
    wishes: list[str] | None = setting(
        _list_of(_one_of(*CONTROLS), f"a list of {', '.join(CONTROLS)}"), "lifebench: " + ", ".join(CONTROLS), None
    )
    languages: list[str] | None = setting(_list_of(_one_of("en", "cn"), "a list of en, cn"), "lifebench: en, cn", None)
    soften: bool = setting(_TRUTH, "lifebench: ask guided systems for `approximately` N instead of `equal to` N", False)
    threshold: float = setting(NUMBER, "tokens: residuals beyond it count", 0.01)
    runs: list[str] | None = setting(_list_of(TEXT, "a list of folders"), "scaling: folders of finished runs", None)
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

    @property
    def data_is_file(self) -> bool:
        """Whether the data are files, which have no splits by name."""
        place = str((self.data.get("path") if isinstance(self.data, dict) else self.data) or "")
        return place.endswith(".jsonl") or Path(place).is_file()


FIELDS = {f.name: f for f in fields(EvaluationSettings)}
WHERE = ("out", "dtype", "device", "options")  # settings that do not decide what is measured


def read_settings(section: Mapping[str, Any], where: str) -> EvaluationSettings:
    """Settings from what a recipe or a command line gives.

    Args:
        section: names and values; those that are None are left out.
        where: what they are of, for the message.

    Raises:
        EvaluationError: unknown names, values that cannot be, no task; all of it at once.
    """
    given = {key: value for key, value in section.items() if value is not None}
    problems = [f"{key!r} is no setting of a task{nearest(key, FIELDS)}" for key in given if key not in FIELDS]
    problems += [f"{name} is missing" for name, f in FIELDS.items() if f.default is MISSING and name not in given]
    problems += [problem for _, problem in misfits(given, FIELDS)]
    problems += [
        f"{key} is a setting of {' and '.join(_OF[key])}, not of {given['task']}"
        for key in given
        if not has(given.get("task"), key) and given[key] != FIELDS[key].default
    ]
    if problems:
        raise EvaluationError(f"{where} cannot be evaluated:\n  " + "\n  ".join(problems))
    return EvaluationSettings(**given)


def has(task: Any, key: str) -> bool:
    """Whether a setting means something to a task."""
    return key not in _OF or task in _OF[key]


def parser_of(name: str) -> Callable[[str], Any]:
    """What reads a word of the command line for a setting; of a list, each of its words."""
    return FIELDS[name].metadata["kind"].parse
