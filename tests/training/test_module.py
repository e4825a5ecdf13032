"""The LightningModule: its settings, the loss of batches whose numbers are seen at a glance, and its precisions."""

import math
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from gradients import QUIET, ROWS, FixedSplit
from lightning.pytorch.callbacks import Callback
from modules import make_module
from rollout_rows import row_facts

from datamodules.report import BatchFacts, collect_facts, describe_facts
from lenvm_lightning import BackboneConfig, LossConfig, TextLenVM, VisionLenVM
from lenvm_lightning.objectives import token_losses

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


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true", "32-true"])
def test_precision_flags_train(text_rollouts, precision, monkeypatch):
    """The loss falls, and logits, returns, losses and sums have all digits of float32 whatever is computed in."""
    overrides = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}
    model = make_module(TextLenVM, "tiny-text", pretrained=False, overrides=overrides, lam=0.9, lr=3e-3, warmup_steps=0)
    losses, digits = [], set()

    def watched(logits, target, remaining, kind, rule):
        found = token_losses(logits, target, remaining, kind, rule)
        digits.update(x.dtype for x in (logits, target, rule.of(remaining), rule.predict(logits), found))
        return found

    monkeypatch.setattr("lenvm_lightning.training.module.token_losses", watched)

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))
            digits.add(outputs["loss"].dtype)

    trainer = L.Trainer(
        max_steps=8, max_epochs=-1, accelerator="cpu", precision=precision, callbacks=[Look()],
        limit_val_batches=0, **QUIET,
    )  # fmt: skip
    data = FixedSplit(text_rollouts, [list(range(ROWS))])
    trainer.fit(model, data)
    assert losses[-1] < 0.9 * losses[0]
    assert digits == {torch.float32}
    half = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in model.model.backbone.parameters()} == {half}
    assert {p.dtype for p in model.model.v_head.parameters()} == {torch.float32}
    assert model.val_errors.count.dtype == model.val_boundary.sums.dtype == torch.float64
    assert model.train_loss.weight.dtype == model.val_loss.mean_value.dtype == torch.float32
