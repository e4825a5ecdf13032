"""What is said of checkpoints."""

from types import SimpleNamespace

import pytest

from lenvm_lightning.training.callbacks import ResumableCheckpoint


@pytest.mark.parametrize(("batches", "accumulate", "told"), [(5, 8, True), (1, 1, True), (8, 8, True), (9, 8, False)])
def test_epochs_of_a_single_step_are_told_of(tmp_path, monkeypatch, batches, accumulate, told):
    said = []
    monkeypatch.setattr("lenvm_lightning.training.callbacks.checkpointing.rank_zero_info", said.append)
    trainer = SimpleNamespace(global_step=0, num_training_batches=batches, accumulate_grad_batches=accumulate)
    ResumableCheckpoint(str(tmp_path)).on_train_start(trainer, None)
    assert ["nothing is saved before the end" in text for text in said] == [True] * told
