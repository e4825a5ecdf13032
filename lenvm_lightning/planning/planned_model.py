"""The model that a recipe would train, from its config alone: with weights that mean nothing, or take no memory."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel, PreTrainedModel

from ..distributions.heads import make_rule, rule_to_plain
from ..models.adapters import add_adapter
from ..models.backbone import cut_layers, load_config
from ..models.backbone_config import BackboneConfig
from ..models.lenvm_config import LenVMConfig
from ..models.value_model import LengthValueModel
from ..training.build import prepare_for_training, set_train_mode
from ..training.module import LenVMModule
from ..training.settings import LenVMSettings
from ..utils.reading import in_a_sentence
from .memory_kinds import HEAD, LANGUAGE, VISION
from .settings import PlanSettings

_SOME_GAMMA = 0.997  # where the data would decide: no shape depends on it
_SOME_LENGTH = 4096  # of the longest completion, which decides where bins lie, and at most how many there are


@dataclass
class Part:
    """Parameters of a part of the model."""

    trained: int = 0
    frozen: int = 0


def build(module: LenVMModule, fake: FakeTensorMode | None, plan_settings: PlanSettings) -> LengthValueModel:
    """Give a module the model it would train, with weights that mean nothing.

    Args:
        module: with its settings, and without a model.
        fake: the mode to build it under, without memory; None for real tensors.
        plan_settings: of the Trainer, whose precision may say what the weights are.

    Returns:
        The model, in the modes that training sets.

    Raises:
        CheckpointError: no config of such a backbone.
    """
    settings = module.settings
    gamma = _SOME_GAMMA if settings.gamma == "auto" else settings.gamma
    head = settings.head
    rule = make_rule(head.kind, head.size, _SOME_LENGTH, None)
    length_head = rule_to_plain(rule) if rule is not None else {}
    config = LenVMConfig(gamma, target=settings.loss.target, dropout=settings.head_dropout, length_head=length_head)
    # 1. On the meta device, where nothing is filled with numbers.
    with torch.device("meta") if fake else contextlib.nullcontext():
        backbone = _build_backbone(settings.backbone, plan_settings.weight_dtype)
        _add_adapter(backbone, settings, plan_settings.weight_dtype)
        module.model = model = LengthValueModel(backbone, config)
        prepare_for_training(model, settings.backbone)
    # 2. Tensors that pretend to be on a CPU: kernels refuse those on meta.
    if fake:
        _make_fake(model, fake)
    set_train_mode(model, settings.backbone)
    return model


def _build_backbone(wanted: BackboneConfig, weight_dtype: torch.dtype | None) -> PreTrainedModel:
    config = load_config(wanted.source, wanted.overrides, trust_remote_code=wanted.trust_remote_code)
    if wanted.keep_layers is not None:
        cut_layers(config, wanted.keep_layers, wanted.source)
    options = {"attn_implementation": wanted.attn_implementation} if wanted.attn_implementation else {}
    dtype = weight_dtype or getattr(torch, wanted.dtype)
    # Such as attention kernels that are not installed here.
    with in_a_sentence(f"{wanted.source!r} cannot be planned here"):
        return AutoModel.from_config(config, dtype=dtype, trust_remote_code=wanted.trust_remote_code, **options)


def _add_adapter(backbone: PreTrainedModel, settings: LenVMSettings, weight_dtype: torch.dtype | None) -> None:
    """Adapters in float32, unless the Trainer casts everything."""
    if settings.lora is None:
        return
    add_adapter(backbone, settings.lora)
    for name, parameter in backbone.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(weight_dtype or torch.float32)
    if settings.backbone.quantise:
        part: Any
        for part in backbone.modules():
            if hasattr(part, "cast_input_dtype_enabled"):  # on four bits, PEFT leaves casting to autocast
                part.cast_input_dtype_enabled = False


def _make_fake(model: nn.Module, fake: FakeTensorMode) -> None:
    """Put tensors that claim to be on a CPU in the place of those on meta, tied ones tied again."""
    made: dict[int, Tensor] = {}  # by the tensor that it replaces

    def replacement(tensor: Tensor) -> Any:
        if id(tensor) not in made:
            new = torch.empty_like(tensor, device="cpu")
            is_weight = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_weight else new
        return made[id(tensor)]

    with fake:
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                present = {name: tensor for name, tensor in held.items() if tensor is not None}
                for name, tensor in present.items():
                    held[name] = replacement(tensor)


def parameters_by_part(model: LengthValueModel) -> dict[str, Part]:
    """Parameters, trained and frozen: language model, embeddings, vision tower with projector, adapters, head."""
    parts = {name: Part() for name in (LANGUAGE, "embeddings", VISION, "adapters", HEAD)}
    embeddings = {id(p) for p in model.backbone.get_input_embeddings().parameters()}
    vision = {id(p) for part in model.vision_modules() for p in part.parameters()}
    for name, parameter in model.named_parameters():
        if name.startswith(("v_head.", "length_head.")):
            part = parts[HEAD]
        elif ".lora_" in name:
            part = parts["adapters"]
        elif id(parameter) in embeddings:
            part = parts["embeddings"]
        elif id(parameter) in vision:
            part = parts[VISION]
        else:
            part = parts[LANGUAGE]
        if parameter.requires_grad:
            part.trained += parameter.numel()
        else:
            part.frozen += parameter.numel()
    return {name: part for name, part in parts.items() if part.trained or part.frozen}


def quantised_matrices(model: LengthValueModel) -> Iterator[nn.Linear]:
    """The matrices that 4-bit weights replace: those of the language model, adapters apart."""
    for name, module in model.backbone.get_decoder().named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name:
            yield module
