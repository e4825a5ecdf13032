"""Strategies by name: what each shards, and what it cannot train."""

import lightning as L
import pytest
from adapted import WAYS, text_module
from gradients import QUIET
from lightning.pytorch.strategies import DeepSpeedStrategy, StrategyRegistry
from modules import make_module

from lenvm_lightning import LoRA, TextLenVM
from lenvm_lightning.errors import RecipeError
from lenvm_lightning.training.deepspeed import ZeRO
from lenvm_lightning.training.fsdp import FullySharded
from lenvm_lightning.training.strategies import name_of, stage_of, unsupported_settings


def test_lightnings_own_fsdp_is_refused(monkeypatch):
    from lightning.pytorch.strategies import FSDPStrategy

    model = TextLenVM("tiny-text")
    model.trainer = L.Trainer(accelerator="cpu", **QUIET)
    monkeypatch.setattr(model.trainer._accelerator_connector, "strategy", FSDPStrategy())
    with pytest.raises(
        RecipeError, match=r"strategy: fsdp in a recipe, or lenvm_lightning\.training\.fsdp\.FullySharded"
    ):
        model.configure_model()


@pytest.mark.parametrize(
    ("name", "stage"),
    [("deepspeed", 2), ("deepspeed_stage_1", 1), ("deepspeed_stage_3_offload", 3), ("fsdp", 3), ("ddp", 0)],
)
def test_stages(name, stage):
    assert stage_of(name) == stage
    assert unsupported_settings(TextLenVM("tiny-text").settings, name, "32-true", reads_images=stage < 3) == []


@pytest.mark.parametrize(
    ("name", "changed", "precision", "vision", "words"),
    [
        ("deepspeed_stage_2", {}, "16-mixed", False, "precision: 16-mixed"),
        ("deepspeed_stage_2", {}, "bf16-true", False, "precision: bf16-true"),
        ("deepspeed_stage_2", {"dtype": "bfloat16"}, "32", False, "dtype: bfloat16"),
        ("deepspeed_stage_2", {"freeze_vision": False}, "32", True, "freeze_vision: false"),
        ("deepspeed_stage_3", {}, "bf16", True, "never call the vision tower"),
        ("deepspeed_stage_3", {"quantise": "nf4", "lora": LoRA(4)}, "32", False, "quantised weights"),
        ("deepspeed_stage_3_offload_nvme", {}, "32", False, "nobody has tried it"),
        ("fsdp", {"quantise": "nf4", "lora": LoRA(4)}, "32", False, "quantised weights"),
        ("deepspeedstrategy", {}, "32", False, "use strategy: deepspeed_stage_2"),
        ("fsdpstrategy", {}, "32", False, "use strategy: fsdp"),
    ],
)
def test_what_a_strategy_cannot_train(name, changed, precision, vision, words):
    (sentence,) = unsupported_settings(make_module(TextLenVM, "tiny-text", **changed).settings, name, precision, vision)
    assert words in sentence


@pytest.mark.parametrize("name", [name for name in StrategyRegistry if name.startswith("deepspeed_")])
def test_names_are_told_by_what_is_made_of_them(name):
    pytest.importorskip("deepspeed")
    assert name_of(ZeRO.named(name)) == name


def test_a_strategy_that_would_leave_the_loss_a_sum_is_refused(monkeypatch):
    model = TextLenVM("tiny-text", gamma=0.97)
    model.trainer = L.Trainer(accelerator="cpu", **QUIET)
    monkeypatch.setattr(model.trainer.strategy, "__class__", DeepSpeedStrategy)
    with pytest.raises(RecipeError, match="use strategy: deepspeed_stage_2"):
        model.configure_model()
    assert model.model is None  # before anything was loaded


def test_four_bits_are_not_shared_out_over_ranks():
    module = text_module(**WAYS["qlora"])
    module.trainer = L.Trainer(accelerator="cpu", strategy=FullySharded(), logger=False)
    with pytest.raises(RecipeError, match="cannot be sharded over ranks: train them with strategy: ddp"):
        module.configure_model()
