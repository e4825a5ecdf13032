"""Checkpoints from which a killed run goes on, bit for bit."""

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from ...utils.own_folder import put_in_place, sync_tree
from ..checkpoint_file import OwnFolderIO
from ..checkpoint_folder import latest_checkpoint, leftovers_of, name_of_step, steps_of, writing_name

__all__ = ["ResumableCheckpoint", "latest_checkpoint"]


class ResumableCheckpoint(L.Callback):
    """Saves the whole state of a run every so many optimizer steps, and when SIGTERM arrives.

    With `strategy: fsdp` it is a folder into which every rank writes its shard.

    A checkpoint is written beside its place, and appears under its name only when it is complete and on the disk;
    older ones go only after that. So at every moment, SIGKILL and a loss of power included, the newest is whole. Saved
    between optimizer steps, never within a window of accumulated gradients; a save due at the last batch of an epoch
    waits for the first step of the next. So where every epoch is a single step, nothing is saved before the end, and
    that is said.

    Args:
        dirpath: folder of the checkpoints.
        every_n_steps: optimizer steps between two.
        keep: how many of the newest are kept.
    """

    def __init__(self, dirpath: str, every_n_steps: int = 100, keep: int = 2) -> None:
        self.dirpath, self.every_n_steps, self.keep = Path(dirpath), every_n_steps, keep
        self._saved_step = -1
        self._random_state: dict[str, Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Sweep away what an interrupted save left behind, and have files written straight into their folder."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # else somebody chose another
            trainer.strategy.checkpoint_io = OwnFolderIO()
        if trainer.is_global_zero:
            for leftover in leftovers_of(self.dirpath):
                _remove(leftover)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the random generators back to where the checkpoint left them."""
        ranks = self._random_state["ranks"] if self._random_state is not None else []
        if ranks and len(ranks) == trainer.world_size:
            mine = ranks[trainer.global_rank]
            torch.set_rng_state(mine["cpu"])
            if torch.cuda.is_available() and "cuda" in mine:
                torch.cuda.set_rng_state(mine["cuda"])
        self._random_state = None
        self._saved_step = trainer.global_step
        if trainer.num_training_batches <= trainer.accumulate_grad_batches:
            rank_zero_info(
                f"Every epoch is a single optimizer step ({trainer.num_training_batches} batches, "
                f"accumulate_grad_batches {trainer.accumulate_grad_batches}): nothing is saved before the end, "
                "and a run that is stopped starts again."
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time, or if the run was told to stop."""
        # The Trainer miscounts when it resumes from the last batch of an epoch: such a save waits for the next step.
        ends_epoch = batch_idx + 1 >= trainer.num_training_batches
        if (batch_idx + 1) % trainer.accumulate_grad_batches or ends_epoch:
            return
        told_to_stop = trainer.strategy.reduce_boolean_decision(trainer.received_sigterm, all=False)
        if told_to_stop or trainer.global_step - self._saved_step >= self.every_n_steps:
            self.save(trainer)
        if told_to_stop:
            rank_zero_info(f"Told to stop: step {trainer.global_step} is saved, the same command goes on from there.")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step, so that a run killed while it writes its results has nothing to train again."""
        if trainer.global_step != self._saved_step and not trainer.received_sigterm:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write the checkpoint of the current step; all ranks call it."""
        step = trainer.global_step
        name = name_of_step(step)
        writing = self.dirpath / writing_name(name)
        trainer.save_checkpoint(writing)
        if trainer.local_rank == 0:  # what the ranks of this machine wrote
            sync_tree(writing)
        trainer.strategy.barrier("ResumableCheckpoint.save")
        if trainer.is_global_zero:
            put_in_place(writing, self.dirpath / name)
            # Those of later steps are damaged, or this run would have gone on from them: they are none of the newest.
            for _, old in [one for one in steps_of(self.dirpath) if one[0] <= step][: -self.keep]:
                _remove(old)
        self._saved_step = step

    def state_dict(self) -> dict[str, Any]:
        """State of torch's random generators in every rank, for dropout; all ranks call it."""
        state: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        ranks = [state]
        if dist.is_available() and dist.is_initialized():
            ranks *= dist.get_world_size()
            dist.all_gather_object(ranks, state)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the state until training starts: what runs before it may draw numbers."""
        self._random_state = state_dict


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
