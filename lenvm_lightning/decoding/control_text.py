"""The text form of a control, the same in command lines, recipes and servers: `tilt:-5`, `equal-to:128:hard`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import GenerationError, nearest
from ..guidance import AtLeast, AtMost, Control, EqualTo, Gated, Scale, Tilt

EXAMPLES = (
    "none", "tilt:-5", "equal-to:128", "equal-to:128:hard", "equal-to:128:soft", "at-most:64", "at-most:64:hard",
    "at-least:200", "at-least:200:hard", "scale:mul:0.5", "scale:linear:-0.5", "scale:length_mul:0.5",
    "gated:0.1:0.5:tilt:-5",
)  # fmt: skip
LONGEST_TARGET = 2**31  # tokens


@dataclass(frozen=True)
class _Form:
    """The text form of one control: an example, how many parts stand after its name, and what they make."""

    example: str
    least: int
    most: int
    build: Callable[[list[str]], Control | None]


def _target(kind: Any) -> Callable[[list[str]], Control]:
    def build(parts: list[str]) -> Control:
        n = _number(int, parts[0])
        if n >= LONGEST_TARGET:
            raise ValueError("no text has so many tokens")
        control: Control = kind(n, *parts[1:])
        return control

    return build


def _scale(parts: list[str]) -> Control:
    kind: Any = parts[0].replace("-", "_")
    return Scale(_number(float, parts[1]), kind)


def _gated(parts: list[str]) -> Control:
    return Gated(parse_control(":".join(parts[2:])), _number(float, parts[0]), _number(float, parts[1]))


_FORMS = {
    "none": _Form("none", 0, 0, lambda parts: None),
    "tilt": _Form("tilt:-5", 1, 1, lambda parts: Tilt(_number(float, parts[0]))),
    "equal-to": _Form("equal-to:128", 1, 2, _target(EqualTo)),
    "at-most": _Form("at-most:128", 1, 2, _target(AtMost)),
    "at-least": _Form("at-least:128", 1, 2, _target(AtLeast)),
    "scale": _Form("scale:mul:0.5", 2, 2, _scale),
    "gated": _Form("gated:0.1:0.5:tilt:-5", 3, 6, _gated),
}
"""A control of your own gets its text form by one more line here."""


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
    name, *parts = (part.strip() for part in text.strip().split(":"))
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
    try:
        text = "none" if control is None else _written(control)
        if text is not None and parse_control(text) == control:
            return text
    except GenerationError:  # such as tensors, one number a row
        pass
    raise GenerationError(f"control {control!r} has no text form (forms: {', '.join(EXAMPLES)})")


def _written(control: Any) -> str | None:
    if isinstance(control, Tilt):
        return f"tilt:{control.beta}"
    if isinstance(control, EqualTo | AtMost | AtLeast):
        name = {EqualTo: "equal-to", AtMost: "at-most", AtLeast: "at-least"}[type(control)]
        return f"{name}:{control.n}:{control.mode}"
    if isinstance(control, Scale):
        return f"scale:{control.kind}:{control.scale}"
    if isinstance(control, Gated):
        return f"gated:{control.min_g}:{control.min_entropy}:{control_as_text(control.control)}"
    return None


def _number(kind: type[int] | type[float], word: str) -> Any:
    try:
        return kind(word)
    except ValueError:
        what = "a whole number of tokens" if kind is int else "a number"
        raise ValueError(f"{word!r} is not {what}") from None
