"""The progress of training: the words of all progress, on the first rank alone."""

from types import SimpleNamespace

import pytest
import torch

from lenvm_lightning.training.callbacks import StepProgressBar, Throughput


def run(bar, steps, total, first=0):
    throughput = Throughput()
    throughput.tokens_per_s = 1234.5
    trainer = SimpleNamespace(
        global_step=first, estimated_stepping_batches=total, callbacks=[throughput, bar], callback_metrics={}
    )
    bar.on_train_start(trainer, None)
    for _ in range(steps):
        trainer.global_step += 1
        trainer.callback_metrics["train/loss"] = torch.tensor(0.25)
        bar.on_train_batch_end(trainer, None, None, None, 0)
    bar.on_train_end(trainer, None)


def test_lines_in_a_log_file(capsys):
    run(StepProgressBar(seconds=0.0), 3, 13, first=10)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"train: {step}/13 steps, 1,234 tokens/s, 0:00 elapsed, 0:00 left, loss 0.2500" for step in (11, 12, 13)
    ]


def test_the_last_step_is_said_however_little_time_has_passed(capsys):
    run(StepProgressBar(), 4, 4)
    assert [line.partition(" steps")[0] for line in capsys.readouterr().err.splitlines()] == ["train: 4/4"]


@pytest.mark.parametrize("enabled", [True, False])
def test_a_run_without_an_end_and_ranks_that_say_nothing(capsys, enabled):
    bar = StepProgressBar(seconds=0.0)
    if not enabled:
        bar.disable()
    run(bar, 2, float("inf"))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"train: {n} steps, 1,234 tokens/s, 0:00 elapsed, loss 0.2500" for n in (1, 2)] * enabled
