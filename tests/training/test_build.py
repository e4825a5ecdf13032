"""Models that are ready to be trained."""

import lightning as L
from gradients import QUIET
from lightning.pytorch.callbacks import Callback
from modules import make_module


def test_train_mode_is_set_and_vision_frozen(vision_rollouts):
    from datamodules import VisionRollouts
    from lenvm_lightning import VisionLenVM

    modes = {}

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            vision = next(iter(pl_module.model.vision_modules()))
            modes.update(
                head=pl_module.model.v_head.training,
                language=pl_module.model.backbone.get_decoder().training,
                vision=vision.training,
                vision_grad=any(p.requires_grad for p in vision.parameters()),
            )

    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", callbacks=[Look()], limit_val_batches=0, **QUIET
    )  # fmt: skip
    model = make_module(VisionLenVM, "tiny-vl", pretrained=False, gradient_checkpointing=True)
    trainer.fit(model, VisionRollouts(str(vision_rollouts), batch_tokens=1024, val_share=0.2))
    assert modes == {"head": True, "language": True, "vision": False, "vision_grad": False}


def test_a_model_remembers_the_segments_that_its_data_teach(text_rollouts, tmp_path):
    """Gamma and the fresh head go by their lengths, too."""
    from datamodules import TextRollouts
    from lenvm_lightning import LengthValueModel, TextLenVM

    found = {}
    for until in (None, "."):
        data = TextRollouts(str(text_rollouts), batch_tokens=1024, val_share=0.2, until=until, cache_dir=str(tmp_path))
        module = make_module(TextLenVM, "tiny-text", pretrained=False, gamma="auto")
        trainer = L.Trainer(max_steps=1, accelerator="cpu", limit_val_batches=0, **QUIET)
        trainer.fit(module, data)
        module.save_pretrained(tmp_path / f"model{until}", data.processor)
        found[until] = LengthValueModel.from_pretrained(tmp_path / f"model{until}").config
    assert found[None].until is None
    assert found["."].until == "."
    assert found["."].rollouts["p99"] < found[None].rollouts["p99"]
    assert found["."].gamma < found[None].gamma
