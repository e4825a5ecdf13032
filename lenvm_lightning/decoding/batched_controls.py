"""One control for a batch whose rows have controls of their own: those of a kind are computed together."""

import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from ..errors import GenerationError
from ..guidance import AtLeast, AtMost, Control, Ends, EqualTo, Gated, Scale, Tilt

_OURS = (Tilt, EqualTo, AtMost, AtLeast, Scale, Gated)  # numbers of other controls need not take tensors


@dataclass(frozen=True)
class PerRow:
    """Controls of several kinds, each for some of the rows; see `per_row`.

    Args:
        parts: a control whose numbers are those of its rows, and True = a row of its. Shape (B,).
    """

    parts: Sequence[tuple[Control, Tensor]]

    def __call__(self, probs: Tensor, remaining: Tensor, generated: Tensor, gamma: float) -> Tensor:
        """Probabilities to sample from. Shape (B, K)."""
        result = probs
        for control, rows in self.parts:
            moved = control(probs, remaining, generated, gamma)
            if moved.shape != probs.shape:
                raise GenerationError(
                    f"control {control} must return a probability for each candidate, shape {tuple(probs.shape)}; got "
                    f"{tuple(moved.shape)}"
                )
            result = torch.where(rows[:, None], moved, result)
        return result

    def ends(self, generated: Tensor) -> Ends:
        """Which rows may not end yet, and which are to end, by their controls."""
        early, due = torch.zeros(2, len(generated), dtype=torch.bool, device=generated.device)
        for control, rows in self.parts:
            if (says := getattr(control, "ends", None)) is not None:
                told = says(generated)
                early |= rows & told.early
                due |= rows & told.due
        return Ends(early, due)


def per_row(controls: Sequence[Control | None], device: torch.device | str = "cpu") -> PerRow:
    """One control for a batch whose rows have controls of their own.

    Args:
        controls: one for each row; None leaves a row to the base model, bit for bit.
        device: of the tensors.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, control in enumerate(controls):
        if control is not None:
            groups.setdefault(_kind(control), []).append(row)
    parts = []
    for rows in groups.values():
        mask = torch.zeros(len(controls), dtype=torch.bool)
        mask[rows] = True
        # Rows of other kinds compute with the first control of this one, and take nothing of it.
        of_rows = [controls[rows[0]]] * len(controls)
        for row in rows:
            of_rows[row] = controls[row]
        parts.append((_move(_stack(of_rows), device), mask.to(device)))
    return PerRow(parts)


def _kind(control: Any) -> Hashable:
    """What controls must share to be computed together: everything but their numbers."""
    if type(control) in _OURS:
        return (type(control), *(_kind(getattr(control, field.name)) for field in dataclasses.fields(control)))
    if isinstance(control, Number) or (isinstance(control, Tensor) and control.ndim == 0):
        return None
    return control if isinstance(control, str) else id(control)


def _stack(values: Sequence[Any]) -> Any:
    """Controls of one kind as one, numbers as tensors."""
    first = values[0]
    if all(value is first for value in values):
        return first
    if type(first) in _OURS:
        stacked = {}
        for field in dataclasses.fields(first):
            stacked[field.name] = _stack([getattr(value, field.name) for value in values])
        return dataclasses.replace(first, **stacked)
    return first if isinstance(first, str) else torch.tensor([float(value) for value in values], dtype=torch.float64)


def _move(control: Any, device: torch.device | str) -> Any:
    if type(control) in _OURS:
        names = [field.name for field in dataclasses.fields(control)]
        return dataclasses.replace(control, **{name: _move(getattr(control, name), device) for name in names})
    return control.to(device) if isinstance(control, Tensor) else control


def numbers_for_a_batch(control: Any) -> bool:
    """Whether a control is made for the rows of one batch, and means nothing for a single row or other ones."""
    if isinstance(control, PerRow):
        return True
    if type(control) not in _OURS:
        return False
    parts = [getattr(control, field.name) for field in dataclasses.fields(control)]
    return any((isinstance(part, Tensor) and part.ndim > 0) or numbers_for_a_batch(part) for part in parts)
