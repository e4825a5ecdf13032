"""LoRA and QLoRA: a frozen language model with adapters (PEFT), in four bits where asked for (bitsandbytes).

Adapters sit on the linear layers of the language model alone. Vision tower, projector and value head never carry one
and are never quantised; the head is trained whole, in float32, outside PEFT, which would lose it on export.

A directory with an adapter is PEFT's own layout (`adapter_config.json`, `adapter_model.safetensors`, keys as of
`AutoModel`) plus the head and the config of every length value model directory.
"""

import copy
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import CheckpointError, nearest
from ..utils.reading import in_a_sentence
from .adapter_config import read_adapter_config, target_pattern
from .backbone import load_backbone
from .hub_files import Source, find_file, some, tensors_of_file

# PEFT is imported where it is used: it takes a second, and most models carry no adapter.

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NAME = "default"  # PEFT's own for the only adapter of a model
_IN_FILES = "base_model.model."  # what PEFT puts before every key


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adapters: `W x + alpha / rank · B A x` with only A and B trained.

    Attributes:
        rank: rows of A.
        alpha: strength; what is added is scaled by alpha / rank.
        dropout: on the input of A, while training.
        targets: `all-linear`, or the last names of the layers that get one, such as `[q_proj, v_proj]`.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"

    def problems(self) -> list[str]:
        """What is wrong with the settings, in words."""
        found = [f"lora.{name} must be at least 1, got {n}" for name, n in vars(self).items()
                 if name in ("rank", "alpha") and n < 1]  # fmt: skip
        if not 0.0 <= self.dropout < 1.0:
            found.append(f"lora.dropout must be at least 0 and below 1, got {self.dropout}")
        if not self.targets or (isinstance(self.targets, str) and self.targets != "all-linear"):
            found.append(f"lora.targets must be all-linear or a list of names, such as [q_proj], got {self.targets!r}")
        return found


def is_adapted(backbone: nn.Module) -> bool:
    """Whether a backbone carries adapters."""
    return hasattr(backbone, "peft_config")


def add_adapter(backbone: PreTrainedModel, lora: LoRA) -> None:
    """Put fresh adapters on the language model and freeze everything else.

    B starts at zero, so nothing that the backbone computes changes.

    Raises:
        CheckpointError: a target that no linear layer of the language model is called.
    """
    from peft import LoraConfig

    language = backbone.get_decoder()
    prefix = next(name for name, module in backbone.named_modules() if module is language)
    linear = {
        name.rpartition(".")[2]
        for name, module in language.named_modules()
        if isinstance(module, nn.Linear)  # bitsandbytes' are too
    }
    targets = sorted(linear) if lora.targets == "all-linear" else list(lora.targets)
    if unknown := [name for name in targets if name not in linear]:
        raise CheckpointError(
            f"lora.targets: the language model of {type(backbone).__name__} has no linear layer "
            f"{', '.join(map(repr, unknown))}{nearest(unknown[0], linear)} It has {', '.join(sorted(linear))}."
        )
    _inject(
        backbone,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=target_pattern(prefix, targets),
            bias="none",
        ),
    )


def _inject(backbone: PreTrainedModel, config: Any) -> None:
    # transformers' own add_adapter asks for a PEFT that may be newer than the newest there is.
    from peft import inject_adapter_in_model

    backbone.requires_grad_(False)
    inject_adapter_in_model(config, backbone, _NAME)
    for name, parameter in backbone.named_parameters():
        if ".lora_" in name and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()  # most of AdamW's steps are too small for the type of the base


def adapter_weights(backbone: PreTrainedModel) -> dict[str, Tensor]:
    """The adapters' weights under the keys of an adapter file."""
    from peft import get_peft_model_state_dict

    # Embeddings are never trained here; asked whether they were, PEFT would look for the base on the hub.
    weights = get_peft_model_state_dict(backbone, adapter_name=_NAME, save_embedding_layers=False)
    return {_IN_FILES + key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}


def save_adapter(folder: Path, backbone: PreTrainedModel, base: str) -> None:
    """Write the two files of an adapter.

    Args:
        folder: an existing directory.
        backbone: with adapters.
        base: where the weights under them come from, hub id, directory or embedded name; an adapter that was loaded
            keeps what its own file said.
    """
    config: Any = copy.copy(backbone.peft_config[_NAME])
    path = Path(base_of(backbone, base))
    config.base_model_name_or_path = str(path.resolve()) if path.is_dir() else config.base_model_name_or_path or base
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_file(adapter_weights(backbone), folder / ADAPTER_FILE, metadata={"format": "pt"})


def base_of(backbone: PreTrainedModel, base: str) -> str:
    """Where the weights under the adapters come from: what their file said, and `base` for new ones."""
    config: Any = backbone.peft_config[_NAME]
    return str(config.base_model_name_or_path or base)


def refuse_local_base(backbone: PreTrainedModel, base: str) -> None:
    """Refuse to publish adapters that nobody else could load.

    Raises:
        CheckpointError: their base is a folder of this machine.
    """
    found = base_of(backbone, base)
    if Path(found).is_dir():
        raise CheckpointError(
            f"the base model of these adapters is a folder of this machine, {found}, which nobody could load "
            "elsewhere: publish whole weights instead, as `lenvm export` writes them without --adapter"
        )


def has_adapter(source: Source) -> bool:
    """Whether a directory or hub repository holds an adapter instead of whole weights."""
    try:
        return find_file(source, ADAPTER_CONFIG) is not None
    except CheckpointError:  # there is no such place, which whoever loads it says better
        return False


