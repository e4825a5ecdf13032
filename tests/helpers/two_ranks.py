"""What two ranks do together, for test_ranks.py: `python tests/helpers/two_ranks.py FOLDER TEXT VISION NAME...`.

A driver that imports everything once and forks the ranks, which know of each other as torchrun's processes do.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from gradients import QUIET, Gradients, gathered, gradient
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

import lenvm_lightning.pipeline.run_recipe  # noqa: F401  (what every process would import again)
from datamodules import TextRollouts, VisionRollouts
from lenvm_lightning import BackboneConfig, OptimizerConfig, TextLenVM, VisionLenVM
from lenvm_lightning.batch import LengthBatch
from lenvm_lightning.cli.main import main
from lenvm_lightning.models.adapters import LoRA
from lenvm_lightning.training.callbacks import ResumableCheckpoint, latest_checkpoint
from lenvm_lightning.training.fsdp import FullySharded, gather_full_weights

IMAGE = 2046  # tiny-vl's token for a patch
SPLIT = [[0], [1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11]]
RANKS = {"accelerator": "cpu", "devices": 2}


def in_two_ranks(work: Callable[[int], object], kill: Callable[[], bool] | None = None) -> None:
    """Let two forked processes do something, and kill both of them, if so wanted, as soon as a moment has come."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os._exit(_be(rank, port, work))
        children.append(child)
    if kill is not None:
        while not kill():
            assert os.waitpid(children[0], os.WNOHANG) == (0, 0), "it ended before it was killed"
            time.sleep(0.001)
        for child in children:
            os.kill(child, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [-signal.SIGKILL if kill else 0] * 2, f"{work}: {codes}"


def _be(rank: int, port: int, work: Callable[[int], object]) -> int:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE="2", GROUP_RANK="0", TORCHELASTIC_RUN_ID="test",
    )  # fmt: skip
    rank_zero_only.rank = rank  # read when it was imported
    try:
        return work(rank) or 0
    except BaseException:
        traceback.print_exc()
        return 1


# -- gradients and metrics --------------------------------------------------------------------------------------------


def gradients(folder: Path, text: str, vision: str, rank: int) -> None:
    """Of the same rows in two micro-batches a rank, by every way to be two."""
    ways = {
        "ddp": {"strategy": "ddp"},
        "fsdp": {"strategy": FullySharded()},
        "recomputed": {"strategy": FullySharded(), "model_options": {"gradient_checkpointing": True}},
        "clipped": {"strategy": FullySharded(), "clip": 0.01},
        "clipped ddp": {"strategy": "ddp", "clip": 0.01},
    }
    found = {}
    for name, options in ways.items():
        with counted_layers() as calls:
            (found[name],) = gradient(text, SPLIT, accumulate=2, devices=2, **options)
        found[f"{name}: calls"] = len(calls)
    torch.save(found, folder / f"gradients-{rank}.pt")


