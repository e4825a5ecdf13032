"""What the options of a server may be: recipes and command lines give them as they like."""

import re
from collections.abc import Callable
from typing import Any

from ....errors import GeneratorError
from ....utils.foreign_text import as_shown
from ....utils.settings import is_integer, is_number, is_text

MOST_CONCURRENT = 1000  # connections; more run into the limits of open files of common systems

_VARIABLE = re.compile(r"([A-Za-z_]\w*)?", re.ASCII)
_SECONDS = "a number of seconds of at least 0"


def _at_least_zero(value: Any) -> bool:
    return is_number(value) and value >= 0


def _text_or_none(value: Any) -> bool:
    return value is None or is_text(value)


_OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (_text_or_none, "be the name of a model"),
    "processor": (_text_or_none, "be a directory, a Hugging Face id or an embedded name"),
    "server": (is_text, "be a kind of server"),
    "concurrency": (
        lambda value: is_integer(value) and 1 <= value <= MOST_CONCURRENT,
        f"lie between 1 and {MOST_CONCURRENT}",
    ),
    "retries": (lambda value: is_integer(value) and value >= 0, "be a whole number of at least 0"),
    "backoff": (_at_least_zero, f"be {_SECONDS}"),
    "unreachable_timeout": (_at_least_zero, f"be {_SECONDS}"),
    "timeout": (lambda value: is_number(value) and value > 0, "be a number of seconds above 0"),
    "logprobs": (lambda value: value is None or isinstance(value, bool), "be true or false"),
    "api_key_env": (
        lambda value: isinstance(value, str) and _VARIABLE.fullmatch(value) is not None,
        "be the name of an environment variable",
    ),
    "seeds": (lambda value: isinstance(value, bool), "be true or false"),
    "gamma": (lambda value: value is None or is_number(value), "be a number"),
}


def require_options(**given: Any) -> None:
    """Check options of `ServerGenerator`.

    Args:
        **given: by their names.

    Raises:
        GeneratorError: some cannot be; all of them are named.
    """
    problems = [
        f"{name} must {must}, found {as_shown(repr(given[name]), 100)}"
        for name, (fits, must) in _OPTIONS.items()
        if name in given and not fits(given[name])
    ]
    if problems:
        raise GeneratorError("; ".join(problems))
