"""Settings as fields of a dataclass: what each may be, how it is read from a command line, what is wrong with a value.

A setting is documented and checked in one place, its field. Command lines, recipes and constructors all read it there.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from .plain_yaml import parse_yaml


@dataclass(frozen=True)
class Kind:
    """What a setting may be.

    Attributes:
        parse: reads a word of a command line.
        fits: whether a value is one.
        called: how to name it in an error: "must be …".
    """

    parse: Callable[[str], Any]
    fits: Callable[[Any], bool]
    called: str


def is_integer(value: Any) -> bool:
    """Whether a value is a whole number; truth values are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; truth values are not."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def is_text(value: Any) -> bool:
    """Whether a value is a text that is not empty."""
    return isinstance(value, str) and bool(value)


def _are_sources(value: Any) -> bool:
    many = value if isinstance(value, list) else [value]
    return bool(many) and all(is_text(source) or (isinstance(source, dict) and source) for source in many)


def _are_texts(value: Any) -> bool:
    many = value if isinstance(value, list | tuple) else [value]
    return bool(many) and all(map(is_text, many))


TEXT = Kind(str, is_text, "a word")
SOURCES = Kind(str, _are_sources, "a name, a file, {source: ...} or a list of these")
OPTIONS = Kind(
    parse_yaml,
    lambda value: isinstance(value, dict) and all(isinstance(key, str) for key in value),
    "a mapping such as {concurrency: 64}",
)
FOLDERS = Kind(str, _are_texts, "a folder or a list of folders")
COUNT = Kind(int, lambda value: is_integer(value) and value >= 1, "a whole number of at least 1")
INTEGER = Kind(int, is_integer, "a whole number")
NUMBER = Kind(float, is_number, "a number")
TRUTH = Kind(lambda text: text.lower() in ("1", "true", "yes"), lambda value: isinstance(value, bool), "true or false")
SHARE = Kind(float, lambda value: is_number(value) and 0 < value < 1, "a number between 0 and 1")


def setting(kind: Kind, meaning: str, default: Any = MISSING) -> Any:
    """Declare a field of a dataclass as a setting.

    Args:
        kind: what it may be.
        meaning: what it does, for `--help` and the docs.
        default: its value where nothing is given; a setting without one is required.
    """
    return field(default=default, metadata={"kind": kind, "meaning": meaning})


def setting_of(owner: type, name: str, default: Any = MISSING, meaning: str | None = None) -> Any:
    """Declare a field that is a setting of another dataclass, with its kind and meaning.

    Args:
        owner: the dataclass that documents it.
        name: of its field.
        default: another default than there.
        meaning: what to say instead.
    """
    other = fields_of(owner)[name]
    default = other.default if default is MISSING else default
    return setting(other.metadata["kind"], meaning or other.metadata["meaning"], default)


def fields_of(owner: Any) -> dict[str, Field[Any]]:
    """Fields of a dataclass by name."""
    return {one.name: one for one in fields(owner)}


def misfits(section: Mapping[str, Any], known: Mapping[str, Field[Any]]) -> Iterator[tuple[str, str]]:
    """(key, problem) of every value that cannot be; unknown keys are somebody else's matter."""
    for key, value in section.items():
        if key not in known or (value is None and known[key].default is None):
            continue
        kind = known[key].metadata["kind"]
        if not kind.fits(value):
            yield key, f"{key} must be {kind.called}, found {value!r}"


def require_fit(settings: Any) -> None:
    """Check every setting of a dataclass; called where it is made.

    Raises:
        ValueError: values that cannot be, all of them named.
    """
    known = fields_of(settings)
    problems = [problem for _, problem in misfits({name: getattr(settings, name) for name in known}, known)]
    if problems:
        raise ValueError("; ".join(problems))


def describe(known: Mapping[str, Field[Any]]) -> str:
    """Every setting with its default, for people."""
    width = max(map(len, known)) + 2
    lines = []
    for name, one in known.items():
        note = " (required)" if one.default is MISSING else f" (default: {one.default})"
        if one.default in (None, ()):
            note = ""
        lines.append(f"  {name:{width}}{one.metadata['meaning']}{note}")
    return "\n".join(lines)
