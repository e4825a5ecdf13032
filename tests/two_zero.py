"""What two ranks of DeepSpeed do, for test_deepspeed.py: `python tests/two_zero.py FOLDER TEXT VISION NAME...`."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # before anything imports deepspeed, which the ranks then need not do

import json
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import lightning as L
import torch
from test_exact_gradient import QUIET, FixedSplit
from torch import Tensor, nn
from two_ranks import MEASURE, RANKS, RECIPE, Mixed, reached, together

from datamodules import TextRollouts
from lenvm_lightning import TextLenVM, VisionLenVM
from lenvm_lightning.adapters import LoRA
from lenvm_lightning.callbacks import ResumableCheckpoint
from lenvm_lightning.cli.main import main
from lenvm_lightning.sharding import whole_weights
from lenvm_lightning.zero import ZeRO

# Two windows of two micro-batches a rank, and a last one of a single one.
BATCHES = [[0], [1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11], [12], [13, 14, 15], [16, 17], [18], [19, 20, 21], [22]]
SMALL = {"pretrained": False, "overrides": {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}}


class Descent(TextLenVM):
    """Takes plain steps, so that a weight changes by its gradient; so large that rounding of weights is small."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Without moments, which would hide how long a gradient is."""
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=10.0)


class Naive(Descent):
    """Negative control: the mean of the micro-batches' means."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The mean of a micro-batch."""
        total, tokens = self.loss_sum(self(batch), batch)
        return total / tokens

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave it at that."""


def flat(module: nn.Module) -> Tensor:
    """What is trained, as one vector, in all ranks."""
    trained = [p for p in module.parameters() if p.requires_grad]
    if not hasattr(trained[0], "ds_id"):
        return torch.cat([p.detach().flatten() for p in trained])
    with deepspeed.zero.GatheredParameters(trained):
        return torch.cat([p.detach().flatten().clone() for p in trained])


class Start(L.Callback):
    """Weights before the first step."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep them."""
        self.weights = flat(pl_module).clone()


def descended(
    text: str, strategy: Any, kind: type[TextLenVM] = Descent, clip: float | None = None, **options: Any
) -> dict[str, Any]:
    """How far weights go in an epoch, and in how many steps."""
    L.seed_everything(0, verbose=False)
    model, start = kind("tiny-text", **{**SMALL, **options.pop("model_options", {})}), Start()
    trainer = L.Trainer(
        max_epochs=1, accumulate_grad_batches=2, gradient_clip_val=clip, strategy=strategy, callbacks=[start], **RANKS,
        **QUIET, **options,
    )  # fmt: skip
    trainer.fit(model, FixedSplit(text, BATCHES))
    return {"change": flat(model) - start.weights, "steps": trainer.global_step}


def steps(folder: Path, text: str, vision: str, rank: int) -> None:
    """Of every stage, and of DDP; clipped and not."""
    found = {"naive": descended(text, "ddp", Naive)}
    for clip in (None, 0.01):
        found[f"ddp {clip}"] = descended(text, "ddp", clip=clip)
        for stage in (1, 2, 3):
            found[f"{stage} {clip}"] = descended(text, ZeRO(stage=stage), clip=clip)
    torch.save(found, folder / f"steps-{rank}.pt")


def drive(folder: Path, text: str, vision: str, names: list[str]) -> None:
    """Do what is asked for, one after the other."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # so that there are no threads when it forks
    work = {f.__name__: f for f in (steps,)}
    for name in names:
        began = time.monotonic()
        together(partial(work[name], folder, text, vision))
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    drive(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
