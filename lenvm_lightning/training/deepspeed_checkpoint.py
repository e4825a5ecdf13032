"""Reading DeepSpeed's checkpoints, with no object in them made but those that are known, and without DeepSpeed."""

import math
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

TAG = "checkpoint"  # the folder within a checkpoint that Lightning has DeepSpeed write into


class _Known:
    """In the place of the objects that DeepSpeed stores beside its tensors; they hold numbers."""


_KNOWN: list[Any] = [
    (_Known, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Known, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


def is_zero_checkpoint(folder: Path) -> bool:
    """Whether ranks of DeepSpeed wrote their shares into this folder."""
    return (folder / TAG).is_dir()


def look_through(folder: Path) -> list[dict[str, Any]]:
    """What the optimizers of all ranks wrote, in their order, after every file has been read without running anything.

    DeepSpeed itself unpickles whatever its files hold, code included; what has been through here holds none.

    Args:
        folder: a checkpoint.

    Raises:
        CheckpointError: a file is missing, damaged, or holds other objects than DeepSpeed's files do.
    """
    found = {}
    for path in sorted((folder / TAG).glob("*.pt")):
        try:
            with torch.serialization.safe_globals(_KNOWN):
                found[path.name] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (OSError, RuntimeError, IndexError, EOFError, pickle.UnpicklingError) as error:
            strange = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = f"it holds {strange[1]}, which is none of DeepSpeed's" if strange else "it is damaged"
            raise CheckpointError(f"{path} cannot be read safely: {reason}") from error
    optimizers: list[dict[str, Any]] = []
    while (state := found.get(f"zero_pp_rank_{len(optimizers)}_mp_rank_00_optim_states.pt")) is not None:
        optimizers.append(state["optimizer_state_dict"])
    ranks = optimizers[0]["partition_count"] if optimizers else 0
    if len(optimizers) != (max(ranks) if isinstance(ranks, list) else ranks) or not optimizers:
        raise CheckpointError(f"{folder} is not whole: it holds what {len(optimizers)} of its ranks wrote")
    return optimizers


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint, by name, on the CPU.

    Raises:
        CheckpointError: see `look_through`.
    """
    shares = look_through(folder)
    third = shares[0]["zero_stage"] == 3
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if third else "mp_rank_00_model_states.pt"
    try:
        model = torch.load(folder / TAG / name, map_location="cpu", mmap=True, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{folder} is not whole: {name} is missing") from error
    if not third:
        return dict(model["module"])
    # Every rank holds, of every weight and one after the other, a share of the same size; the last are filled up.
    flat = [torch.cat([group.flatten() for group in share["fp32_flat_groups"]]) for share in shares]
    weights, begin = {}, 0
    for key, shape in ((key, shape) for group in model["param_shapes"] for key, shape in group.items()):
        count, size = math.prod(shape), -(-math.prod(shape) // len(flat))
        weights[key] = torch.cat([share[begin : begin + size] for share in flat])[:count].view(shape)
        begin += size
    return weights
