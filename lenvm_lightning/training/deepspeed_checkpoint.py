"""Reading DeepSpeed's checkpoints, with no object in them made but those that are known, and without DeepSpeed."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..utils.reading import in_a_sentence
from .checkpoint_file import read_checkpoint_file, require_sound

TAG = "checkpoint"  # the folder within a checkpoint that Lightning has DeepSpeed write into


class _Known:
    """In the place of the objects that DeepSpeed stores beside its tensors; they hold numbers."""


_KNOWN: list[Any] = [
    (_Known, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Known, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


def is_zero_checkpoint(folder: Path) -> bool:
    """Whether ranks of DeepSpeed wrote their shards into this folder."""
    return (folder / TAG).is_dir()


def read_optimizer_states(folder: Path) -> list[dict[str, Any]]:
    """What the optimizers of all ranks wrote, in their order, after every file has been read without running anything.

    DeepSpeed itself unpickles whatever its files hold, code included; what has been through here holds none.

    Args:
        folder: a checkpoint.

    Raises:
        CheckpointError: a file is missing, damaged, or holds other objects than DeepSpeed's files do.
    """
    contents = {path.name: read_checkpoint_file(path, _KNOWN) for path in sorted((folder / TAG).glob("*.pt"))}
    # Ranks are numbered without a gap, and each file says how many there were.
    optimizers: list[dict[str, Any]] = []
    with in_a_sentence(f"{folder / TAG} does not hold what DeepSpeed writes"):
        while (content := contents.get(f"zero_pp_rank_{len(optimizers)}_mp_rank_00_optim_states.pt")) is not None:
            optimizers.append(content["optimizer_state_dict"])
        if not optimizers or len(optimizers) != _ranks_that_wrote(optimizers[0]):
            raise CheckpointError(f"{folder} is not whole: it holds what {len(optimizers)} of its ranks wrote")
    return optimizers


def require_whole(folder: Path) -> None:
    """Look at a checkpoint for damage: that all files are there, and none is cut short.

    Raises:
        CheckpointError: see `read_optimizer_states`.
    """
    for path in sorted((folder / TAG).glob("*.pt")):
        require_sound(path, every_byte=False)
    with in_a_sentence(f"{folder / TAG} does not hold what DeepSpeed writes"):
        name = _name_of_weights(read_optimizer_states(folder))
    if not (folder / TAG / name).is_file():
        raise CheckpointError(f"{folder} is not whole: {name} is missing")


def _ranks_that_wrote(optimizer: dict[str, Any]) -> int:
    """Number of ranks; stages 1 and 2 say it for each group of parameters."""
    ranks = optimizer["partition_count"]
    return max(ranks) if isinstance(ranks, list) else ranks


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint, by name, on the CPU.

    Raises:
        CheckpointError: see `read_optimizer_states`.
    """
    optimizers = read_optimizer_states(folder)
    with in_a_sentence(f"{folder / TAG} does not hold what DeepSpeed writes"):
        name = _name_of_weights(optimizers)
        if not (folder / TAG / name).is_file():
            raise CheckpointError(f"{folder} is not whole: {name} is missing")
        model = read_checkpoint_file(folder / TAG / name, _KNOWN)
        return _join_shards(optimizers, model["param_shapes"]) if "zero_pp" in name else dict(model["module"])


def _name_of_weights(optimizers: list[dict[str, Any]]) -> str:
    """The file with the weights, or in stage 3 with their shapes."""
    sharded = optimizers[0]["zero_stage"] == 3
    return "zero_pp_rank_0_mp_rank_00_model_states.pt" if sharded else "mp_rank_00_model_states.pt"


def _join_shards(optimizers: list[dict[str, Any]], shapes_of_groups: list[dict[str, torch.Size]]) -> dict[str, Tensor]:
    """Weights of stage 3: every rank holds, of each and one after the other, a shard of the same size.

    Args:
        optimizers: of all ranks.
        shapes_of_groups: shape of each weight by name, in the order of the shards.
    """
    flat = []  # all shards of each rank
    for optimizer in optimizers:
        groups = [group.flatten() for group in optimizer["fp32_flat_groups"]]
        flat.append(torch.cat(groups))
    weights = {}
    begin = 0
    for shapes in shapes_of_groups:
        for name, shape in shapes.items():
            count = math.prod(shape)
            size = -(-count // len(flat))  # rounded up: the last shards are filled up
            shards = [shards_of_rank[begin : begin + size] for shards_of_rank in flat]
            weights[name] = torch.cat(shards)[:count].view(shape)
            begin += size
    return weights
