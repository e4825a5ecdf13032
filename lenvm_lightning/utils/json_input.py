"""Reading JSON that somebody else wrote: the one place that knows everything that can be wrong with it."""

import json
from pathlib import Path
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Args:
        text: of one value; bytes are UTF-8.

    Raises:
        ValueError: it is none, is nested too deeply, holds whole numbers of thousands of digits, NaN or infinity, or
            characters that no text can have (lone surrogates); the text says what and where.
    """
    try:
        content = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(content, parse_constant=_refuse)
        if "\\u" in content or "\\U" in content:  # the only way in for them
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("it holds half of a character (a lone surrogate), which no text can have") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
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


def _refuse(constant: str) -> Any:
    raise ValueError(f"it holds {constant}, which is no number of JSON")


def _called(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}
    return kinds.get(type(value), type(value).__name__)
