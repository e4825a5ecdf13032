"""The model in a checkpoint of training, without a Trainer."""

from pathlib import Path
from typing import Any

from ..errors import CheckpointError, LenVMError
from ..models.adapters import digest_of_frozen
from ..models.lenvm_config import LenVMConfig
from ..models.value_model import LengthValueModel
from ..utils.reading import first_line, in_a_sentence
from . import fsdp
from .build import build_model, prepare_for_training
from .checkpoint_contents import check_contents, kept_names
from .checkpoint_file import read_checkpoint_file
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
    what = f"{path} is no checkpoint of a length value model"
    try:
        saved = read_checkpoint_file(path / fsdp.METADATA_FILE if path.is_dir() else path)
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from error
    with in_a_sentence(what):
        settings = LenVMSettings.from_plain(saved["hyper_parameters"])
        problems = settings.problems()
        config = LenVMConfig(**saved["lenvm_config"])
    if problems:
        raise CheckpointError(f"{what}: its settings cannot be: {'; '.join(problems)}")
    backbone = settings.backbone
    if backbone.trust_remote_code and not trust_remote_code:
        raise CheckpointError(
            f"{path} was trained on modelling code that comes with {backbone.source!r}: look at that code, and give "
            "--trust-remote-code (trust_remote_code=True) if it may run here"
        )
    try:
        return _rebuild(path, saved, settings, config).eval()
    except Exception as error:  # settings and weights of a wrong form may end in anything
        said = str(error) if isinstance(error, LenVMError) else first_line(error)
        raise CheckpointError(f"{path} cannot be used: {said}") from error


def _rebuild(path: Path, saved: dict[str, Any], settings: LenVMSettings, config: LenVMConfig) -> LengthValueModel:
    """What was trained from, with what was trained put into it."""
    backbone = settings.backbone
    model = build_model(settings, config, None)
    prepare_for_training(model, backbone)
    named = ((_PREFIX + name, parameter) for name, parameter in model.named_parameters())
    check_contents(saved, kept_names(named, backbone.pretrained), digest_of_frozen(model), backbone.source)
    weights = {name.removeprefix(_PREFIX): tensor for name, tensor in fsdp.full_weights(path).items()}
    model.load_state_dict(weights, strict=False)
    return model
