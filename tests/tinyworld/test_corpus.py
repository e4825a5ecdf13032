"""The corpus of the tiny models as batches, and the models learning from it."""

import lightning as L
import pytest
import torch

from datamodules.tokenise import encode_prompt
from lenvm_lightning.rollouts.record import Rollout
from lenvm_lightning.tinyworld import corpus
from lenvm_lightning.tinyworld.datamodule import TinyCorpus
from lenvm_lightning.tinyworld.language_model import TinyLanguageModel


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_prompts_are_those_of_template_and_processor(kind):
    data = TinyCorpus(kind, documents=40, val_documents=5)
    data.setup()
    for index in range(40):
        document = corpus.document(kind, 0, index)
        rollout = Rollout("0", [{"role": "user", "content": document.prompt}], [], document.completion)
        expected = encode_prompt(data.processor, rollout, [document.image] if document.image else [])
        row = data.train[index]
        assert row["input_ids"][: row["prompt_length"]].tolist() == expected
        tokenizer = getattr(data.processor, "tokenizer", data.processor)
        completion = row["input_ids"][row["prompt_length"] :].tolist()
        assert completion[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(completion[:-1]) == document.completion


def test_batches_mark_completions():
    data = TinyCorpus("text", documents=50, val_documents=5, batch_tokens=1000)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].numel() <= 1000
    end = 2041 + 2  # <|im_end|>
    for ids, there, completion in zip(
        batch["input_ids"], batch["attention_mask"].bool(), batch["completion"], strict=True
    ):
        assert ids[there][-1] == end
        assert completion[there][-1]
        assert not completion[~there].any()
        assert not completion[0]


@pytest.mark.parametrize(("kind", "name"), [("text", "tiny-text"), ("vision", "tiny-vl")])
def test_a_little_training_lowers_the_loss(kind, name):
    torch.manual_seed(0)
    data = TinyCorpus(kind, documents=600, val_documents=10, batch_tokens=1024)
    model = TinyLanguageModel(name, warmup_steps=3)
    trainer = L.Trainer(
        max_steps=8, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    before = trainer.validate(model, data, verbose=False)[0]["val/loss"]
    model.train()
    trainer.fit(model, data)
    after = trainer.validate(model, data, verbose=False)[0]["val/loss"]
    assert before > 7  # log 2048 = 7.6: it knows nothing
    assert after < 6.5
