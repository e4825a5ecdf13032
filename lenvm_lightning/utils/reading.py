"""Reading files that may be damaged, or written by somebody who means no good: what is wrong is a sentence."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, LenVMError
from .json_input import parse_json

_AGAIN = "Save or download the model again."


def first_line(error: BaseException) -> str:
    """What an error of another library says first, as a sentence; its kind where it says nothing, or only a name."""
    text, _, more = str(error).strip().partition("\n")
    if text.endswith(":"):  # what is wrong comes in the next line
        text = f"{text} {more.strip().partition(chr(10))[0]}"
    text = text.strip().rstrip(".")
    return f"{text if ' ' in text else f'{type(error).__name__} {text}'.strip()}."


@contextlib.contextmanager
def in_a_sentence(what: str, error_class: type[LenVMError] = CheckpointError, advice: str = "") -> Iterator[None]:
    """Turn whatever another library makes of a file into an error for people. Our own errors pass as they are.

    Libraries take a file at its word, so that a wrong one ends in any kind of error, wherever its word is first used.

    Args:
        what: the beginning of the sentence, such as "x/config.json cannot be used".
        error_class: of the error.
        advice: what to do, a sentence.

    Raises:
        LenVMError: of the class given.
    """
    try:
        yield
    except LenVMError:
        raise
    except Exception as error:
        raise error_class(f"{what}: {first_line(error)} {advice}".rstrip()) from error


def read_json_object(
    path: Path, error_class: type[LenVMError] = CheckpointError, advice: str = _AGAIN
) -> dict[str, Any]:
    """Content of a JSON file that holds an object.

    Args:
        path: the file.
        error_class: of the error.
        advice: what to do where it cannot be read, a sentence.

    Raises:
        LenVMError: of the class given; it cannot be read, is broken, or no object. The file is named.
    """
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise error_class(f"{path} cannot be read: {error.strerror}. {advice}") from error
    except ValueError as error:
        raise error_class(f"{path} is not valid JSON: {first_line(error)} {advice}") from error
    if not isinstance(content, dict):
        raise error_class(f"{path} must hold a JSON object, found {type(content).__name__}. {advice}")
    return content
