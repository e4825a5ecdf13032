"""What a value model remembers beside its weights: `lenvm_config.json`."""

import dataclasses
from typing import Any

from ..objectives import LengthTarget, TargetKind


@dataclasses.dataclass
class LenVMConfig:
    """What a value model must remember beside its weights; stored as `lenvm_config.json`.

    Attributes:
        gamma: the discount it was trained with.
        target: what its head regresses on, see `LengthTarget`.
        length_scale: tokens at which the `normalised` target reaches 1.
        backbone: name or path of the model that training started from.
        rollouts: what is known of the training rollouts: generator, sampling settings, lengths.
        dropout: dropout before each linear layer of the head, while training.
        base: how the weights under an adapter are loaded: `dtype`, `quantise`, `keep_layers`, and their
            `digest`; empty for a model that holds its own.

    Raises:
        ValueError: a gamma, target or length scale that means nothing.
    """

    gamma: float
    target: TargetKind = "discounted"
    length_scale: float = 1.0
    backbone: str | None = None
    rollouts: dict[str, Any] = dataclasses.field(default_factory=dict)
    dropout: float = 0.0
    base: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.gamma, float) or not 0.0 < self.gamma < 1.0:
            raise ValueError(f"gamma must be a number strictly between 0 and 1; got {self.gamma!r}")
        LengthTarget(self.target, self.gamma, self.length_scale)  # checks the others

    @property
    def rule(self) -> LengthTarget:
        """The target rule: logit -> value, remaining."""
        return LengthTarget(self.target, self.gamma, self.length_scale)
