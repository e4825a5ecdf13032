"""What an evaluation is asked to do: one frozen dataclass, for the command line and for recipes alike.

Settings that mean something to one task only are a dataclass of that task (`Task.settings`); people type them beside
the others, and `EvaluationSettings.own` holds them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..decoding.sampling_params import SamplingParams
from ..utils.plain_yaml import parse_yaml
from ..utils.settings import COUNT, FOLDERS, NUMBER, OPTIONS, TEXT, TRUTH, Kind, setting, setting_of


def list_of(item: Kind, called: str) -> Kind:
    """A list of different values of a kind."""

    def fits(value: Any) -> bool:
        return isinstance(value, list) and 0 < len(value) == len(set(map(repr, value))) and all(map(item.fits, value))

    return Kind(item.parse, fits, f"{called}, each once")


def one_of(*known: str) -> Kind:
    """One of some words."""
    return Kind(str, lambda value: value in known, f"one of {', '.join(known)}")


def _parse_source(text: str) -> Any:
    return parse_yaml(text) if text.startswith("{") else text


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
        TEXT, "an embedded model, a directory, a hub id, vllm: before one of these, or a server's http:// address", None
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
    allow_images_from: str | list[str] | None = setting(
        FOLDERS, "other folders than that of the data from which images that rows name may be opened", None
    )
    out: str | None = setting(TEXT, "folder of the results (default: results/TASK-GENERATOR-DIGEST)", None)
    own: Any = field(default=None)

    @property
    def data_is_file(self) -> bool:
        """Whether the data are files, which have no splits by name."""
        place = str((self.data.get("path") if isinstance(self.data, dict) else self.data) or "")
        return place.endswith(".jsonl") or Path(place).is_file()

    @property
    def guides_by_itself(self) -> bool:
        """Whether the generator is a server that has a length value model of its own."""
        return self.in_research_words or (self.options or {}).get("server") in ("lenvm", "vllm-lenvm")

    @property
    def in_research_words(self) -> bool:
        """Whether it is that of the research code, which knows the controls of the paper."""
        return (self.options or {}).get("server") == "research"

    def as_dict(self) -> dict[str, Any]:
        """All settings side by side, as people give them."""
        values = asdict(self)
        return {**values, **(values.pop("own") or {})}


COMMON = {f.name: f for f in fields(EvaluationSettings) if f.name != "own"}
"""Settings that every task has."""
WHERE = ("out", "dtype", "device", "options", "allow_images_from")  # settings that do not decide what is measured


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
