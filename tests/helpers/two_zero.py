"""What two ranks of DeepSpeed do, for test_deepspeed.py.

`python tests/helpers/two_zero.py FOLDER TEXT VISION NAME...`."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # before anything imports deepspeed, which the ranks then need not do

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import lightning as L
import torch
from gradients import QUIET, FixedSplit
from torch import Tensor, nn
from two_ranks import RANKS, Mixed, drive, validated

from datamodules import TextRollouts
from lenvm_lightning import BackboneConfig, OptimizerConfig, TextLenVM, VisionLenVM
from lenvm_lightning.models.adapters import LoRA
from lenvm_lightning.training.callbacks import ResumableCheckpoint
from lenvm_lightning.training.deepspeed import ZeRO
from lenvm_lightning.training.fsdp import gather_full_weights

# Two windows of two micro-batches a rank, and a last one of a single one.
BATCHES = [[0], [1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11], [12], [13, 14, 15], [16, 17], [18], [19, 20, 21], [22]]
OVERRIDES = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
SMALL = BackboneConfig("tiny-text", pretrained=False, overrides=OVERRIDES)


class Descent(TextLenVM):
    """Takes plain steps, so that a weight changes by its gradient; so large that rounding of weights is small."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Without moments, which would hide how long a gradient is."""
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=10.0)


class VisualDescent(VisionLenVM):
    """The same with images."""

    configure_optimizers = Descent.configure_optimizers


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
    model, start = kind(SMALL), Start()
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


def images(folder: Path, text: str, vision: str, rank: int) -> None:
    """The tower is frozen, and called by one rank only."""
    found = {}
    for name, strategy in (("ddp", "ddp"), ("1", ZeRO(stage=1)), ("2", ZeRO(stage=2))):
        L.seed_everything(0, verbose=False)
        model, start = VisualDescent("tiny-vl", gamma=0.97), Start()
        trainer = L.Trainer(max_epochs=1, strategy=strategy, callbacks=[start], **RANKS, **QUIET)
        trainer.fit(model, Mixed(vision))
        found[name] = flat(model) - start.weights
    torch.save(found, folder / f"images-{rank}.pt")


def layouts(folder: Path, text: str, vision: str, rank: int) -> None:
    """Prompts are computed once, in as many passes by every rank."""
    found = {}
    for name, strategy in (("ddp", "ddp"), ("2", ZeRO(stage=2)), ("3", ZeRO(stage=3))):
        L.seed_everything(0, verbose=False)
        model, start = Descent(SMALL), Start()
        trainer = L.Trainer(max_epochs=1, strategy=strategy, callbacks=[start], limit_val_batches=0, **RANKS, **QUIET)
        trainer.fit(
            model, TextRollouts(text, batch_tokens=700, val_share=0.2, layout="shared", completions_per_batch=2)
        )
        found[name] = flat(model) - start.weights
    torch.save(found, folder / f"layouts-{rank}.pt")


def metrics(folder: Path, text: str, vision: str, rank: int) -> None:
    """Of a model that is not trained, and of one after training, over all held-out rows."""
    for name, strategy in (("ddp", lambda: "ddp"), ("2", lambda: ZeRO(stage=2)), ("3", lambda: ZeRO(stage=3))):
        found = {"alone": validated(text, strategy=strategy(), **RANKS)}
        L.seed_everything(1, verbose=False)
        model, data = TextLenVM("tiny-text", gamma=0.97), TextRollouts(text, batch_tokens=300)
        trainer = L.Trainer(
            max_steps=2,
            max_epochs=-1,
            limit_val_batches=0,
            precision="bf16-mixed",
            strategy=strategy(),
            **RANKS,
            **QUIET,
        )
        trainer.fit(model, data)
        trainer.validate_loop.limit_val_batches = trainer.limit_val_batches = 1.0
        found["trained"] = dict(trainer.validate(model, data, verbose=False)[0])
        if rank == 0:
            (folder / f"metrics-{name}.json").write_text(json.dumps(found))


# -- checkpoints ------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[int, LoRA | None, dict[str, Any]]] = {
    "whole-1": (1, None, {}),
    "whole-2": (2, None, {}),
    "whole-3": (3, None, {}),
    "offloaded-2": (2, None, {"offload_optimizer": True}),
    "offloaded-3": (3, None, {"offload_optimizer": True, "offload_parameters": True}),
    "adapters-2": (2, LoRA(rank=4), {}),
    "adapters-3": (3, LoRA(rank=4), {}),
}


def untrained(kind: str) -> TextLenVM:
    """What is trained."""
    L.seed_everything(2, verbose=False)
    lora = KINDS[kind][1]
    backbone = "tiny-text" if lora else SMALL
    return TextLenVM(backbone, head_dropout=0.2, lora=lora, optimizer=OptimizerConfig(lr=1e-2, warmup_steps=0))


def trained(text: str, folder: Path, kind: str, resume: bool) -> L.Trainer:
    """A short run that saves after two steps, or goes on from there."""
    stage, _, options = KINDS[kind]
    model = untrained(kind)
    trainer = L.Trainer(
        **QUIET, **RANKS, max_steps=4, max_epochs=-1, limit_val_batches=0, gradient_clip_val=1.0,
        strategy=ZeRO(stage=stage, **options),
        callbacks=[ResumableCheckpoint(str(folder), every_n_steps=2, keep=9)],
    )  # fmt: skip
    start = folder / "step-000000002.ckpt" if resume else None
    if start is not None:
        (start / "latest").write_text("somewhere else")  # which DeepSpeed would follow
    torch.manual_seed(3 + 5 * resume + trainer.global_rank)  # dropout of its own in every rank
    trainer.fit(model, TextRollouts(text, batch_tokens=700, val_share=0.2), ckpt_path=start, weights_only=True)
    return trainer


def checkpoint(kind: str, folder: Path, text: str, vision: str, rank: int) -> None:
    """Weights of a run, of the same run that goes on from a checkpoint, and of the model directory."""
    for resume in (False, True):
        trainer = trained(text, folder / kind, kind, resume)
        module = trainer.lightning_module
        with gather_full_weights(module):
            if rank == 0:
                weights = {key: p.detach().clone() for key, p in module.named_parameters()}
                torch.save(weights, folder / f"{kind}-{'resumed' if resume else 'through'}.pt")
                module.save_pretrained(folder / f"{kind}-model", trainer.datamodule.processor)
    trainer.validate_loop.limit_val_batches = trainer.limit_val_batches = 1.0
    validate = partial(L.Trainer.validate, verbose=False, weights_only=True)
    found = {"trained": validate(trainer, module, trainer.datamodule)[0]}
    again = L.Trainer(**QUIET, **RANKS, strategy=ZeRO(stage=KINDS[kind][0]))
    last = folder / kind / "step-000000004.ckpt"
    found["from the checkpoint"] = validate(again, untrained(kind), trainer.datamodule, last)[0]
    if rank == 0:
        (folder / f"{kind}-validated.json").write_text(json.dumps(found))


if __name__ == "__main__":
    work: dict[str, Callable[..., object]] = {f.__name__: f for f in (steps, images, layouts, metrics)}
    drive(work | {kind: partial(checkpoint, kind) for kind in KINDS}, sys.argv[1:])
