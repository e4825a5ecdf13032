"""Checkpoints of training, read without a Trainer; those that cannot be are refused in words."""

import pytest
import torch
from adapted import fit, values

from datamodules import VisionRollouts
from lenvm_lightning import BackboneConfig, TextLenVM, VisionLenVM
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A whole checkpoint, as it lies on the disk."""
    module = TextLenVM(BackboneConfig("tiny-text", pretrained=False, overrides={"num_hidden_layers": 1}), gamma=0.99)
    module.configure_model()
    state = {"state_dict": module.state_dict(), "hyper_parameters": module.settings.as_plain()}
    module.on_save_checkpoint(state)
    return state


def changed(content, path, value):
    """A copy with another value somewhere."""
    content = dict(content)
    key, *rest = path
    content[key] = changed(content[key], rest, value) if rest else value
    return content


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["hyper_parameters"], 3), (["hyper_parameters", "backbone"], None), (["hyper_parameters", "lora"], {"a": 1}),
        (["hyper_parameters", "gamma"], "x"), (["hyper_parameters", "gamma"], 2.0),
        (["hyper_parameters", "optimizer", "betas"], 3), (["hyper_parameters", "optimizer", "lr"], float("nan")),
        (["hyper_parameters", "backbone", "source"], ["x"]), (["hyper_parameters", "backbone", "dtype"], "load"),
        (["hyper_parameters", "backbone", "overrides"], 3), (["hyper_parameters", "backbone", "overrides"], {"a": 1}),
        (["hyper_parameters", "backbone", "keep_layers"], "two"), (["hyper_parameters", "backbone", "quantise"], 4),
        (["hyper_parameters", "backbone", "attn_implementation"], 3),
        (["lenvm_config"], None), (["lenvm_config", "gamma"], 0), (["lenvm_config", "dropout"], "x"),
        (["lenvm_config", "base"], [1]), (["state_dict"], {}), (["state_dict"], [1]), (["state_dict"], {"a": 1}),
        (["state_dict", "model.v_head.fc.weight"], torch.zeros(3)), (["state_dict", "model.v_head.fc.weight"], "x"),
    ],
)  # fmt: skip
def test_contents_of_a_wrong_form_are_named(tmp_path, saved, path, value):
    file = tmp_path / "step-000000001.ckpt"
    torch.save(changed(saved, path, value), file)
    with pytest.raises(CheckpointError) as told:
        model_of_checkpoint(file)
    assert str(file) in str(told.value)


def test_damaged_files_are_no_checkpoint(tmp_path, saved):
    file = tmp_path / "x.ckpt"
    torch.save(saved, file)
    assert model_of_checkpoint(file).gamma == 0.99
    for content in (b"", b"x", file.read_bytes()[:1000], file.read_bytes()[:-1]):
        file.write_bytes(content)
        with pytest.raises(
            CheckpointError, match=r"x\.ckpt is no checkpoint of a length value model: .*x\.ckpt cannot"
        ):
            model_of_checkpoint(file)
