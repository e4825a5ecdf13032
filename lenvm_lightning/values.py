"""Remaining tokens <-> value <-> logit: the only file that knows the formula and its sign.

A state with ``remaining`` tokens still to come (EOS included; 0 after EOS) has the discounted return

    value = -(1 - gamma ** remaining)        in (-1, 0]

and a head that emits ``logit`` predicts ``value = -sigmoid(logit)``. Everything below follows from those two lines.
"""

import math

import torch
from torch import Tensor


def _log_gamma(gamma: float) -> float:
    if not 0.0 < gamma < 1.0:
        raise ValueError(f"gamma must lie strictly between 0 and 1, got {gamma!r}")
    return math.log(gamma)


def _as_float(x: Tensor) -> Tensor:
    """Integers and half precision become float32; float32 and float64 stay as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def remaining_to_value(remaining: Tensor, gamma: float) -> Tensor:
    """Discounted return of a state: ``-(1 - gamma ** remaining)``.

    Args:
        remaining: tokens still to come, EOS included, >= 0. Any shape, integer or float.
        gamma: discount, in (0, 1).

    Returns:
        Value in [-1, 0], same shape, float32 (float64 for float64 input). Exactly 0 at ``remaining == 0``.

    Raises:
        ValueError: gamma outside (0, 1).
    """
    return torch.expm1(_as_float(remaining) * _log_gamma(gamma))


def length_share(remaining: Tensor, gamma: float) -> Tensor:
    """What controls are written on: ``g = -value = 1 - gamma ** remaining``, in [0, 1]. Any shape."""
    return -remaining_to_value(remaining, gamma)


def value_to_remaining(value: Tensor, gamma: float) -> Tensor:
    """Invert `remaining_to_value`: ``ln(1 + value) / ln(gamma)``.

    A value near -1 has few digits left: in float32 the answer cannot exceed ``16.6 / -ln(gamma)`` tokens
    (about 5,500 at gamma = 0.997) and saturates there instead of becoming infinite.
    Prefer `logit_to_remaining`, which has no ceiling.

    Args:
        value: in [-1, 0]; positive rounding noise counts as 0. Any shape.
        gamma: discount, in (0, 1).

    Returns:
        Remaining tokens, >= 0 and finite, same shape.

    Raises:
        ValueError: gamma outside (0, 1).
    """
    value = _as_float(value)
    smallest_survival = torch.finfo(value.dtype).eps / 2  # 1 + value for the float right above -1
    return torch.log1p(value.clamp(min=smallest_survival - 1.0, max=0.0)) / _log_gamma(gamma)


def logit_to_value(logit: Tensor) -> Tensor:
    """Value predicted by a head logit: ``-sigmoid(logit)``. Same shape, in [-1, 0], float32 or better."""
    return -torch.sigmoid(_as_float(logit))


def softplus(x: Tensor) -> Tensor:
    """``ln(1 + e^x)`` to full precision; torch's own switches to the identity at 20 and loses 2e-9 there."""
    x = _as_float(x)
    return torch.logaddexp(x, torch.zeros_like(x))


def inverse_softplus(y: Tensor) -> Tensor:
    """The ``x`` with ``softplus(x) == y``: ``y + ln(1 - e^-y)``; -inf at ``y == 0``."""
    y = _as_float(y)
    return y + torch.log(-torch.expm1(-y))


def logit_to_remaining(logit: Tensor, gamma: float) -> Tensor:
    """Remaining tokens implied by a head logit: ``softplus(logit) / -ln(gamma)``.

    Goes around the value on purpose: a float32 value rounds to -1 past about 5,500 tokens at gamma = 0.997.

    Args:
        logit: raw head output. Any shape and float type.
        gamma: discount, in (0, 1).

    Returns:
        Remaining tokens, >= 0, same shape, float32 or better.

    Raises:
        ValueError: gamma outside (0, 1).
    """
    return softplus(logit) / -_log_gamma(gamma)


def remaining_to_logit(remaining: Tensor, gamma: float) -> Tensor:
    """Invert `logit_to_remaining`; the logit of ``remaining == 0`` is -inf.

    Args:
        remaining: tokens still to come, >= 0. Any shape.
        gamma: discount, in (0, 1).

    Returns:
        Logit, same shape, float32 or better.

    Raises:
        ValueError: gamma outside (0, 1).
    """
    return inverse_softplus(_as_float(remaining) * -_log_gamma(gamma))


def gamma_for_length(length: float, coverage: float = 0.99) -> float:
    """The gamma at which a completion of ``length`` tokens uses ``coverage`` of the value range.

    The paper's rule: with ``length`` the 99th-percentile completion length, ``1 - gamma ** length = 0.99``,
    so ``gamma = 0.01 ** (1 / length)``.

    Args:
        length: tokens, > 0.
        coverage: share of the range (-1, 0) used at that length, in (0, 1).

    Returns:
        gamma, in (0, 1).

    Raises:
        ValueError: length not positive, or coverage outside (0, 1).
    """
    if not length > 0:
        raise ValueError(f"length must be positive, got {length!r}")
    if not 0.0 < coverage < 1.0:
        raise ValueError(f"coverage must lie strictly between 0 and 1, got {coverage!r}")
    return math.exp(math.log1p(-coverage) / length)
