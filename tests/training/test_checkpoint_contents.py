"""What checkpoints of training hold, and those that do not fit."""

import copy
import shutil

import pytest
import torch
from adapted import WAYS, fit, text_data, text_module, values
from modules import make_module
from safetensors.torch import load_file, save_file

from datamodules import VisionRollouts
from lenvm_lightning import LoRA, TextLenVM, VisionLenVM, tinyworld
from lenvm_lightning.errors import CheckpointError
from lenvm_lightning.training.load_checkpoint import model_of_checkpoint


@pytest.mark.parametrize("way", list(WAYS))
def test_a_checkpoint_holds_what_is_trained_and_nothing_else(text_rollouts, tmp_path, way):
    module = fit(text_module(**WAYS[way]), text_data(text_rollouts), steps=2, folder=tmp_path)
    saved = torch.load(tmp_path / "step-000000002.ckpt", weights_only=True)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert set(saved["state_dict"]) == trained
    assert len(trained) == {"full": 54, "lora": 60, "qlora": 60}[way]
    again = model_of_checkpoint(tmp_path / "step-000000002.ckpt")
    assert torch.equal(values(again), values(module.model.eval()))


def test_frozen_vision_is_not_in_the_checkpoint_and_random_weights_are(vision_rollouts, tmp_path):
    data = VisionRollouts(str(vision_rollouts), batch_tokens=1024, val_share=0.2)
    for pretrained, expected in ((True, False), (False, True)):
        folder = tmp_path / str(pretrained)
        module = make_module(VisionLenVM, "tiny-vl", gamma=0.99, pretrained=pretrained)
        fit(module, data, steps=1, folder=folder, every=1)
        keys = torch.load(folder / "step-000000001.ckpt", weights_only=True)["state_dict"]
        assert any(".visual." in key for key in keys) == expected


def test_checkpoints_that_do_not_fit_are_refused(text_rollouts, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tinyworld.path("tiny-text"), base)
    lora = {"lora": LoRA(4), "gamma": 0.99}
    module = fit(TextLenVM(str(base), **lora), text_data(text_rollouts), 2, tmp_path / "a")
    path = tmp_path / "a" / "step-000000002.ckpt"
    saved = torch.load(path, weights_only=True)
    for change, problem in (
        (lambda weights: weights.pop("model.v_head.fc.bias"), "model.v_head.fc.bias is missing"),
        (lambda weights: weights.pop(next(key for key in weights if "lora_B" in key)), "lora_B.default.weight is miss"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "extra has no place"),
    ):
        broken = copy.deepcopy(saved)
        change(broken["state_dict"])
        with pytest.raises(CheckpointError, match=problem):
            module.on_load_checkpoint(broken)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 0.01
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not trained have changed since this run began"):
        fit(TextLenVM(str(base), **lora), text_data(text_rollouts), 4, resume=path)
