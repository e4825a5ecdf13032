import pytest
from published import publish
from transformers import AutoTokenizer
from value_models import trained

from lenvm_lightning import tinyworld
from lenvm_lightning.errors import CheckpointError
from lenvm_lightning.models.processors import load_processor


def test_a_tokenizer_that_is_not_there(tmp_path):
    publish(tmp_path, "value_head.safetensors")
    with pytest.raises(CheckpointError, match="no tokenizer or processor could be read"):
        load_processor(tmp_path)


def test_the_tokenizer_comes_back(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tinyworld.path("tiny-text"))
    trained("tiny-text").save_pretrained(tmp_path, tokenizer)
    again = load_processor(tmp_path)
    assert again("So 3 * 4 = 12<|im_end|>").input_ids == tokenizer("So 3 * 4 = 12<|im_end|>").input_ids
