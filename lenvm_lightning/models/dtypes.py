"""In which dtype a model is computed where nobody says: its own, unless the processor has no instructions for it."""

from typing import Any

import torch
from transformers import PreTrainedConfig

from . import embedded
from .adapters import merge_in_place
from .backbone import Source
from .value_model import LengthValueModel


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16; without them it is slower than float32."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return True


def own_dtype(config: PreTrainedConfig) -> torch.dtype | None:
    """The dtype that a config gives for its weights; None where it gives none."""
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return getattr(torch, dtype, None) if isinstance(dtype, str) else dtype


def usual_dtype(config: PreTrainedConfig, device: torch.device) -> str:
    """The dtype to load a model in: ``auto``, its own, on a GPU; on a CPU ``bfloat16`` or ``float32``.

    On a CPU bfloat16 is taken for weights of that dtype, where there are instructions for it.
    """
    if device.type != "cpu":
        return "auto"
    return "bfloat16" if own_dtype(config) == torch.bfloat16 and has_bfloat16(device) else "float32"


def open_value_model(
    source: Source, *, gamma: float | None, dtype: str | None, device: torch.device, generator: str | None = None
) -> LengthValueModel:
    """A value model on its device, in eval mode, to predict with: adapters are added to the weights under them.

    Args:
        source: directory, hub id or embedded name.
        gamma: needed only where the checkpoint does not store it.
        dtype: of the weights; where None its own, but as in `usual_dtype` on a CPU.
        device: where it is computed.
        generator: whose completions are measured; an embedded adapter of this model is put on this copy of it.

    Raises:
        CheckpointError: see `LengthValueModel.from_pretrained`.
    """
    options: dict[str, Any] = {"dtype": dtype or ("auto" if has_bfloat16(device) else "float32")}
    base = embedded.base_for(str(source), generator) if generator is not None else None
    model = LengthValueModel.from_pretrained(source, gamma=gamma, base=base, **options)
    if dtype is None and device.type == "cpu" and model.backbone.dtype == torch.float16:
        model = model.float()
    merge_in_place(model.backbone)  # after the cast, so that nothing is rounded twice
    return model.to(device)
