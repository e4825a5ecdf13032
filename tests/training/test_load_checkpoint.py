"""Checkpoints of training that cannot be read, in words."""

import pytest
import torch

from lenvm_lightning import TextLenVM
from lenvm_lightning.errors import CheckpointError
from lenvm_lightning.training.load_checkpoint import model_of_checkpoint


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"hyper_parameters": {"backbone": "tiny-text", "lr": 1e-3}, "lenvm_config": {"gamma": 0.9}},  # flat, as once
        {"hyper_parameters": TextLenVM("tiny-text").settings.as_plain(), "lenvm_config": {"gama": 0.9}},
    ],
)
def test_other_contents_are_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="is no checkpoint of a length value model"):
        model_of_checkpoint(tmp_path / "x.ckpt")
