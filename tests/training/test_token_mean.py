"""The gradient is that of the token mean over the whole optimizer step, however the step is split."""

import lightning as L
import pytest
import torch
from gradients import QUIET, ROWS, TOLERANCE, FixedSplit, gradient, relative
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy
from modules import make_module

from lenvm_lightning import OptimizerConfig, TextLenVM
from lenvm_lightning.errors import RecipeError
from lenvm_lightning.objectives import token_losses


@pytest.fixture(scope="module")
def whole(text_rollouts):
    return gradient(text_rollouts, [list(range(ROWS))])[0]


@pytest.mark.parametrize(
    "batches", [[[i] for i in range(ROWS)], [[0], [1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11]]], ids=["single", "uneven"]
)
def test_accumulation_equals_one_batch(text_rollouts, whole, batches):
    (split,) = gradient(text_rollouts, batches, accumulate=len(batches))
    assert relative(split, whole) < TOLERANCE


def test_short_last_window(text_rollouts):
    """Five batches in windows of three: the second step has two, and is still the mean over its own tokens."""
    batches = [[0, 1], [2], [3, 4, 5], [6], [7, 8, 9]]
    first, last = gradient(text_rollouts, batches, accumulate=3)
    assert relative(first, gradient(text_rollouts, [[0, 1, 2, 3, 4, 5]])[0]) < TOLERANCE
    assert relative(last, gradient(text_rollouts, [[6, 7, 8, 9]])[0]) < TOLERANCE


def test_mean_of_micro_batch_means_is_something_else(text_rollouts, whole):
    """Negative control: what automatic optimization alone would do."""
    batches = [[0], [1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11]]
    naive = torch.stack([gradient(text_rollouts, [batch])[0] for batch in batches]).mean(dim=0)
    assert relative(naive, whole) > 0.01


def test_clipping_sees_the_mean(text_rollouts, whole):
    (clipped,) = gradient(text_rollouts, [[i] for i in range(ROWS)], accumulate=ROWS, clip=float(whole.norm()) / 2)
    assert float(clipped.norm()) == pytest.approx(
        float(whole.norm()) / 2, rel=1e-4
    )  # torch adds 1e-6 to a norm of 0.025


def test_lambda_returns_and_censoring_split_alike(text_rollouts):
    options = {"lam": 0.5, "censored": "one_sided"}
    one = gradient(text_rollouts, [list(range(ROWS))], model_options=options)[0]
    many = gradient(text_rollouts, [[i] for i in range(ROWS)], accumulate=ROWS, model_options=options)[0]
    assert relative(many, one) < TOLERANCE


def test_completions_count_alike_in_batches_of_few_and_of_many(text_rollouts, whole):
    """Steps of one batch each: their mean is the gradient of all completions in one batch, none counts more."""
    alike = {"weight": "completion"}
    batches = [[0], [1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11]]
    one = gradient(text_rollouts, [list(range(ROWS))], model_options=alike)[0]
    steps = gradient(text_rollouts, batches, model_options=alike)
    (accumulated,) = gradient(text_rollouts, batches, model_options=alike, accumulate=len(batches))
    assert relative(torch.stack(steps).mean(dim=0), one) < TOLERANCE
    assert relative(accumulated, one) < TOLERANCE
    assert relative(whole, one) > 0.01  # negative control: what counts every token alike is something else


def test_train_mode_is_set_and_vision_frozen(vision_rollouts):
    from datamodules import VisionRollouts
    from lenvm_lightning import VisionLenVM

    modes = {}

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            vision = next(iter(pl_module.model.vision_modules()))
            modes.update(
                head=pl_module.model.v_head.training,
                language=pl_module.model.backbone.get_decoder().training,
                vision=vision.training,
                vision_grad=any(p.requires_grad for p in vision.parameters()),
            )

    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", callbacks=[Look()], limit_val_batches=0, **QUIET
    )  # fmt: skip
    model = make_module(VisionLenVM, "tiny-vl", pretrained=False, gradient_checkpointing=True)
    trainer.fit(model, VisionRollouts(str(vision_rollouts), batch_tokens=1024, val_share=0.2))
    assert modes == {"head": True, "language": True, "vision": False, "vision_grad": False}


def test_a_strategy_that_would_leave_the_loss_a_sum_is_refused(monkeypatch):
    model = TextLenVM("tiny-text", gamma=0.97)
    model.trainer = L.Trainer(accelerator="cpu", **QUIET)
    monkeypatch.setattr(model.trainer.strategy, "__class__", DeepSpeedStrategy)
    with pytest.raises(RecipeError, match="use strategy: deepspeed_stage_2"):
        model.configure_model()
    assert model.model is None  # before anything was loaded


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


def test_no_step_of_a_half_precision_run_is_lost(text_rollouts):
    """One too small for bfloat16: the head takes it, and the rests of the backbone's matrices."""
    model = make_module(TextLenVM, "tiny-text", gamma=0.97, lr=1e-6, warmup_steps=0)
    before = {}

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            before.update({name: p.detach().clone() for name, p in pl_module.model.named_parameters()})

    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", precision="bf16-true", callbacks=[Look()], limit_val_batches=0, **QUIET
    )
    trainer.fit(model, FixedSplit(text_rollouts, [list(range(ROWS))]))
    states = trainer.optimizers[0].state
    moved, kept = {}, {}
    for name, p in model.model.named_parameters():
        if p.ndim >= 2:
            moved[name] = float((p.detach() != before[name]).float().mean())
            kept[name] = float((states[p]["rest"] != 0).float().mean()) if "rest" in states[p] else None
    head = [share for name, share in moved.items() if name.startswith("v_head")]
    inside = [share for name, share in moved.items() if "layers" in name]
    assert min(head) > 0.5 > 0.1 > max(inside)
    assert {name for name, share in kept.items() if share is None} == {n for n in kept if n.startswith("v_head")}
    assert min(share for name, share in kept.items() if "layers" in name) > 0.9


def test_half_precision_that_learns_little_warns(text_rollouts):
    model = TextLenVM("tiny-text", gamma=0.97, optimizer=OptimizerConfig("adamw_8bit"))
    trainer = L.Trainer(max_steps=1, accelerator="cpu", precision="bf16-true", limit_val_batches=0, **QUIET)
    with pytest.warns(match=r"bf16-true with optimizer\.kind: adamw_8bit .* use optimizer\.kind: adamw"):
        trainer.fit(model, FixedSplit(text_rollouts, [list(range(ROWS))]))
