"""The tiny generators: they learn from the corpus, and their folders are ordinary ones."""

from pathlib import Path

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM

from lenvm_lightning import tinyworld
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.tinyworld.datamodule import TinyCorpus
from lenvm_lightning.tinyworld.language_model import TinyLanguageModel


@pytest.mark.parametrize(("kind", "name"), [("text", "tiny-text"), ("vision", "tiny-vl")])
def test_a_little_training_lowers_the_loss(kind, name):
    torch.manual_seed(0)
    data = TinyCorpus(kind, documents=200, val_documents=6, batch_tokens=1024)
    model = TinyLanguageModel(name, warmup_steps=3)
    trainer = L.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    before = trainer.validate(model, data, verbose=False)[0]["val/loss"]
    model.train()
    trainer.fit(model, data)
    after = trainer.validate(model, data, verbose=False)[0]["val/loss"]
    assert before > 7  # log 2048 = 7.6: it knows nothing
    assert after < 7


def test_saved_in_half_precision_and_loaded_whole(tmp_path: Path):
    torch.manual_seed(0)
    module = TinyLanguageModel("tiny-text")
    module.save_pretrained(tmp_path, load_processor("tiny-text"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    for name, parameter in module.model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], parameter.half().float(), rtol=0, atol=0)
    shipped = (tinyworld.path("tiny-text") / "model.safetensors").stat().st_size
    assert (tmp_path / "model.safetensors").stat().st_size == shipped  # tied embeddings are one tensor
