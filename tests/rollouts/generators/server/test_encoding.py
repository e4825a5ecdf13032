"""Token ids of texts, for servers that give text only."""

import json

import pytest

from lenvm_lightning import tinyworld
from lenvm_lightning.errors import GeneratorError
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.rollouts.generators.server.backends import BACKENDS
from lenvm_lightning.rollouts.generators.server.encoding import load_encoding

OTHER = BACKENDS["other"]


@pytest.mark.parametrize("name", ["tiny-text", "tiny-vl"])
def test_ids_are_those_of_the_models_own_tokenizer(name, tiny_text):
    found = load_encoding(name, OTHER)
    assert found.encode("One two") == tiny_text("One two", add_special_tokens=False)["input_ids"]
    assert found.eos == tiny_text.eos_token_id


@pytest.mark.parametrize(
    ("config", "ends"), [(None, [2043]), ({"eos_token_id": 7}, [7]), ({"eos_token_id": [7, 2043]}, [7, 2043])]
)
def test_ends_are_those_of_the_generation_configuration(tmp_path, tiny_text, config, ends):
    tiny_text.save_pretrained(tmp_path)
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    found = load_encoding(str(tmp_path), OTHER)
    assert (found.eos, found.ends) == (2043, ends)


def test_tokenizers_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(GeneratorError, match=r"kind 'other' returns text only.*Give it as processor="):
        load_encoding(str(tmp_path), OTHER)
    tokenizer = load_processor(tinyworld.path("tiny-text"))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(GeneratorError, match="has no end-of-sequence token"):
        load_encoding(str(tmp_path), OTHER)
