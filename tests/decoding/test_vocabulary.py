import pytest
import torch
from tiny_generators import build

from lenvm_lightning.decoding.vocabulary import forbidden_ids, placeholder_ids, stop_ids_of
from lenvm_lightning.models.lenvm_config import LenVMConfig
from lenvm_lightning.models.value_model import LengthValueModel

END = 2043  # <|im_end|>


@pytest.fixture(scope="module")
def vision():
    return build("tiny-vl")


def test_the_first_place_that_names_stop_ids_counts(tiny_text):
    generator = build("tiny-text")
    generator.generation_config.eos_token_id, generator.config.eos_token_id = [3, 4], 5
    assert stop_ids_of(generator, tiny_text) == {3, 4}
    generator.generation_config.eos_token_id = 0  # an id like any other
    assert stop_ids_of(generator, tiny_text) == {0}
    generator.generation_config.eos_token_id = None
    assert stop_ids_of(generator, tiny_text) == {5}
    generator.config.eos_token_id = None
    assert stop_ids_of(generator, tiny_text) == {END}
    assert stop_ids_of(generator) == frozenset()


def test_placeholders_are_those_of_model_and_processor(vision, tiny_text, tiny_vl):
    ids = {tiny_vl.tokenizer.convert_tokens_to_ids(token) for token in ("<|image_pad|>", "<|video_pad|>")}
    assert len(ids) == 2
    assert placeholder_ids(vision, tiny_vl) == placeholder_ids(vision) == ids
    assert placeholder_ids(build("tiny-text"), tiny_text) == frozenset()


def test_ids_that_somebody_does_not_know_are_never_sampled(vision, tiny_text, tiny_vl):
    generator = build("tiny-text")
    assert forbidden_ids(generator, processor=tiny_text) is None
    few = LengthValueModel.from_backbone(
        "tiny-text", LenVMConfig(gamma=0.9), pretrained=False, overrides={"vocab_size": 2045, "num_hidden_layers": 1}
    )
    assert forbidden_ids(generator, few, tiny_text).tolist() == [2045, 2046, 2047]
    assert torch.equal(forbidden_ids(vision, processor=tiny_vl), torch.tensor(sorted(placeholder_ids(vision))))
    generator.resize_token_embeddings(2050)  # two rows that are no token
    assert forbidden_ids(generator, processor=tiny_text).tolist() == [2048, 2049]
    assert forbidden_ids(generator, few).tolist() == [2045, 2046, 2047, 2048, 2049]
