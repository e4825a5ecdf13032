"""What a plan is made for: a batch, and how the Trainer runs a step."""

from dataclasses import dataclass

import torch

from ..errors import RecipeError
from ..training.strategies import stage_of


@dataclass(frozen=True)
class _Precision:
    """What a precision of the Trainer means: the type of autocast, and of the weights; None = as they are."""

    autocast: torch.dtype | None = None
    weights: torch.dtype | None = None


_PRECISIONS = {
    "32": _Precision(),
    "32-true": _Precision(),
    "64": _Precision(weights=torch.float64),
    "64-true": _Precision(weights=torch.float64),
    "bf16": _Precision(autocast=torch.bfloat16),
    "bf16-mixed": _Precision(autocast=torch.bfloat16),
    "16": _Precision(autocast=torch.float16),
    "16-mixed": _Precision(autocast=torch.float16),
    "bf16-true": _Precision(weights=torch.bfloat16),
    "16-true": _Precision(weights=torch.float16),
}


@dataclass(frozen=True)
class BatchShape:
    """A batch.

    Attributes:
        name: what kind of batch it is, for people.
        rows: sequences.
        length: tokens of each.
        grid: patches of the image that each row has: times, rows, columns; None for text.
        image_tokens: tokens of a row that stand for its image.
    """

    name: str
    rows: int
    length: int
    grid: tuple[int, int, int] | None = None
    image_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens, padding included."""
        return self.rows * self.length


@dataclass(frozen=True)
class PlanSettings:
    """How the Trainer runs a step.

    Attributes:
        precision: of the Trainer.
        accumulate: batches of an optimizer step on each device.
        devices: in all machines together.
        strategy: of the Trainer, by name.
        gpu: True = optimizers update all weights at once, which takes memory; on a CPU one after the other.

    Raises:
        RecipeError: a precision that cannot be planned.
    """

    precision: str = "32-true"
    accumulate: int = 1
    devices: int = 1
    strategy: str = "auto"
    gpu: bool = True

    def __post_init__(self) -> None:
        if self.precision not in _PRECISIONS:
            raise RecipeError(
                f"trainer.precision {self.precision!r} cannot be planned; there are {', '.join(_PRECISIONS)}"
            )

    @property
    def stage(self) -> int:
        """What is divided among devices: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too."""
        return stage_of(self.strategy) if self.devices > 1 else 0

    @property
    def autocast(self) -> torch.dtype | None:
        """Type that autocast computes in; None where it is off."""
        return _PRECISIONS[self.precision].autocast

    @property
    def weight_dtype(self) -> torch.dtype | None:
        """Type that the Trainer casts all weights to; None where they stay as they are."""
        return _PRECISIONS[self.precision].weights

    @property
    def computes_in(self) -> torch.dtype:
        """What matrices are multiplied in."""
        return self.autocast or self.weight_dtype or torch.float32
