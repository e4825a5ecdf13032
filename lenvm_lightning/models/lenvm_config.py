"""What a value model remembers beside its weights: `lenvm_config.json`."""

import dataclasses
from typing import Any, get_args

from ..distributions.conformal import Calibration, calibration_from_plain
from ..distributions.heads import LengthRule, rule_from_plain
from ..objectives import LengthTarget, TargetKind
from ..utils.settings import is_integer, is_number
from .backbone_config import DtypeKind, QuantiseKind


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
        length_head: what the outputs of its distributional head mean, see `distributions.heads.rule_to_plain`; empty
            without one.
        calibration: how its distributions become intervals that held on held-out prompts, see
            `distributions.conformal.Calibration`; empty where nothing was held out.
        until: the text whose first occurrence it counts to, such as `</think>`; None = the end of the completion.

    Raises:
        ValueError: entries that mean nothing; the file may have been written by hand, or by a stranger.
    """

    gamma: float
    target: TargetKind = "discounted"
    length_scale: float = 1.0
    backbone: str | None = None
    rollouts: dict[str, Any] = dataclasses.field(default_factory=dict)
    dropout: float = 0.0
    base: dict[str, Any] = dataclasses.field(default_factory=dict)
    length_head: dict[str, Any] = dataclasses.field(default_factory=dict)
    calibration: dict[str, Any] = dataclasses.field(default_factory=dict)
    until: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.gamma, float) or not 0.0 < self.gamma < 1.0:
            raise ValueError(f"gamma must be a number strictly between 0 and 1; got {self.gamma!r}")
        if not is_number(self.length_scale):
            raise ValueError(f"length_scale must be a number; got {self.length_scale!r}")
        LengthTarget(self.target, self.gamma, self.length_scale)  # checks the two others
        wanted = {
            "backbone": (self.backbone is None or isinstance(self.backbone, str), "a text or null"),
            "rollouts": (_is_rollouts(self.rollouts), "an object, its generators one by their names"),
            "dropout": (is_number(self.dropout) and 0.0 <= self.dropout < 1.0, "a number of at least 0 and below 1"),
            "base": (_is_base(self.base), "an object that says dtype, quantise, keep_layers and digest"),
            "length_head": (isinstance(self.length_head, dict), "an object"),
            "calibration": (isinstance(self.calibration, dict), "an object"),
            "until": (self.until is None or (isinstance(self.until, str) and self.until != ""), "a text or null"),
        }
        if wrong := [f"{name} must be {kind}" for name, (fits, kind) in wanted.items() if not fits]:
            raise ValueError("; ".join(wrong))
        if self.length_head:
            rule_from_plain(self.length_head)
        if self.calibration:
            calibration_from_plain(self.calibration)

    @property
    def rule(self) -> LengthTarget:
        """The target rule: logit -> value, remaining."""
        return LengthTarget(self.target, self.gamma, self.length_scale)

    @property
    def length_rule(self) -> LengthRule | None:
        """What the outputs of the distributional head mean; None without one."""
        return rule_from_plain(self.length_head) if self.length_head else None

    @property
    def intervals(self) -> Calibration | None:
        """How distributions become intervals; None where nothing was held out to calibrate on."""
        return calibration_from_plain(self.calibration) if self.calibration else None


def _is_rollouts(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("generators", {}), dict)


def _is_base(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    layers, digest = value.get("keep_layers"), value.get("digest")
    return (
        value.get("dtype", "float32") in get_args(DtypeKind)
        and value.get("quantise") in (None, *get_args(QuantiseKind))
        and (layers is None or (is_integer(layers) and layers >= 1))
        and (digest is None or isinstance(digest, str))
    )
