"""Settings of a stage, as fields of a dataclass: what each may be, how it is read, what is wrong with those given."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

import yaml

from .generators.interface import Sampling

_DRAWING = {f.name for f in fields(Sampling)}


@dataclass(frozen=True)
class Kind:
    """What a setting may be: how it is read from a command line, whether a value is one, and what to call it."""

    parse: Callable[[str], Any]
    fits: Callable[[Any], bool]
    called: str


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _are_sources(value: Any) -> bool:
    many = value if isinstance(value, list) else [value]
    return bool(many) and all(_is_text(source) or (isinstance(source, dict) and source) for source in many)


def _parse_options(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


TEXT = Kind(str, _is_text, "a word")
SOURCES = Kind(str, _are_sources, "a name, a file, {source: ...} or a list of these")
OPTIONS = Kind(
    _parse_options,
    lambda value: isinstance(value, dict) and all(isinstance(key, str) for key in value),
    "a mapping such as {concurrency: 64}",
)
COUNT = Kind(int, lambda value: type(value) is int and value >= 1, "a whole number of at least 1")
INTEGER = Kind(int, lambda value: type(value) is int, "a whole number")
NUMBER = Kind(float, lambda value: type(value) in (int, float), "a number")


def setting(kind: Kind, meaning: str, default: Any = MISSING) -> Any:
    """Declare a setting."""
    return field(default=default, metadata={"kind": kind, "meaning": meaning})


def misfits(section: Mapping[str, Any], known: Mapping[str, Field[Any]]) -> Iterator[tuple[str, str]]:
    """(key, problem) of every value that cannot be; unknown keys are somebody else's matter."""
    drawing = {}
    for key, value in section.items():
        if key not in known or (value is None and known[key].default is None):
            continue
        kind = known[key].metadata["kind"]
        if not kind.fits(value):
            yield key, f"{key} must be {kind.called}, found {value!r}"
        elif key in _DRAWING:
            drawing[key] = value
    try:
        Sampling(**drawing)
    except ValueError as error:
        for problem in str(error).split("; "):
            yield problem.partition(" ")[0], problem


def describe(known: Mapping[str, Field[Any]]) -> str:
    """Every setting with its default, for people."""
    width = max(map(len, known)) + 2
    return "\n".join(
        f"  {name:{width}}{f.metadata['meaning']}"
        + ("" if f.default is None else " (required)" if f.default is MISSING else f" (default: {f.default})")
        for name, f in known.items()
    )
