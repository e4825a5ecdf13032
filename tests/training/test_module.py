"""The LightningModule by itself: its settings, and the loss of batches whose numbers are seen at a glance."""

import math
from types import SimpleNamespace

import pytest
import torch
from rollout_rows import row_facts

from datamodules.report import BatchFacts, collect_facts, describe_facts
from lenvm_lightning import BackboneConfig, LossConfig, TextLenVM, VisionLenVM

SMALL = BackboneConfig("tiny-text", pretrained=False, overrides={"num_hidden_layers": 1})


def test_a_name_is_a_backbone():
    assert TextLenVM("tiny-text").settings == TextLenVM(BackboneConfig("tiny-text")).settings
    assert VisionLenVM("tiny-vl").backbone_source == "tiny-vl"


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
    facts = collect_facts(row_facts([3, 6, 8, 10, 10], censored=lambda length: length == 10))
    module = TextLenVM(SMALL)
    data = SimpleNamespace(facts=facts, val_prompts=1)
    module._trainer = SimpleNamespace(datamodule=data, strategy="auto", precision="32-true")
    module.configure_model()
    assert module.tail_after_cut == facts.tail_after_cut == 7.0
    described = describe_facts(facts, BatchFacts(count=1), held_out=1, held_out_prompts=1)
    assert "truncated at their limit 40.0%, 7 more tokens expected there" in described


def test_lambda_returns_are_the_target_below_one():
    """By hand, gamma 1/2 and a value of -3/4 everywhere: at lambda 0 a target is -1/2 + 1/2 · V of the next state."""
    remaining, mask = torch.tensor([[2, 1, 0]]), torch.ones(1, 3, dtype=torch.bool)
    logits = torch.full((1, 3), math.log(3.0))
    for lam, expected in ((0.0, [-0.875, -0.5, 0.0]), (1.0, [-0.75, -0.5, 0.0])):
        module = TextLenVM(SMALL, gamma=0.5, loss=LossConfig(lam=lam))
        module.configure_model()
        assert module.target(logits, remaining, mask)[0].tolist() == pytest.approx(expected, abs=1e-6)
