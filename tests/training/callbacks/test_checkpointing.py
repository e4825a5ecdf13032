"""What is said of checkpoints, where they are written, which are kept."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adapted import fit, text_data, text_module
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lenvm_lightning.training.callbacks import ResumableCheckpoint, latest_checkpoint
from lenvm_lightning.training.checkpoint_file import OwnFolderIO


@pytest.mark.parametrize(("batches", "accumulate", "told"), [(5, 8, True), (1, 1, True), (8, 8, True), (9, 8, False)])
def test_epochs_of_a_single_step_are_told_of(tmp_path, monkeypatch, batches, accumulate, told):
    said = []
    monkeypatch.setattr("lenvm_lightning.training.callbacks.checkpointing.rank_zero_info", said.append)
    trainer = SimpleNamespace(global_step=0, num_training_batches=batches, accumulate_grad_batches=accumulate)
    ResumableCheckpoint(str(tmp_path)).on_train_start(trainer, None)
    assert ["nothing is saved before the end" in text for text in said] == [True] * told


# -- where checkpoints are written, and when they get their name ------------------------------------------------------


@pytest.fixture
def seen(monkeypatch):
    """What is forced to the disk and renamed, in order; of files, their names."""
    found = []
    fsync, replace = os.fsync, Path.replace

    def synced(file):
        found.append(("sync", Path(os.readlink(f"/proc/self/fd/{file}")).name))
        fsync(file)

    def replaced(path, target):
        found.append(("name", Path(target).name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    return found


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(text_rollouts, tmp_path, monkeypatch, seen):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))  # nothing passes through $TMPDIR
    folder = tmp_path / "checkpoints"
    fit(text_module(), text_data(text_rollouts), steps=1, folder=folder, every=1)
    last = seen[seen.index(("name", "step-000000001.ckpt")) - 1 :]
    assert last[0] == ("sync", ".writing-step-000000001.ckpt")
    assert last[2] == ("sync", "checkpoints")
    assert [path.name for path in folder.iterdir()] == ["step-000000001.ckpt"]
    assert latest_checkpoint(folder) == folder / "step-000000001.ckpt"


def saved(callback, trainer, step):
    trainer.global_step = step
    callback.save(trainer)
    return sorted(path.name for path in callback.dirpath.iterdir())


@pytest.fixture
def trainer():
    def save_checkpoint(path):
        path.parent.mkdir(exist_ok=True)
        torch.save({"step": trainer.global_step}, path)

    strategy = SimpleNamespace(barrier=lambda name: None, checkpoint_io=TorchCheckpointIO())
    trainer = SimpleNamespace(
        global_step=0, is_global_zero=True, local_rank=0, strategy=strategy, save_checkpoint=save_checkpoint
    )
    return trainer


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_one_of_a_later_step_is_none_of_those_that_are_kept(tmp_path, trainer, keep):
    """The run went on from an older one; killed once more, it must find what it saved since."""
    for step in (100, 200):
        torch.save({}, tmp_path / f"step-{step:09d}.ckpt")
    callback = ResumableCheckpoint(str(tmp_path), keep=keep)
    found = saved(callback, trainer, 150)
    assert found == ["step-000000100.ckpt", "step-000000150.ckpt", "step-000000200.ckpt"][2 - keep :]
    assert saved(callback, trainer, 200)[-1] == "step-000000200.ckpt"
    assert torch.load(tmp_path / "step-000000200.ckpt") == {"step": 200}


def test_only_leftovers_of_our_own_are_swept(tmp_path, trainer):
    for name in (".writing-step-000000007.ckpt", ".writing-thesis", "step-000000001.ckpt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".writing-step-000000008.ckpt").mkdir()
    ResumableCheckpoint(str(tmp_path)).setup(trainer, None, "fit")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".writing-thesis", "step-000000001.ckpt"]
    assert type(trainer.strategy.checkpoint_io) is OwnFolderIO


def test_another_way_of_writing_is_left_to_who_chose_it(tmp_path, trainer):
    class Theirs(TorchCheckpointIO):
        pass

    trainer.strategy.checkpoint_io = Theirs()
    ResumableCheckpoint(str(tmp_path)).setup(trainer, None, "fit")
    assert type(trainer.strategy.checkpoint_io) is Theirs
