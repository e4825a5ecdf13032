"""All settings of a module: checked together, and kept as plain values."""

import pytest
from modules import make_module

from lenvm_lightning import BackboneConfig, LenVMModule, LoRA, LossConfig, OptimizerConfig, TextLenVM, VisionLenVM
from lenvm_lightning.errors import RecipeError
from lenvm_lightning.training.settings import LenVMSettings


def test_all_settings_that_cannot_be_are_named_at_once():
    with pytest.raises(RecipeError) as told:
        LenVMModule(
            BackboneConfig("x", overrides={"a": 1}, keep_layers=0, dtype="half", quantise="int3"),
            gamma=1.0,
            loss=LossConfig(target="length", kind="bce", weight="row", lam=0.5, censored="skip"),
            optimizer=OptimizerConfig(kind="sgd", lr=0.0, weight_decay=-1.0, betas=(0.9, 1.0), warmup_steps=-1),
            head_dropout=1.0,
        )
    text = str(told.value)
    for name in (
        "gamma", "head_dropout", "backbone.overrides", "backbone.keep_layers", "backbone.dtype", "backbone.quantise",
        "loss.lam", "loss.kind", "loss.weight", "loss.censored", "optimizer.kind", "optimizer.lr",
        "optimizer.weight_decay", "optimizer.betas", "optimizer.warmup_steps",
    ):  # fmt: skip
        assert f"\n  {name}" in text, text


def test_settings_go_through_plain_values():
    """Those of a checkpoint, which is read without running anything."""
    module = TextLenVM(
        BackboneConfig("tiny-text", quantise="nf4"), lora=LoRA(4, targets=["q_proj"]),
        loss=LossConfig(lam=0.9), optimizer=OptimizerConfig(betas=(0.5, 0.6)),
    )  # fmt: skip
    plain = dict(module.hparams)
    assert plain["optimizer"] == {
        "kind": "adamw", "lr": 2e-5, "weight_decay": 0.0, "betas": (0.5, 0.6), "warmup_steps": 50
    }  # fmt: skip
    assert LenVMSettings.from_plain(plain) == module.settings


def test_defaults_have_no_problems():
    settings = TextLenVM("tiny-text").settings
    assert settings.problems() == []
    assert settings == LenVMSettings(BackboneConfig("tiny-text"), "auto", LossConfig(), OptimizerConfig(), None, 0.0)


def test_settings_that_contradict_each_other_are_all_named():
    with pytest.raises(RecipeError) as error:
        make_module(
            VisionLenVM, "tiny-vl", pretrained=False, freeze_vision=False, quantise="nf4", dtype="float64",
            lora=LoRA(rank=0, dropout=1.0, targets="some"),
        )  # fmt: skip
    for problem in ("lora.rank must be", "lora.dropout must", "lora.targets must", "pretrained: true",
                    "freeze_vision: true", "dtype is float64"):  # fmt: skip
        assert problem in str(error.value)
    with pytest.raises(RecipeError, match=r"backbone.quantise: .* needs adapters: set lora.rank"):
        make_module(TextLenVM, "tiny-text", quantise="nf4")
