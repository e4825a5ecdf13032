"""Checkpoints of training, read without a Trainer; those that cannot be are refused in words."""

import pytest
import torch
from adapted import fit, values

from datamodules import VisionRollouts
from lenvm_lightning import TextLenVM, VisionLenVM
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


def test_a_checkpoint_without_its_frozen_vision_tower_is_read(vision_rollouts, tmp_path):
    data = VisionRollouts(str(vision_rollouts), batch_tokens=1024, val_share=0.2)
    module = fit(VisionLenVM("tiny-vl", gamma=0.99), data, steps=1, folder=tmp_path, every=1)
    again = model_of_checkpoint(tmp_path / "step-000000001.ckpt")
    assert torch.equal(values(again), values(module.model.eval()))
