"""The text form of a control, the same in command lines, recipes and servers: `tilt:-5`, `equal-to:128:hard`."""

from typing import Any

from ..errors import GenerationError, nearest
from ..guidance import AtLeast, AtMost, Control, EqualTo, Gated, Scale, Tilt

EXAMPLES = (
    "none", "tilt:-5", "equal-to:128", "equal-to:128:hard", "equal-to:128:soft", "at-most:64", "at-most:64:hard",
    "at-least:200", "at-least:200:hard", "scale:mul:0.5", "scale:linear:-0.5", "scale:length_mul:0.5",
    "gated:0.1:0.5:tilt:-5",
)  # fmt: skip
_TARGETS: dict[str, Any] = {"equal-to": EqualTo, "at-most": AtMost, "at-least": AtLeast}
_KINDS = ("none", "tilt", *_TARGETS, "scale", "gated")


def parse_control(text: str) -> Control | None:
    """Read a control.

    Args:
        text: ``none``, ``tilt:BETA``, ``equal-to:N``, ``at-most:N`` or ``at-least:N`` (each with ``:MODE`` after it or
            without), ``scale:KIND:SCALE``, or ``gated:MIN_G:MIN_ENTROPY:`` before another one; see `guidance`.

    Returns:
        The control; None for ``none``.

    Raises:
        GenerationError: the text is none of these, or a number or a mode means nothing; it names the nearest right one.
    """
    kind, *parts = (part.strip() for part in text.strip().split(":"))
    if kind not in _KINDS:
        hint = nearest(kind, _KINDS) or nearest(text, EXAMPLES)
        raise GenerationError(f"control {text!r} is none{hint} (such as {', '.join(EXAMPLES[1:])})")
    try:
        if kind == "none":
            _require(text, "none", parts, 0, 0)
            return None
        if kind == "tilt":
            _require(text, "tilt:-5", parts, 1, 1)
            return Tilt(_number(float, parts[0]))
        if kind == "scale":
            _require(text, "scale:mul:0.5", parts, 2, 2)
            name: Any = parts[0].replace("-", "_")
            return Scale(_number(float, parts[1]), name)
        if kind == "gated":
            _require(text, "gated:0.1:0.5:tilt:-5", parts, 3, 6)
            inner = parse_control(":".join(parts[2:]))
            return Gated(inner, _number(float, parts[0]), _number(float, parts[1]))
        _require(text, f"{kind}:128", parts, 1, 2)
        return _TARGETS[kind](_number(int, parts[0]), *parts[1:])
    except GenerationError:
        raise
    except ValueError as error:
        raise GenerationError(f"control {text!r}: {error}") from error


def _require(text: str, example: str, parts: list[str], least: int, most: int) -> None:
    if not least <= len(parts) <= most:
        raise GenerationError(f"control {text!r} has {len(parts)} parts after its name; write it like {example!r}")


def _number(kind: type[int] | type[float], word: str) -> Any:
    try:
        return kind(word)
    except ValueError:
        what = "a whole number of tokens" if kind is int else "a number"
        raise ValueError(f"{word!r} is not {what}") from None