@contextlib.contextmanager
def counted_layers() -> Iterator[list[None]]:
    """One entry for every time that a decoder layer computes its MLP."""
    calls: list[None] = []
    before = Qwen2MLP.forward

    def forward(self: Qwen2MLP, x: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return before(self, x)

    Qwen2MLP.forward = forward
    try:
        yield calls
    finally:
        Qwen2MLP.forward = before


class Types(L.Callback):
    """Types of weights while they are computed with, and of their gradients; logits."""

    def __init__(self) -> None:
        self.seen: dict[str, str] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch one weight inside, and one of the head."""
        model = pl_module.model
        for name, part in (("inside", model.backbone.layers[0].mlp.up_proj), ("head", model.v_head.summary)):
            part.register_forward_hook(lambda m, i, o, name=name: self.seen.update({name: str(m.weight.dtype)}))
        model.register_forward_hook(lambda m, i, o: self.seen.update(logits=str(o.dtype)))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Every rank has a shard of each."""
        model = pl_module.model
        self.seen["gradient inside"] = str(model.backbone.layers[0].mlp.up_proj.weight.grad.dtype)
        self.seen["gradient of the head"] = str(model.v_head.summary.weight.grad.dtype)


def precisions(folder: Path, text: str, vision: str, rank: int) -> None:
    """Gradients and types of shards that are gathered in half precision."""
    found = {}
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        types = Types()
        options = {"model_options": {"dtype": "float32"}, "callbacks": [types], "precision": precision}
        (one,) = gradient(text, SPLIT, accumulate=2, devices=2, strategy=FullySharded(), **options)
        found[precision] = {"gradient": one.float(), **types.seen}
    torch.save(found, folder / f"precisions-{rank}.pt")


def metrics(folder: Path, text: str, vision: str, rank: int) -> None:
    """Of a model that is not trained, over all held-out rows."""
    for name, strategy in (("ddp", "ddp"), ("fsdp", FullySharded())):
        found = validated(text, strategy=strategy, **RANKS)
        if rank == 0:
            (folder / f"metrics-{name}.json").write_text(json.dumps(found))


def validated(text: str, **options: Any) -> dict[str, float]:
    """Everything that validation logs."""
    L.seed_everything(1, verbose=False)
    model = TextLenVM("tiny-text", gamma=0.97)
    data = TextRollouts(text, batch_tokens=300)
    (found,) = L.Trainer(**QUIET, **options).validate(model, data, verbose=False)
    return dict(found)


class Mixed(L.LightningDataModule):
    """One batch a rank: images in the first, the other without."""

    def __init__(self, vision: str) -> None:
        super().__init__()
        self.source = VisionRollouts(vision, processor="tiny-vl", val_share=0.2)
        self.source.setup()
        self.facts, self.val_prompts = self.source.facts, 1

    def batches(self) -> list[LengthBatch]:
        """Rows with their images, and the same rows but that their image tokens are read as a word."""
        collate = self.source.collator()
        batch = collate([self.source.train_rows[i] for i in range(2)])
        ids = batch["input_ids"].clone()
        ids[ids == IMAGE] = 50
        return [batch, {**batch, "input_ids": ids, "vision": {}}]

    def train_dataloader(self) -> DataLoader:
        """Of this rank, or both of them."""
        return DataLoader(self.batches()[self.trainer.global_rank :: self.trainer.world_size], batch_size=None)


def mixed_gradient(vision: str, freeze_vision: bool, **options: Any) -> torch.Tensor:
    """Of a step in which only one batch has images."""
    L.seed_everything(0, verbose=False)
    backbone = BackboneConfig("tiny-vl", dtype="float64", freeze_vision=freeze_vision)
    model = VisionLenVM(backbone, gamma=0.97, optimizer=OptimizerConfig(lr=1e-30))
    record = Gradients()
    L.Trainer(max_epochs=1, accelerator="cpu", callbacks=[record], **QUIET, **options).fit(model, Mixed(vision))
    return record.seen[0]


def images(folder: Path, text: str, vision: str, rank: int) -> None:
    """The tower is called by one rank only: that must not stop the other."""
    found = {}
    for freeze in (True, False):
        found[f"fsdp {freeze}"] = mixed_gradient(vision, freeze, strategy=FullySharded(), devices=2)
        found[f"ddp {freeze}"] = mixed_gradient(vision, freeze, strategy="ddp", devices=2)
    torch.save(found, folder / f"images-{rank}.pt")


# -- checkpoints ------------------------------------------------------------------------------------------------------


def trained(text: str, folder: Path, whole: bool, resume: bool, lora: LoRA | None, precision: Any) -> L.Trainer:
    """A short run that saves after two steps, or goes on from there."""
    L.seed_everything(2, verbose=False)
    overrides = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32}
    backbone = "tiny-text" if lora else BackboneConfig("tiny-text", pretrained=False, overrides=overrides)
    model = TextLenVM(backbone, head_dropout=0.2, lora=lora, optimizer=OptimizerConfig(lr=1e-2, warmup_steps=0))
    trainer = L.Trainer(
        **QUIET, **RANKS, max_steps=4, max_epochs=-1, limit_val_batches=0, gradient_clip_val=1.0,
        strategy=FullySharded(save_distributed_checkpoint=not whole), precision=precision,
        callbacks=[ResumableCheckpoint(str(folder), every_n_steps=2, keep=9)],
    )  # fmt: skip
    start = folder / "step-000000002.ckpt" if resume else None
    torch.manual_seed(3 + 5 * resume + trainer.global_rank)  # dropout of its own in every rank
    trainer.fit(model, TextRollouts(text, batch_tokens=700, val_share=0.2), ckpt_path=start, weights_only=True)
    return trainer


