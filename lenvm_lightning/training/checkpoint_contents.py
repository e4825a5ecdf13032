"""What a checkpoint of training holds: what is trained, and a digest of the weights that it was trained beside."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from ..errors import CheckpointError
from ..models.hub_files import some
from ..models.lenvm_config import LenVMConfig


def kept_names(named_parameters: Iterable[tuple[str, nn.Parameter]], pretrained: bool) -> set[str]:
    """Names of the parameters that a checkpoint holds: those trained, and those that could not be loaded again.

    Args:
        named_parameters: of the module.
        pretrained: the others came from the backbone's own files.
    """
    return {name for name, parameter in named_parameters if parameter.requires_grad or not pretrained}


def keep_what_is_trained(
    checkpoint: dict[str, Any], kept: set[str], frozen_digest: str | None, config: LenVMConfig
) -> None:
    """Leave only the kept weights in a checkpoint, in place, and add what says where they belong.

    Args:
        checkpoint: that Lightning is about to write.
        kept: from `kept_names`.
        frozen_digest: from `digest_of_frozen`.
        config: of the value model.
    """
    checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in kept}
    checkpoint["trained"] = sorted(checkpoint["state_dict"])  # where ranks write their shards, this alone is read
    checkpoint["frozen"] = frozen_digest
    checkpoint["lenvm_config"] = asdict(config)


def check_contents(checkpoint: Mapping[str, Any], kept: set[str], frozen_digest: str | None, source: str) -> None:
    """Refuse to go on with weights missing, or beside others.

    Args:
        checkpoint: as it was read.
        kept: from `kept_names`.
        frozen_digest: of the weights that are there now; None where this process has none of them.
        source: of the backbone, for the message.

    Raises:
        CheckpointError: keys are missing or unknown, or the weights that are not trained have changed.
    """
    named = checkpoint.get("state_dict") or checkpoint.get("trained")
    if not isinstance(named, dict | list) or not all(isinstance(name, str) for name in named):
        raise CheckpointError("the checkpoint does not say which weights it holds. Start another run with --name.")
    stored = set(named)
    wrong = [f"{key} is missing" for key in sorted(kept - stored)]
    wrong += [f"{key} has no place" for key in sorted(stored - kept)]
    if wrong:
        raise CheckpointError(f"the checkpoint is of another model: {some(wrong)}. Start another run with --name.")
    if frozen_digest is not None and checkpoint.get("frozen", frozen_digest) != frozen_digest:
        raise CheckpointError(
            f"the weights of {source} that are not trained have changed since this run began, so it cannot go on as "
            "it was: put the old ones back, or start another run with --name"
        )
