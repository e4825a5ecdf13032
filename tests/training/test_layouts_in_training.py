"""Training in a layout: the curve of padded rows, resumed to the bit, censored rows and dropout included."""

import json

import lightning as L
import pytest
import torch
from gradients import QUIET
from lightning.pytorch.callbacks import Callback
from modules import make_module
from transformers import OPTConfig

from datamodules import TextRollouts, VisionRollouts
from lenvm_lightning import TextLenVM, VisionLenVM
from lenvm_lightning.distributions.heads import HeadConfig
from lenvm_lightning.errors import RecipeError
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.tinyworld.rollouts import write_rollouts
from lenvm_lightning.training.callbacks import ResumableCheckpoint, Throughput

STEPS = 6


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Rollouts of both kinds, four of a prompt; every third completion is truncated."""
    files = {}
    for kind in ("text", "vision"):
        file = write_rollouts(kind, tmp_path_factory.mktemp(kind), prompts=24, completions=4)
        records = [json.loads(line) for line in file.read_text().splitlines()]
        for record in records[::3]:
            record["token_ids"] = record["token_ids"][:-5]
            record["finish_reason"] = "length"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        files[kind] = str(file)
    return files


class Record(Callback):
    """Mean losses of the steps, and how many images the tower saw in each forward."""

    def __init__(self):
        self.losses, self.images, self.validation = [], [], None

    def on_train_start(self, trainer, pl_module):
        tower = getattr(pl_module.model.backbone, "visual", None)
        if tower is not None:
            count = lambda module, args, kwargs, out: self.images.append(len(kwargs["grid_thw"]))  # noqa: E731
            tower.register_forward_hook(count, with_kwargs=True)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]) / int(batch["mask"].sum()))  # the step has their sum

    def on_validation_end(self, trainer, pl_module):
        self.validation = float(trainer.callback_metrics["val/loss"])


def train(files, kind, layout, folder, *, steps=STEPS, resume=None, save=False, **settings):
    """A short run: what was recorded, the weights it ended with, and its Trainer."""
    L.seed_everything(0, verbose=False)
    module, rollouts = (TextLenVM, TextRollouts) if kind == "text" else (VisionLenVM, VisionRollouts)
    model = make_module(module, "tiny-text" if kind == "text" else "tiny-vl", lr=1e-3, warmup_steps=0, **settings)
    completions_per_batch = 1 if layout == "packed" else 4
    callbacks = [record := Record(), Throughput()]
    if save:
        callbacks.append(ResumableCheckpoint(str(folder), every_n_steps=STEPS // 2))
    trainer = L.Trainer(
        **QUIET, max_steps=steps, max_epochs=-1, accelerator="cpu", callbacks=callbacks, num_sanity_val_steps=0,
        val_check_interval=steps, check_val_every_n_epoch=None, default_root_dir=folder, log_every_n_steps=1,
    )  # fmt: skip
    data = rollouts(
        files[kind], layout=layout, completions_per_batch=completions_per_batch, batch_tokens=1024, val_share=0.2
    )
    trainer.fit(model, data, ckpt_path=resume)
    return record, {name: value.clone() for name, value in model.state_dict().items()}, trainer


@pytest.mark.parametrize(("kind", "settings"), [("text", {}), ("vision", {"gradient_checkpointing": True, "lam": 0.9})])
def test_sharing_gives_the_curve_of_padded_rows(files, tmp_path, kind, settings):
    rows, _, _ = train(files, kind, "rows", tmp_path, **settings)
    shared, _, trainer = train(files, kind, "shared", tmp_path, **settings)
    assert shared.losses == pytest.approx(rows.losses, rel=1e-3)  # float32, after updates
    assert shared.validation == pytest.approx(rows.validation, rel=1e-3)
    assert len(set(rows.losses)) == STEPS
    assert any(trainer.datamodule.train_rows[row]["censored"] for row in range(8))
    if kind == "vision":
        assert sum(shared.images) * 4 == sum(rows.images)


@pytest.mark.parametrize(("kind", "layout"), [("text", "packed"), ("vision", "shared")])
def test_a_resumed_run_ends_with_the_same_weights(files, tmp_path, kind, layout):
    # Dropout draws random numbers, which the check of the layout must not disturb.
    options = {"head_dropout": 0.2, "save": True, "head": HeadConfig("bins" if kind == "text" else "point")}
    record, whole, _ = train(files, kind, layout, tmp_path / "whole", **options)
    half = tmp_path / "whole" / f"step-{STEPS // 2:09d}.ckpt"
    rest, ours, trainer = train(files, kind, layout, tmp_path / "rest", resume=half, **options)
    assert trainer.global_step == STEPS
    assert rest.losses == record.losses[STEPS // 2 :]
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_packed_training_learns_and_validates_as_rows_do(files, tmp_path):
    first, _, _ = train(files, "text", "packed", tmp_path, steps=1)
    record, _, trainer = train(files, "text", "packed", tmp_path, steps=12)
    assert record.validation < 0.8 * first.validation
    settings = {"batch_tokens": 1024, "val_share": 0.2}
    losses = [
        trainer.validate(
            trainer.lightning_module, TextRollouts(files["text"], layout=layout, **settings), verbose=False
        )
        for layout in ("packed", "rows")
    ]
    assert losses[0][0]["val/loss"] == pytest.approx(losses[1][0]["val/loss"], rel=1e-5)


def test_a_model_that_cannot_is_refused_before_the_first_step(files, tmp_path):
    """OPT counts positions by itself, so packed rows would not start over."""
    config = OPTConfig(
        vocab_size=4096, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, pad_token_id=0,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "opt")
    load_processor("tiny-text").save_pretrained(tmp_path / "opt")
    model, record = make_module(TextLenVM, str(tmp_path / "opt"), pretrained=False), Record()
    trainer = L.Trainer(**QUIET, max_steps=2, accelerator="cpu", callbacks=[record])
    with pytest.raises(
        RecipeError, match=r"data.layout: packed cannot be used with OPTModel: .* Set data.layout: rows"
    ):
        trainer.fit(model, TextRollouts(files["text"], layout="packed", batch_tokens=1024, val_share=0.2))
    assert record.losses == []
