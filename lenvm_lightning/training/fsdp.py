"""Weights sharded over ranks with torch's `fully_shard` (FSDP2), and gathered again.

`fit.trainer.strategy: fsdp` trains that way. Gradients are averaged over ranks as under DDP, so what is computed is
the same; each rank keeps its shard of weights, gradients and moments.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.load import _METADATA_FILENAME as METADATA_FILE
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import CheckpointError, RecipeError
from ..models.hub_files import some
from ..models.value_model import LengthValueModel
from ..utils.reading import in_a_sentence
from .checkpoint_file import read_checkpoint_file
from .deepspeed_checkpoint import is_zero_checkpoint, read_weights
from .fsdp_checkpoint import INDEX, load_shards, read_index

_WEIGHTS = "state_dict"  # what Lightning calls them in its checkpoints


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with everything sharded over all ranks of all machines.

    Args:
        save_distributed_checkpoint: every rank writes its shard, into a folder; False gathers all in one file.
        options: more for ModelParallelStrategy (process_group_backend, timeout).
    """

    def __init__(self, save_distributed_checkpoint: bool = True, **options: Any) -> None:
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint, **options)

    def setup_environment(self) -> None:
        """Open the process group; by itself the strategy would take the ranks of a machine for tensor parallelism."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Restore weights and moments; without `strict_loading`, only those weights that were kept.

        Raises:
            CheckpointError: it cannot be read safely, or holds other weights.
        """
        path = Path(self.broadcast(checkpoint_path))
        assert self.lightning_module is not None
        assert self.model is not None
        if path.is_file():
            with in_a_sentence(f"{path} cannot be read"):
                return super().load_checkpoint(path, weights_only=weights_only)
        there, own = _stored_weights(path), get_model_state_dict(self.model)
        if self.lightning_module.strict_loading and (other := own.keys() ^ there.keys()):
            raise CheckpointError(f"{path} does not hold the weights of the model: {some(sorted(other))}")
        weights = {key: shard for key, shard in own.items() if key in there}
        load_shards({_WEIGHTS: weights}, path)
        self.model.load_state_dict(weights, strict=False)
        for number, optimizer in enumerate(self.optimizers):
            moments = {f"optimizer_{number}": get_optimizer_state_dict(self.model, optimizer)}
            load_shards(moments, path)
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=moments[f"optimizer_{number}"])
        return read_checkpoint_file(path / METADATA_FILE)


@contextlib.contextmanager
def rank0_init(mesh: DeviceMesh | None) -> Iterator[None]:
    """Within it, models are built with weights in the first process only; in others they take no memory.

    Args:
        mesh: ranks to shard over; None changes nothing.
    """
    with torch.device("meta") if mesh is not None and dist.get_rank() > 0 else contextlib.nullcontext():
        yield


def shard(model: LengthValueModel, mesh: DeviceMesh, precision: str) -> None:
    """Shard the weights of the first process over all, in place.

    Every decoder layer is gathered when its turn comes, and the head in float32 whatever the precision. All else,
    embedding and vision tower, is gathered once a step: a rank whose batch has no image never calls the tower, and
    where a part is gathered all ranks wait for each other.

    Args:
        model: built in all processes within `rank0_init`.
        mesh: of the strategy, with the dimensions `data_parallel` and `tensor_parallel`.
        precision: the Trainer's. With `bf16-mixed` layers are gathered in bfloat16; gradients are added in float32.

    Raises:
        RecipeError: a mesh for tensor parallelism, or weights that cannot be sharded.
    """
    if (size := mesh["tensor_parallel"].size()) > 1:
        raise RecipeError(
            f"tensor_parallel_size is {size}, but only data are spread over ranks: set it to 1 and data_parallel_size "
            "to the number of all devices, or use strategy: fsdp, which does so"
        )
    if any(not p.is_floating_point() for p in model.parameters()):
        raise RecipeError("quantised weights cannot be sharded over ranks: train them with strategy: ddp")
    # 1. The weights while they are in one piece; only the first process has them.
    weights = model.state_dict() if dist.get_rank() == 0 else {}
    # 2. What layers are gathered in, and what gradients are added in; None = as the weights are.
    gathered = torch.bfloat16 if precision == "bf16-mixed" else None
    added = torch.float32 if precision in ("bf16-mixed", "bf16-true", "16-true") else None
    # 3. What is gathered by itself: the heads, then every layer, then all else at once.
    ranks = mesh["data_parallel"]
    layers = [m for m in model.backbone.get_decoder().modules() if isinstance(m, GradientCheckpointingLayer)]
    for head in model.heads():
        fully_shard(head, mesh=ranks)
    for part in (*layers, model):
        fully_shard(part, mesh=ranks, mp_policy=MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=added))
    if mesh.device_type == "cpu":
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.set_force_sum_reduction_for_comms(True)  # gloo cannot average; it is divided afterwards
    # 4. Every rank gets its shard of the weights.
    _shard_from_rank0(model, weights, mesh.device_type)


