"""The model in a checkpoint of training, without a Trainer."""

import inspect
import pickle
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..models.adapters import LoRA, digest_of_frozen
from ..models.value_model import LengthValueModel, LenVMConfig
from . import fsdp
from .module import LenVMModule, build_model


def model_of_checkpoint(path: Path, trust_remote_code: bool = False) -> LengthValueModel:
    """The model in a checkpoint of a run.

    What it was trained from is loaded again, then what was trained is put into it.

    Args:
        path: a ``.ckpt`` file, or folder of the shares of ranks.
        trust_remote_code: run modelling code that comes with the backbone. That training did so is not enough: the
            checkpoint may be somebody else's.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: it cannot be read, does not fit, or its backbone needs code that is not trusted.
    """
    try:
        about = path / fsdp.METADATA_FILE if path.is_dir() else path
        saved = torch.load(about, map_location="cpu", mmap=True, weights_only=True)
        h, config = saved["hyper_parameters"], saved["lenvm_config"]
    except (OSError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is no checkpoint of a length value model: {error!r}") from error
    if h["trust_remote_code"] and not trust_remote_code:
        raise CheckpointError(
            f"{path} was trained on modelling code that comes with {h['backbone']!r}: look at that code, and give "
            "--trust-remote-code (trust_remote_code=True) if it may run here"
        )
    model = build_model(h, LenVMConfig(**config), None)
    given = {name: h[name] for name in inspect.signature(LenVMModule).parameters}
    module = LenVMModule(**{**given, "lora": LoRA(**h["lora"]) if h["lora"] else None})
    module.model = model
    module._prepare_backbone(model)
    module._frozen = digest_of_frozen(model)
    module.on_load_checkpoint(saved)
    module.load_state_dict(fsdp.full_weights(path), strict=False)
    return model.eval()
