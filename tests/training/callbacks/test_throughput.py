"""Throughput: tokens, waiting and padding that it counts."""

import time
from types import SimpleNamespace

import pytest
import torch

from lenvm_lightning import LengthValueModel, LenVMConfig
from lenvm_lightning.batch import Layout
from lenvm_lightning.training.callbacks import Throughput
from lenvm_lightning.training.layout_plan import plan_batch


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def run(clock):
    """Batches of 6 tokens of 8, waited for 2 s and trained on for 1 s; what was logged."""
    logged = []
    logger = SimpleNamespace(log_metrics=lambda metrics, step: logged.append((step, metrics)))
    batch = {"attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}

    def run(batches, accumulate, validate_after):
        trainer = SimpleNamespace(
            global_step=0, log_every_n_steps=2, world_size=2, loggers=[logger], accumulate_grad_batches=accumulate
        )
        throughput = Throughput()
        throughput.on_train_start(trainer, None)
        for i in range(batches):
            clock[0] += 2.0
            throughput.on_train_batch_start(trainer, None, batch, i)
            clock[0] += 1.0
            trainer.is_last_batch = i == batches - 1
            trainer.global_step += (i + 1) % accumulate == 0 or trainer.is_last_batch
            throughput.on_train_batch_end(trainer, None, None, batch, i)
            if i == validate_after:
                throughput.on_validation_start(trainer, None)
                clock[0] += 50.0
                throughput.on_validation_end(trainer, None)
        return logged

    return run


EXPECTED = {"train/tokens_per_s": 6 * 2 / 3.0, "train/padding_share": 0.25}


def test_throughput_counts_the_wait_for_batches_but_not_validation(run):
    assert run(4, accumulate=1, validate_after=0) == [(step, EXPECTED) for step in (1, 2, 4)]  # the first at once


def test_throughput_is_logged_once_a_step(run):
    assert run(11, accumulate=3, validate_after=5) == [(step, EXPECTED) for step in (0, 2, 4)]


def test_padding_is_a_share_of_what_was_computed(clock):
    """Rows of 5, 3 and 4 tokens, of which 2 are a prompt that two of them share."""
    logged = []
    trainer = SimpleNamespace(
        global_step=1, log_every_n_steps=1, world_size=1, accumulate_grad_batches=1, is_last_batch=False,
        loggers=[SimpleNamespace(log_metrics=lambda metrics, step: logged.append(metrics))],
    )  # fmt: skip
    module = SimpleNamespace(model=LengthValueModel.from_backbone("tiny-text", LenVMConfig(0.9)))
    mask = torch.arange(5) < torch.tensor([[5], [3], [4]])
    for kind, real, computed in (("packed", 12, 12), ("shared", 10, 10)):
        layout = Layout(kind, [5, 3, 4], [2, 2, 2], [0, 0, 1])
        batch = {"attention_mask": mask.long(), "vision": {}, "layout": layout}
        plan = plan_batch(module.model, batch)
        assert (plan.real, plan.computed) == (real, computed)
        throughput = Throughput()
        throughput.on_train_start(trainer, module)
        clock[0] += 2.0
        throughput.on_train_batch_end(trainer, module, None, batch, 0)
        assert logged[-1] == {"train/tokens_per_s": 12 / 2.0, "train/padding_share": pytest.approx(1 - real / computed)}
