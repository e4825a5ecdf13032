"""The text form of a control, the same in command lines, recipes and servers: `tilt:-5`, `equal-to:128:hard`."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import GenerationError, nearest
from ..guidance import AtLeast, AtMost, Control, EqualTo, Gated, Scale, Tilt

EXAMPLES = (
    "none", "tilt:-5", "equal-to:128", "equal-to:128:hard", "equal-to:128:soft", "at-most:64", "at-most:64:hard",
    "at-least:200", "at-least:200:hard", "scale:mul:0.5", "scale:linear:-0.5", "scale:length_mul:0.5",
    "gated:0.1:0.5:tilt:-5", "at-most:64:until=</think>",
)  # fmt: skip
LONGEST_TARGET = 2**31  # tokens
_UNTIL = ":until="  # the last part, whatever colons stand in it
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


@dataclass(frozen=True)
class _Form:
    """The text form of one control.

    Attributes:
        kind: of the control.
        example: of the text.
        least: parts that stand after the name, at least; ``most`` at most.
        build: makes the control of them.
        parts: makes them of the control.
    """

    kind: type
    example: str
    least: int
    most: int
    build: Callable[[list[str]], Control | None]
    parts: Callable[[Any], list[Any]]


def _target(kind: Any) -> Callable[[list[str]], Control]:
    def build(parts: list[str]) -> Control:
        n = _number(int, parts[0])
        if n >= LONGEST_TARGET:
            raise ValueError("no text has so many tokens")
        named: dict[str, str] = {}
        if parts[-1].startswith(_UNTIL[1:]):
            if kind is AtLeast:
                raise ValueError("until= ends a segment softly, which equal-to and at-most do")
            named["until"] = _unescaped(parts.pop()[len(_UNTIL) - 1 :])
        if len(parts) > 2:
            raise ValueError("it has one mode at most")
        control: Control = kind(n, *parts[1:], **named)
        return control

    return build


def _scale(parts: list[str]) -> Control:
    kind: Any = parts[0].replace("-", "_")
    return Scale(_number(float, parts[1]), kind)


def _gated(parts: list[str]) -> Control:
    return Gated(parse_control(":".join(parts[2:])), _number(float, parts[0]), _number(float, parts[1]))


def _target_parts(control: Any) -> list[Any]:
    until = getattr(control, "until", None)
    return [control.n, control.mode, *([] if until is None else [f"{_UNTIL[1:]}{_escaped(until)}"])]


def _escaped(text: str) -> str:
    return "".join(_ESCAPES.get(character, character) for character in text)


def _unescaped(text: str) -> str:
    r"""A text as it was before `\n`, `\r`, `\t` and `\\` stood for what they stand for in most languages.

    Raises:
        ValueError: another letter, or nothing, stands behind a backslash.
    """
    meant = {escape: character for character, escape in _ESCAPES.items()}
    parts = re.split(r"(\\.?)", text)
    if strange := [part for part in parts if part.startswith("\\") and part not in meant]:
        raise ValueError(f"until= has {strange[0]!r}; write {', '.join(meant)}")
    return "".join(meant.get(part, part) for part in parts)


def _gated_parts(control: Gated) -> list[Any]:
    return [control.min_g, control.min_entropy, control_as_text(control.control)]


_FORMS = {
    "none": _Form(type(None), "none", 0, 0, lambda parts: None, lambda control: []),
    "tilt": _Form(Tilt, "tilt:-5", 1, 1, lambda parts: Tilt(_number(float, parts[0])), lambda control: [control.beta]),
    "equal-to": _Form(EqualTo, "equal-to:128", 1, 3, _target(EqualTo), _target_parts),
    "at-most": _Form(AtMost, "at-most:128", 1, 3, _target(AtMost), _target_parts),
    "at-least": _Form(AtLeast, "at-least:128", 1, 3, _target(AtLeast), _target_parts),
    "scale": _Form(Scale, "scale:mul:0.5", 2, 2, _scale, lambda control: [control.kind, control.scale]),
    "gated": _Form(Gated, "gated:0.1:0.5:tilt:-5", 3, 7, _gated, _gated_parts),
}
"""A control of your own gets its text form by one more line here."""


def parse_control(text: str) -> Control | None:
    r"""Read a control.

    Args:
        text: ``none``, ``tilt:BETA``, ``equal-to:N``, ``at-most:N`` or ``at-least:N`` (each with ``:MODE`` after it or
            without), ``scale:KIND:SCALE``, or ``gated:MIN_G:MIN_ENTROPY:`` before another one; see `guidance`. An
            ``equal-to`` or ``at-most`` may end in ``:until=TEXT``: everything behind it is the text, with ``\n`` for
            the end of a line, ``\t`` for a tab and ``\\`` for a backslash.

    Returns:
        The control; None for ``none``.

    Raises:
        GenerationError: the text is none of these, or a number or a mode means nothing; it names the nearest right one.
    """
    head, mark, until = text.partition(_UNTIL)
    name, *parts = (part.strip() for part in head.strip().split(":"))
    parts += [f"{mark[1:]}{until}"] if mark else []
    form = _FORMS.get(name)
    if form is None:
        hint = nearest(name, _FORMS) or nearest(text, EXAMPLES)
        raise GenerationError(f"control {text!r} is none{hint} (such as {', '.join(EXAMPLES[1:])})")
    if not form.least <= len(parts) <= form.most:
        raise GenerationError(f"control {text!r} has {len(parts)} parts after its name; write it like {form.example!r}")
    try:
        return form.build(parts)
    except GenerationError:
        raise
    except ValueError as error:
        raise GenerationError(f"control {text!r}: {error}") from error


def control_as_text(control: Control | None) -> str:
    """The text form of a control: what `parse_control` reads as that control.

    Raises:
        GenerationError: it has none: a control of somebody's own, or one with numbers that no text form names.
    """
    name = next((name for name, form in _FORMS.items() if type(control) is form.kind), None)
    try:
        text = "" if name is None else ":".join(map(str, [name, *_FORMS[name].parts(control)]))
        if name is not None and parse_control(text) == control:
            return text
    except GenerationError:  # such as tensors, one number a row
        pass
    raise GenerationError(f"control {control!r} has no text form (forms: {', '.join(EXAMPLES)})")


def _number(kind: type[int] | type[float], word: str) -> Any:
    try:
        return kind(word)
    except ValueError:
        what = "a whole number of tokens" if kind is int else "a number"
        raise ValueError(f"{word!r} is not {what}") from None
