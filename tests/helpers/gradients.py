"""Gradients of a whole batch, however it is split."""

from functools import partial

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from modules import make_module
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from datamodules import TextRollouts
from lenvm_lightning import TextLenVM

ROWS = 12


QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


TOLERANCE = 1e-12  # float64 sums of a few thousand terms, in another order


class Gradients(Callback):
    """Keeps the gradient of each optimizer step as one vector."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        for module in pl_module.modules():
            if isinstance(module, Qwen2RMSNorm):  # transformers' computes in float32, whatever the model is in
                module.forward = partial(exact_norm, module)

        def keep(optimizer, args, options):
            gradients = [gathered(p.grad).flatten() for p in pl_module.parameters() if p.grad is not None]
            self.seen.append(torch.cat(gradients).clone())

        trainer.optimizers[0].register_step_post_hook(keep)


def gathered(gradient):
    """A tensor that is sharded over ranks, from all of them."""
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def exact_norm(module, hidden):
    """RMSNorm in the type of its input."""
    return module.weight * hidden * (hidden.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()


class FixedSplit(L.LightningDataModule):
    """The same rows in given batches; every rank takes its shard."""

    def __init__(self, file, batches):
        super().__init__()
        self.source = TextRollouts(str(file), processor="tiny-text", max_length=300, val_share=0.2)
        self.source.setup()
        self.batches, self.facts, self.val_prompts = batches, self.source.facts, 1
        self.rows_per_batch = sum(map(len, batches)) / len(batches)

    def train_dataloader(self):
        mine = self.batches[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(self.source.train_rows, batch_sampler=mine, collate_fn=self.source.collator())


def gradient(file, batches, *, accumulate=1, clip=None, model_options=None, callbacks=(), **trainer_options):
    """Gradients of the optimizer steps of one epoch, in float64 unless the options say otherwise."""
    L.seed_everything(0, verbose=False)
    overrides = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
    settings = {"pretrained": False, "overrides": overrides, "lr": 1e-30, "dtype": "float64", **(model_options or {})}
    model = make_module(TextLenVM, "tiny-text", **settings)
    record = Gradients()
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", accumulate_grad_batches=accumulate, callbacks=[record, *callbacks],
        gradient_clip_val=clip, **QUIET, **trainer_options,
    )  # fmt: skip
    trainer.fit(model, FixedSplit(file, batches))
    return record.seen


def relative(a, b):
    return float((a - b).norm() / b.norm())