CHECKPOINTS: dict[str, tuple[bool, LoRA | None, Any]] = {  # one file?, adapters, precision
    "adapters": (False, LoRA(rank=4), "32-true"),
    "shards": (False, None, "32-true"),
    "whole": (True, None, "32-true"),
    "halved": (False, None, "bf16-true"),
}


def checkpoints(name: str, folder: Path, text: str, vision: str, rank: int) -> None:
    """Weights of a run, of the same run that goes on from a checkpoint, and of the model directory."""
    whole, lora, precision = CHECKPOINTS[name]
    for resume in (False, True):
        trainer = trained(text, folder / name, whole, resume, lora, precision)
        module = trainer.lightning_module
        weights = {key: gathered(p).detach().clone() for key, p in module.named_parameters()}
        if rank == 0:
            torch.save(weights, folder / f"{name}-{'resumed' if resume else 'through'}.pt")
    with gather_full_weights(module):
        if rank == 0:
            module.save_pretrained(folder / f"{name}-model", trainer.datamodule.processor)
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():  # by the shards, as before
        logits = module.eval().model(ids, torch.ones_like(ids))
    if rank == 0:
        torch.save(logits, folder / f"{name}-logits.pt")


# -- commands ---------------------------------------------------------------------------------------------------------


RECIPE = """
fit:
  model:
    class_path: lenvm_lightning.TextLenVM
    init_args:
      backbone: {{source: tiny-text, pretrained: false, overrides: {{num_hidden_layers: 1}}}}
      optimizer: {{lr: 1.0e-3}}
      head_dropout: 0.1
  data:
    class_path: datamodules.TextRollouts
    init_args: {{files: {text}, batch_tokens: 1000}}
  trainer:
    {{strategy: {strategy}, accelerator: cpu, devices: 2, max_steps: 8, max_epochs: -1, check_val_every_n_epoch: 9}}
  checkpoint: {{every_n_steps: 2}}
"""
MEASURE = """evaluate:
  - {task: length, generator: tiny-text, limit: 4, n: 1, max_tokens: 256}
"""


def killed(folder: Path, text: str, strategy: str) -> None:
    """A whole recipe: undisturbed, and killed."""
    training = RECIPE.format(text=text, strategy=strategy)

    def run(name: str, kill: Callable[[], bool] | None = None) -> None:
        recipe = folder / f"{strategy}-{name}.yaml"
        recipe.write_text(training + (MEASURE if name == "killed" else ""))
        in_two_ranks(lambda rank: main(["run", str(recipe), "--runs", str(folder / strategy), "--name", name]), kill)

    run("undisturbed")
    run("killed", lambda: reached(folder / strategy / "killed" / "checkpoints", 4))
    run("killed")


def reached(folder: Path, steps: int) -> bool:
    """Whether so many steps are saved."""
    newest = latest_checkpoint(folder)
    return newest is not None and int(newest.stem.removeprefix("step-")) >= steps


def drive(work: Mapping[str, Callable[..., object]], words: list[str]) -> None:
    """Do what the command line names, one after the other; a strategy's name is a recipe that is killed."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # so that there are no threads when it forks
    folder, text, vision, *names = words
    for name in names:
        began = time.monotonic()
        if name in work:
            in_two_ranks(partial(work[name], Path(folder), text, vision))
        else:
            killed(Path(folder), text, name)
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    work: dict[str, Callable[..., object]] = {f.__name__: f for f in (gradients, precisions, metrics, images)}
    work |= {name: partial(checkpoints, name) for name in CHECKPOINTS}
    drive(work, sys.argv[1:])
