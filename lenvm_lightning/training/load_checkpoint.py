"""The model in a checkpoint of training, without a Trainer."""

import pickle
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..models.adapters import digest_of_frozen
from ..models.lenvm_config import LenVMConfig
from ..models.value_model import LengthValueModel
from . import fsdp
from .build import build_model, prepare_for_training
from .checkpoint_contents import check_contents, kept_names
from .settings import LenVMSettings

_PREFIX = "model."  # what LenVMModule calls its value model


def model_of_checkpoint(path: Path, trust_remote_code: bool = False) -> LengthValueModel:
    """The model in a checkpoint of a run.

    What it was trained from is loaded again, then what was trained is put into it.

    Args:
        path: a `.ckpt` file, or folder of the shards of ranks.
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
        settings = LenVMSettings.from_plain(saved["hyper_parameters"])
        config = LenVMConfig(**saved["lenvm_config"])
    except (OSError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is no checkpoint of a length value model: {error!r}") from error
    backbone = settings.backbone
    if backbone.trust_remote_code and not trust_remote_code:
        raise CheckpointError(
            f"{path} was trained on modelling code that comes with {backbone.source!r}: look at that code, and give "
            "--trust-remote-code (trust_remote_code=True) if it may run here"
        )
    model = build_model(settings, config, None)
    prepare_for_training(model, backbone)
    named = ((_PREFIX + name, parameter) for name, parameter in model.named_parameters())
    check_contents(saved, kept_names(named, backbone.pretrained), digest_of_frozen(model), backbone.source)
    weights = {name.removeprefix(_PREFIX): tensor for name, tensor in fsdp.full_weights(path).items()}
    model.load_state_dict(weights, strict=False)
    return model.eval()
