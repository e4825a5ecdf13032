"""Value models with adapters, and runs that train a few steps."""

import lightning as L
import torch
from gradients import QUIET as BARE
from modules import make_module
from torch import nn

from datamodules import TextRollouts
from lenvm_lightning import LengthValueModel, LenVMConfig, LoRA, TextLenVM
from lenvm_lightning.training.callbacks import ResumableCheckpoint

QUIET = {**BARE, "accelerator": "cpu", "num_sanity_val_steps": 0}
WAYS = {"full": {}, "lora": {"lora": LoRA(4)}, "qlora": {"lora": LoRA(4, dropout=0.1), "quantise": "nf4"}}
IDS = torch.arange(40)[None] * 37 % 300 + 20


def adapted(name="tiny-text", quantise=None, **lora):
    """A model whose adapters do something."""
    torch.manual_seed(0)
    model = LengthValueModel.from_backbone(
        name, LenVMConfig(0.99), lora=LoRA(**{"rank": 4, **lora}), quantise=quantise
    ).eval()
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.05)
    return model


def values(model, ids=IDS):
    with torch.no_grad():
        return model.value(model(ids))


def fit(module, data, steps=3, folder=None, resume=None, validate=0, every=2):
    L.seed_everything(0, verbose=False)
    callbacks = [ResumableCheckpoint(str(folder), every_n_steps=every, keep=9)] if folder else []
    trainer = L.Trainer(max_steps=steps, max_epochs=-1, limit_val_batches=1, callbacks=callbacks,
                        val_check_interval=validate or None, check_val_every_n_epoch=None if validate else 1,
                        **QUIET)  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return module


def text_module(**settings):
    return make_module(TextLenVM, "tiny-text", gamma=0.99, lr=1e-3, warmup_steps=0, **settings)


def text_data(file):
    return TextRollouts(str(file), batch_tokens=1024, val_share=0.2)