def load_adapted(source: Source, base: Source | None = None, **options: Any) -> PreTrainedModel:
    """The base model that an adapter names, with the adapter on it.

    Args:
        source: directory or hub id of the adapter.
        base: where the base model is; where the adapter says if None.
        options: for `load_backbone` of the base.

    Returns:
        The model, in eval mode; nothing in it is to be trained.

    Raises:
        CheckpointError: a file is missing or broken, the base cannot be loaded, or keys of the two do not agree.
    """
    from peft import set_peft_model_state_dict

    settings, weights = (find_file(source, name) for name in (ADAPTER_CONFIG, ADAPTER_FILE))
    if settings is None or weights is None:
        raise CheckpointError(f"{str(source)!r} has no {ADAPTER_FILE} beside its {ADAPTER_CONFIG}. Save it again.")
    config = read_adapter_config(settings)
    given = dict(tensors_of_file(weights, lambda key: True))
    ranks = [len(tensor) for key, tensor in given.items() if ".lora_A." in key and tensor.ndim]
    if (rank := max(config.r, *config.rank_pattern.values(), 0)) > max(ranks, default=0):
        raise CheckpointError(
            f"{settings} says rank {rank}, which none of the weights in {weights} has: these files belong to different "
            "adapters. Save or download the model again."
        )
    base = base or config.base_model_name_or_path
    backbone = load_backbone(base, **options)
    with in_a_sentence(f"the adapter in {str(source)!r} does not fit {str(base)!r}"):
        _inject(backbone, config)
        expected = adapter_weights(backbone)
    wrong = [f"{key} is missing" for key in expected if key not in given]
    wrong += [f"{key} has no place" for key in given if key not in expected]
    wrong += [
        f"{key} is {tuple(given[key].shape)}, expected {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in given and given[key].shape != tensor.shape
    ]
    if wrong:
        raise CheckpointError(
            f"the adapter in {str(source)!r} does not fit {str(base)!r}: "
            f"{some(wrong)}. They belong to different models: name the right base in {settings}."
        )
    set_peft_model_state_dict(backbone, {key.removeprefix(_IN_FILES): t for key, t in given.items()}, _NAME)
    return backbone.requires_grad_(False).eval()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers that a model holds, and how many of them are trained; one packed with another counts as well."""
    sizes = [(p.quant_state.shape.numel() if hasattr(p, "quant_state") else p.numel(), p) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, p in sizes if p.requires_grad)


def digest_of_frozen(model: nn.Module) -> str | None:
    """Tells one base from another: of the first numbers of every weight that is not trained, quantised ones aside.

    None for a model that is to be filled with weights later.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return None
    found = hashlib.blake2b(digest_size=12)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and ".lora_" not in name and parameter.is_floating_point():
            first = parameter.detach().flatten()[:64].to("cpu", torch.float32)
            found.update(name.replace(".base_layer", "").encode() + first.numpy().tobytes())
    return found.hexdigest()


@torch.no_grad()
def merge_in_place(backbone: PreTrainedModel) -> bool:
    """Add the adapters to the weights under them, so that they cost nothing any more; for models that only predict.

    Sums are computed in float32 and rounded to the dtype of the weights.

    Args:
        backbone: with or without adapters; changed.

    Returns:
        False = it has adapters still: quantised weights cannot take them, and those of DoRA are no sum.
    """
    from peft.tuners.lora import LoraLayer

    if not is_adapted(backbone):
        return True
    layers: list[tuple[str, Any]] = [(name, m) for name, m in backbone.named_modules() if isinstance(m, LoraLayer)]
    if not all(_can_take_a_sum(layer) for _, layer in layers):
        return False
    for name, layer in layers:
        base = layer.get_base_layer()
        base.weight.data = (base.weight.float() + layer.get_delta_weight(_NAME).float()).to(base.weight.dtype)
        parent, _, child = name.rpartition(".")
        setattr(backbone.get_submodule(parent), child, base)
    del backbone.peft_config
    return True


def _can_take_a_sum(layer: Any) -> bool:
    """Whether the adapter of a layer can be added to its weights: plain LoRA on plain weights."""
    base = layer.get_base_layer()
    plain = type(base) in (nn.Linear, Conv1D, nn.Embedding) and base.weight.dtype in _PLAIN
    return plain and not layer.use_dora.get(_NAME, False)


@torch.no_grad()
def merge(backbone: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A plain backbone whose weights are `W + alpha / rank · B A`, for saving.

    Sums are computed in float32. Weights in four bits are unpacked first, to the very numbers that were computed with
    in training: the merged model is of the quantised base, not of the one it was made from.

    Args:
        backbone: with adapters; not changed.
        dtype: of the weights; that of the base where None.

    Returns:
        A model whose buffers that are not stored are on the meta device: save it, then load it.

    Raises:
        CheckpointError: adapters of DoRA, which are no sum.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight

    dtype = dtype or backbone.dtype
    weights: dict[str, Tensor] = {}
    for name, module in backbone.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module  # PEFT's class declares half of what it has
            if layer.use_dora.get(_NAME, False):
                raise CheckpointError(
                    "these are adapters of DoRA, which cannot be added to the weights under them here: export them as "
                    "they are (lenvm export --adapter), or train plain LoRA"
                )
            base = layer.get_base_layer()
            added = layer.get_delta_weight(_NAME)
            weights[f"{name}.weight"] = (dequantize_module_weight(base).float() + added.float()).to(dtype)
            if base.bias is not None:
                weights[f"{name}.bias"] = base.bias.to(dtype)
    for key, tensor in backbone.state_dict().items():
        if ".base_layer." not in key and ".lora_" not in key:
            weights[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    config = type(backbone.config).from_dict(backbone.config.to_dict())
    for entry in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, entry):
            delattr(config, entry)
    with torch.device("meta"):
        plain = AutoModel.from_config(config, dtype=dtype)
    plain.load_state_dict(weights, assign=True)
    return plain
