"""Weights shared out over ranks, as far as no rank is needed: what is refused, and checkpoints that are none."""

from types import SimpleNamespace

import pytest
import torch

from lenvm_lightning import LengthValueModel
from lenvm_lightning.errors import CheckpointError, RecipeError
from lenvm_lightning.models.lenvm_config import LenVMConfig
from lenvm_lightning.training.fsdp import full_weights, shard


@pytest.mark.parametrize("there", ["nothing", "a folder"])
def test_no_checkpoint_there(tmp_path, there):
    with pytest.raises(CheckpointError, match="is no checkpoint of training"):
        full_weights(tmp_path if there == "a folder" else tmp_path / "step-000000001.ckpt")


def test_a_checkpoint_without_weights(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "empty.ckpt")
    with pytest.raises(CheckpointError, match="holds no weights"):
        full_weights(tmp_path / "empty.ckpt")


def mesh(tensor_parallel: int) -> dict:
    """As far as refusals ask."""
    return {"tensor_parallel": SimpleNamespace(size=lambda: tensor_parallel)}


def test_tensor_parallelism_is_refused():
    with pytest.raises(RecipeError, match=r"tensor_parallel_size is 2.*strategy: fsdp"):
        shard(None, mesh(2), "32-true")


def test_quantised_weights_are_refused():
    model = LengthValueModel.from_backbone("tiny-text", LenVMConfig(0.97), pretrained=False)
    model.backbone.norm.weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(RecipeError, match="quantised weights cannot be sharded"):
        shard(model, mesh(1), "32-true")