def _shard_from_rank0(model: nn.Module, weights: dict[str, Any], device: str) -> None:
    """Give every rank its shard of the first one's weights, and the buffers that no state dict holds."""
    if dist.get_rank() > 0:
        model.to_empty(device=torch.device(device, torch.cuda.current_device()) if device == "cuda" else device)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for module in model.modules():
        for name in sorted(module._non_persistent_buffers_set):
            found = [module._buffers[name]]
            there = found[0].device if found[0] is not None else None
            dist.broadcast_object_list(found, src=0)
            module._buffers[name] = found[0].to(there) if found[0] is not None else None


def is_sharded(module: nn.Module) -> bool:
    """Whether weights are sharded over ranks, by FSDP or by DeepSpeed."""
    return any(isinstance(part, FSDPModule) for part in module.modules()) or _is_zero3(module)


def _is_zero3(module: nn.Module) -> bool:
    """Whether DeepSpeed has sharded the weights."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def keep_in_step(module: nn.Module) -> None:
    """Mark a model whose gradients ranks add up in the order they come: all must make the same passes."""
    for part in module.modules():
        if isinstance(part, LengthValueModel):
            part.in_step = True


def is_in_step(model: LengthValueModel) -> bool:
    """Whether all ranks must make the same passes through a model."""
    return model.in_step or is_sharded(model)


@contextlib.contextmanager
def gather_full_weights(module: nn.Module) -> Iterator[None]:
    """Within it, the first process holds all weights, to be saved; the others hold their shard as before.

    All ranks must enter; what happens inside may be the first one's business alone. Nothing can be computed.
    """
    if not is_sharded(module):
        yield
        return
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole: Mapping[str, Any] = (  # empty in all ranks but the first
        _gather(module) if _is_zero3(module) else get_model_state_dict(module, options=options)
    )
    shards: list[tuple[nn.Module, str, Any]] = []
    for prefix, part in module.named_modules():
        for name, parameter in part._parameters.items():
            full = whole.get(f"{prefix}.{name}" if prefix else name)
            if parameter is not None and full is not None:
                shards.append((part, name, parameter))
                part._parameters[name] = nn.Parameter(full, requires_grad=parameter.requires_grad)
    try:
        yield
    finally:
        for part, name, parameter in shards:
            part._parameters[name] = parameter


def _gather(module: nn.Module) -> dict[str, Tensor]:
    """Weights that DeepSpeed has sharded, on the CPU of the first process; one part after the other is gathered."""
    import deepspeed

    whole = {}
    for prefix, part in module.named_modules():
        own = dict(part.named_parameters(prefix, recurse=False))
        with deepspeed.zero.GatheredParameters(list(own.values())):
            if dist.get_rank() == 0:
                whole.update({name: parameter.detach().to("cpu", copy=True) for name, parameter in own.items()})
    return whole


def full_weights(checkpoint: str | Path) -> dict[str, Tensor]:
    """The weights in a checkpoint of training, as an ordinary state dict of the LightningModule.

    Needs no other process, whatever the number of ranks that wrote it.

    Args:
        checkpoint: folder that ranks wrote their shards into, or a file that holds everything.

    Returns:
        Tensors by the names they have in `LenVMModule`, on the CPU.

    Raises:
        CheckpointError: there is no such checkpoint, or it holds no weights.
    """
    path = Path(checkpoint)
    if path.is_file():
        weights = read_checkpoint_file(path).get(_WEIGHTS)
    elif (path / INDEX).is_file():
        weights = _read_shards(path)
    elif is_zero_checkpoint(path):
        weights = read_weights(path)
    else:
        raise CheckpointError(
            f"{path} is no checkpoint of training: neither a file nor a folder with the shards of ranks (looked for "
            f"{path / INDEX}). Give one from the folder checkpoints of a run."
        )
    if not weights or not isinstance(weights, dict) or not all(isinstance(one, Tensor) for one in weights.values()):
        raise CheckpointError(f"{path} holds no weights: the run was stopped while it wrote them, or changed them.")
    return dict(weights)


def _stored_weights(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Shapes and types of the weights whose shards are in a folder."""
    prefix = f"{_WEIGHTS}."
    return {
        name.removeprefix(prefix): stored
        for name, stored in read_index(folder).state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(stored, TensorStorageMetadata)
    }


def _read_shards(folder: Path) -> dict[str, Tensor]:
    stored = _stored_weights(folder)
    empty = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in stored.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is what no_dist asks for
        load_shards({_WEIGHTS: empty}, folder, no_dist=True)
    return empty
