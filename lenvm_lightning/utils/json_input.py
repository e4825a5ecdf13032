"""Reading JSON that somebody else wrote: the one place that knows everything that can be wrong with it."""

import json
import math
from pathlib import Path
from typing import Any

_DEEPEST = 100  # nested lists and objects: far more than data have, and few enough for whoever walks through them
_TOO_DEEP = f"it is nested too deeply: lists and objects more than {_DEEPEST} deep"


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Args:
        text: of one value; bytes are UTF-8.

    Raises:
        ValueError: it is none, is nested more than 100 deep, holds whole numbers of thousands of digits, NaN or
            infinity, or characters that no text can have (lone surrogates); the text says what and where.
    """
    try:
        # Without the end of its line: an error there is said to be in this line, not in the next.
        content = (text if isinstance(text, str) else text.decode("utf-8")).rstrip()
        value = json.loads(content, parse_constant=_refuse, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"it is not JSON: {error.msg} ({line}column {error.colno})") from error
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    if content.count("[") + content.count("{") > _DEEPEST and _is_deeper(value, _DEEPEST):
        raise ValueError(_TOO_DEEP)
    if "\\ud" in content or "\\uD" in content:  # the only way in for half a character
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError("it holds half of a character (a lone surrogate), which no text can have") from error
    return value


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The object of a JSON text.

    Raises:
        ValueError: see `parse_json`; or it is something else than an object.
    """
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"it must hold a JSON object, found {_called(value)}")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: see `parse_object`.
    """
    return parse_object(path.read_bytes())


def _is_deeper(value: Any, most: int) -> bool:
    """Whether lists and objects are nested deeper; goes through them level by level, not by recursion."""
    level = [value]
    for _ in range(most):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, list | dict)
        ]
        if not level:
            return False
    return True


def _refuse(constant: str) -> Any:
    raise ValueError(f"it holds {constant}, which is no number of JSON")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"it holds {number[:20]}, which is beyond every number")
    return value


def _called(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}
    return kinds.get(type(value), type(value).__name__)
