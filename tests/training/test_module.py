"""The LightningModule by itself: its settings, and the loss of batches whose numbers are seen at a glance."""

from types import SimpleNamespace

import pytest
import torch

from datamodules.report import collect_facts, describe_facts
from lenvm_lightning import BackboneConfig, LenVMModule, LoRA, LossConfig, OptimizerConfig, TextLenVM, VisionLenVM
from lenvm_lightning.errors import RecipeError
from lenvm_lightning.training.settings import LenVMSettings

SMALL = BackboneConfig("tiny-text", pretrained=False, overrides={"num_hidden_layers": 1})


def test_a_name_is_a_backbone():
    assert TextLenVM("tiny-text").settings == TextLenVM(BackboneConfig("tiny-text")).settings
    assert VisionLenVM("tiny-vl").backbone_source == "tiny-vl"


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


def test_module_anchors_by_default():
    """Where the data have said how completions end, and by the pure bootstrap where they have not."""
    module = TextLenVM(SMALL, gamma=0.5)
    module.configure_model()
    logits = torch.zeros(1, 3)  # value -1/2, one token, at every state
    batch = {
        "remaining": torch.tensor([[2, 1, 0]]),
        "mask": torch.ones(1, 3, dtype=torch.bool),
        "censored": torch.tensor([True]),
    }
    assert module.tail_after_cut is None  # no DataModule has said anything
    pure, states = module.loss_sum(logits, batch)
    assert float(states) == 2
    # 3 and 2 tokens are expected: targets -7/8 and -3/4.
    assert float(pure) == pytest.approx((0.375**2 + 0.25**2) / 2)
    module.tail_after_cut = 2.0
    anchored, _ = module.loss_sum(logits, batch)
    # Beyond the cut 2^-b = 5/12, so targets are -(1 - 5/48) and -(1 - 5/24).
    assert float(anchored) == pytest.approx(((43 / 48 - 0.5) ** 2 + (19 / 24 - 0.5) ** 2) / 2)


def test_the_data_tell_the_module_the_tail():
    facts = collect_facts([3, 6, 8, 10, 10], [False, False, False, True, True], list("aabbc"), [""] * 5, [""] * 5)
    module = TextLenVM(SMALL)
    data = SimpleNamespace(facts=facts, val_prompts=1)
    module._trainer = SimpleNamespace(datamodule=data, strategy="auto", precision="32-true")
    module.configure_model()
    assert module.tail_after_cut == facts.tail_after_cut == 7.0
    assert "cut at their limit 40.0%, 7 more tokens expected there" in describe_facts(facts, 1, 1, 0.0, 1)
