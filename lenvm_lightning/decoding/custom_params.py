"""Controls of length in the words of the research code's server: per request, as ``custom_params``.

That server is a fork of SGLang with a length value model beside the generator (arXiv 2604.27039, its public code). Its
names are those of the paper's policies. What it does otherwise than `guidance`, read in its
``lvm_guided_sampling.py``: a target of N is compared with N - t and not with N - (t + 1), so texts end a token or two
later; lengths are made of values with a gamma of 0.997 unless the request names another; ``linear`` counts its scale
from 1; ``value_min`` is read only where there is no target (and not on its GPU path, which serves top_k).
"""

from typing import Any

from ..errors import GenerationError, nearest
from ..guidance import AtLeast, AtMost, Control, EqualTo, Gated, Scale, Tilt, until_of
from .batched_controls import numbers_for_a_batch
from .control_text import LONGEST_TARGET

_CONSTRAINTS: dict[str, tuple[Any, str]] = {
    "eq": (EqualTo, "hard"), "eq_soft": (EqualTo, "soft"), "le": (AtMost, "hard"), "ge": (AtLeast, "hard"),
}  # fmt: skip
_KNOWN = (
    "value_mode", "value_scale", "target_length", "target_length_mode", "value_constraint", "gamma", "value_min",
    "value_entropy_threshold",
)  # fmt: skip


def write_custom_params(control: Control, gamma: float | None = None) -> dict[str, Any]:
    """A control in the words of the research code's server.

    Args:
        control: ``Tilt``, ``Scale``, and ``EqualTo``, ``AtMost`` or ``AtLeast`` in a mode of the paper; inside
            ``Gated``, too, whose thresholds mean the same there (g of the expectation; nats of entropy). Numbers are
            plain ones.
        gamma: discount of the length value model that the server has; where None, it takes 0.997. It matters to
            ``EqualTo`` alone.

    Returns:
        JSON values.

    Raises:
        GenerationError: the server has no name for the control, or would not do what it says.
    """
    if gamma is not None and not 0 < gamma < 1:
        raise GenerationError(f"gamma must lie between 0 and 1, found {gamma!r}")
    if numbers_for_a_batch(control):
        raise GenerationError(f"control {control} has numbers for several rows: give each request a control of its own")
    params = _params(control)
    return params if gamma is None else {**params, "gamma": float(gamma)}


def _params(control: Any) -> dict[str, Any]:
    if isinstance(control, Gated):
        return _gated(control)
    if isinstance(control, Tilt):
        return {"value_mode": "centered_exp", "value_scale": float(control.beta)}
    if isinstance(control, Scale):
        return _scaled(control)
    if not isinstance(control, EqualTo | AtMost | AtLeast):
        known = "Tilt, EqualTo, AtMost, AtLeast, Scale, Gated"
        raise GenerationError(f"the research server has no name for the control {control!r}; it knows {known}")
    if until_of(control) is not None:
        raise GenerationError(f"the research server has no name for until in {control}: it counts to the end of a text")
    if control.mode == "penalty":
        modes = "mode='hard' or mode='soft'" if isinstance(control, EqualTo) else "mode='hard'"
        raise GenerationError(
            f"the research server has no name for the mode 'penalty' of {control}, which is this package's own: use "
            f"{modes} (the paper's) there, or a local generator (LocalGenerator with lenvm=...)"
        )
    constraint = next(name for name, one in _CONSTRAINTS.items() if one == (type(control), control.mode))
    return {"target_length": int(control.n), "target_length_mode": "total", "value_constraint": constraint}


def _scaled(control: Scale) -> dict[str, Any]:
    scale = float(control.scale)
    if control.kind == "mul" and scale == 0:
        raise GenerationError(
            f"the research server leaves the distribution as it is under {control}: use AtMost(n, mode='hard'), which "
            "takes the smallest value too"
        )
    if control.kind == "linear":  # there 0 is the smallest value offered, 1 the mean, 2 the largest
        scale += 1
    return {"value_mode": control.kind, "value_scale": scale}


def _gated(control: Gated) -> dict[str, Any]:
    """The control inside, and its thresholds; of gates within gates the higher ones. No g and no entropy is below 0."""
    params = _params(control.control)
    gates = {"value_min": float(control.min_g), "value_entropy_threshold": float(control.min_entropy)}
    gates = {name: max(least, params.get(name, 0.0)) for name, least in gates.items()}
    if gates["value_min"] > 0 and "target_length" in params:
        raise GenerationError(
            f"the research server reads no min_g where there is a target, as in {control}: leave it out, or use "
            "min_entropy"
        )
    return params | {name: least for name, least in gates.items() if least > 0}


def read_custom_params(params: dict[str, Any]) -> Control | None:
    """The control that a request to the research code's server names; numbers mean here what they mean there.

    Args:
        params: JSON values. ``gamma`` is not read: a server knows that of its length value model.

    Returns:
        The control, that of the paper; None where the request names none.

    Raises:
        GenerationError: a name that is unknown, or a value that means nothing.
    """
    if unknown := [name for name in params if name not in _KNOWN]:
        raise GenerationError(
            f"custom_params: {unknown[0]!r} is unknown{nearest(unknown[0], _KNOWN)} (known: {', '.join(_KNOWN)})"
        )
    if params.get("target_length_mode", "total") != "total":
        found = params["target_length_mode"]
        raise GenerationError(f"custom_params: target_length_mode={found!r} is not served here, only 'total'")
    target = params.get("target_length")
    if target is not None and params.get("value_mode") is not None:
        raise GenerationError("custom_params: target_length and value_mode are two controls: give one of them")
    control = _read_scale(params) if target is None else _read_target(target, params.get("value_constraint", "eq"))
    gates = [_number(params, name, 0.0) for name in ("value_min", "value_entropy_threshold")]
    return Gated(control, *gates) if control is not None and any(gates) else control


def _read_target(target: Any, constraint: Any) -> Control:
    if type(target) is not int or not 1 <= target < LONGEST_TARGET:
        raise GenerationError(f"custom_params: target_length must be a whole number of tokens, found {target!r}")
    if not isinstance(constraint, str) or constraint not in _CONSTRAINTS:
        raise GenerationError(f"custom_params: value_constraint={constraint!r} is none of {', '.join(_CONSTRAINTS)}")
    kind, mode = _CONSTRAINTS[constraint]
    control: Control = kind(target, mode)
    return control


def _read_scale(params: dict[str, Any]) -> Control | None:
    mode = params.get("value_mode")
    if mode is None:
        return None
    try:
        if mode == "centered_exp":
            return Tilt(_number(params, "value_scale"))
        if mode in ("mul", "length_mul"):
            return Scale(_number(params, "value_scale"), mode)
        if mode == "linear":
            return Scale(_number(params, "value_scale") - 1, mode)
    except ValueError as error:
        raise GenerationError(f"custom_params: {error}") from error
    raise GenerationError(f"custom_params: value_mode={mode!r} is none of centered_exp, mul, linear, length_mul")


def _number(params: dict[str, Any], name: str, otherwise: float | None = None) -> float:
    given = params.get(name, otherwise)
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise GenerationError(f"custom_params: {name} must be a number, found {given!r}")
    try:
        return float(given)
    except OverflowError:
        raise GenerationError(f"custom_params: {name} is larger than any number here") from None
