"""Whether a prompt can be answered, by the smaller of two models."""

import pytest
from tiny_generators import build
from transformers import AutoModel, Qwen2Config

from lenvm_lightning.decoding.limits import context_window, contradiction, why_no_room, why_unreadable
from lenvm_lightning.guidance import AtLeast, AtMost, EqualTo, Gated, Tilt


@pytest.fixture(scope="module")
def models():
    """A generator of 2,048 tokens and 4,096 places, and a backbone of 100 tokens and 32 places."""
    small = Qwen2Config(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=16, max_position_embeddings=32,
    )  # fmt: skip
    return [build("tiny-text"), AutoModel.from_config(small)]


def test_the_smaller_model_decides(models):
    assert context_window(models[:1]) == 4096
    assert context_window(models) == 32
    assert why_unreadable(models[:1], [5, 200], has_images=False) == ""
    assert why_unreadable(models, [5, 200], has_images=False) == "the models know no token 200, only 100 tokens"
    assert why_unreadable(models, [-1], has_images=False).startswith("the models know no token -1")
    assert why_unreadable(models, [], has_images=False) == "the prompt is empty"


def test_targets_and_limits_need_room(models):
    assert why_no_room(models, 10, None, 22) == ""
    assert "more than the context window of 32" in why_no_room(models, 10, None, 23)
    assert "pass the context window of 32" in why_no_room(models, 10, EqualTo(23), None)
    assert why_no_room(models, 10, Tilt(-5), None) == ""
    assert why_no_room(models, 32, None, None) == "the prompt of 32 tokens fills the context window"


@pytest.mark.parametrize("control", [EqualTo(100), AtLeast(100), Gated(EqualTo(100), min_g=0.1)])
def test_a_target_beyond_the_limit_can_never_be_met(control):
    assert "contradict each other" in contradiction(control, 99)
    assert contradiction(control, 100) == ""
    assert contradiction(control, None) == ""


@pytest.mark.parametrize("control", [None, Tilt(-5), AtMost(100), Gated(AtMost(100), min_g=0.1)])
def test_what_has_no_target_or_is_a_limit_always_can(control):
    assert contradiction(control, 9) == ""
