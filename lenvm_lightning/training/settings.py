"""All settings of a `LenVMModule` in one place: what they may be, and how a checkpoint holds them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..distributions.heads import HeadConfig
from ..models.adapters import LoRA
from ..models.backbone_config import BackboneConfig
from ..objectives import LossConfig
from .optimizers import OptimizerConfig


@dataclass(frozen=True)
class LenVMSettings:
    """What a `LenVMModule` was made with.

    Attributes:
        backbone: what the model is built on.
        gamma: discount in (0, 1), or `auto`, which the lengths of the training data decide.
        loss: what the head learns.
        optimizer: how it learns.
        lora: adapters on a frozen language model; None trains the backbone itself.
        head_dropout: dropout in the value head, in [0, 1).
        head: what it predicts of the lengths that may follow: the value alone, or their distribution, too.
    """

    backbone: BackboneConfig
    gamma: float | Literal["auto"]
    loss: LossConfig
    optimizer: OptimizerConfig
    lora: LoRA | None
    head_dropout: float
    head: HeadConfig = field(default_factory=HeadConfig)

    def problems(self) -> list[str]:
        """What is wrong with the settings, in words: each for itself, and with one another."""
        found = []
        if self.gamma != "auto" and not 0.0 < self.gamma < 1.0:
            found.append(f"gamma must lie strictly between 0 and 1 or be 'auto', got {self.gamma}")
        if not 0.0 <= self.head_dropout < 1.0:
            found.append(f"head_dropout must be at least 0 and below 1, got {self.head_dropout}")
        found += self.backbone.problems() + self.loss.problems() + self.optimizer.problems() + self.head.problems()
        return found + self._adapter_problems()

    def _adapter_problems(self) -> list[str]:
        backbone = self.backbone
        if self.lora is None:
            if backbone.quantise is None:
                return []
            return ["backbone.quantise: weights in four bits cannot be trained, so it needs adapters: set lora.rank"]
        found = self.lora.problems()
        if not backbone.pretrained:
            found.append("lora trains adapters on weights that are kept elsewhere, so it needs pretrained: true")
        if not backbone.freeze_vision:
            found.append("lora trains the language model alone, so it needs freeze_vision: true")
        return found

    def as_plain(self) -> dict[str, Any]:
        """Nested dicts of plain values, which a checkpoint may hold: it is read with `weights_only=True`."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "LenVMSettings":
        """The settings again that `as_plain` wrote down.

        Raises:
            KeyError, TypeError: something is missing or unknown.
        """
        return cls(
            backbone=BackboneConfig(**plain["backbone"]),
            gamma=plain["gamma"],
            loss=LossConfig(**plain["loss"]),
            optimizer=OptimizerConfig(**plain["optimizer"]),
            lora=LoRA(**plain["lora"]) if plain["lora"] is not None else None,
            head_dropout=plain["head_dropout"],
            head=HeadConfig(**plain.get("head", {})),  # checkpoints of earlier releases have none
        )
