"""The corpus of the tiny models as batches."""

import pytest

from datamodules.tokenise import encode_prompt
from lenvm_lightning.rollouts.record import Rollout
from lenvm_lightning.tinyworld import corpus
from lenvm_lightning.tinyworld.datamodule import TinyCorpus


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
