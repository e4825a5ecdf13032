"""From settings to a model that is ready to be trained; no weight is read before `build_model`."""

from typing import Any

from ..distributions.heads import make_rule, rule_to_plain
from ..errors import LenVMError
from ..models.backbone_config import BackboneConfig
from ..models.lenvm_config import LenVMConfig
from ..models.value_model import LengthValueModel
from .settings import LenVMSettings


def value_model_config(settings: LenVMSettings, facts: Any, until: str | None = None) -> LenVMConfig:
    """What the model must remember: gamma and target, and what the data know about lengths.

    Args:
        settings: of the module.
        facts: of the DataModule's rollouts; None where there is no DataModule.
        until: the text that its labels count to; None = the end of the completion.

    Raises:
        LenVMError: a setting that needs the lengths of the data, and no data.
    """
    gamma = settings.gamma
    if facts is None and (gamma == "auto" or settings.loss.target == "normalised"):
        raise LenVMError("gamma: auto and target: normalised need a DataModule that knows the lengths; set gamma")
    head = settings.head
    if facts is None and head.kind != "point":
        raise LenVMError(f"head.kind: {head.kind} needs a DataModule that knows the lengths")
    rule = make_rule(head.kind, head.size, facts.longest, facts.tail_after_cut) if facts else None
    return LenVMConfig(
        gamma=facts.gamma if gamma == "auto" else gamma,
        target=settings.loss.target,
        length_scale=float(facts.longest) if facts else 1.0,
        backbone=settings.backbone.source,
        rollouts=vars(facts).copy() if facts else {},
        dropout=settings.head_dropout,
        length_head=rule_to_plain(rule) if rule is not None else {},
        until=until,
    )


def build_model(settings: LenVMSettings, config: LenVMConfig, expected_length: float | None) -> LengthValueModel:
    """The model of these settings, with a fresh head.

    Args:
        settings: of the module.
        config: from `value_model_config`, or from a checkpoint.
        expected_length: tokens that the fresh head predicts everywhere, so that the first step is no shock.

    Raises:
        CheckpointError: the backbone cannot be loaded as it is asked for.
    """
    backbone = settings.backbone
    model = LengthValueModel.from_backbone(
        backbone.source,
        config,
        pretrained=backbone.pretrained,
        overrides=backbone.overrides,
        keep_layers=backbone.keep_layers,
        expected_length=expected_length,
        dtype=backbone.dtype,
        attn_implementation=backbone.attn_implementation,
        trust_remote_code=backbone.trust_remote_code,
        quantise=backbone.quantise,
        lora=settings.lora,
    )
    if model.length_head is not None:
        model.length_head.detached = settings.head.detached
    return model


def prepare_for_training(model: LengthValueModel, backbone: BackboneConfig) -> None:
    """Freeze and recompute what the settings say, in place."""
    if backbone.gradient_checkpointing:
        model.recompute_activations()
    if backbone.freeze_vision:
        for part in model.vision_modules():
            part.requires_grad_(False)


def set_train_mode(model: LengthValueModel, backbone: BackboneConfig) -> None:
    """Put all parts in train mode but those that are frozen; Lightning's `fit` leaves modes as they are.

    In eval mode transformers would drop gradient checkpointing and dropout silently.
    """
    model.train()
    if backbone.freeze_vision:
        for part in model.vision_modules():
            part.eval()
