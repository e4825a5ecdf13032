"""Controls in the words of the research code's server, there and back."""

import pytest

from lenvm_lightning.decoding.custom_params import read_custom_params, write_custom_params
from lenvm_lightning.errors import GenerationError
from lenvm_lightning.guidance import AtLeast, AtMost, EqualTo, Gated, Scale, Tilt


@pytest.mark.parametrize(
    "control",
    [
        Tilt(-5.0),
        EqualTo(128, "hard"),
        EqualTo(128, "soft"),
        AtMost(64, "hard"),
        AtLeast(200, "hard"),
        Scale(0.5, "mul"),
        Scale(2.0, "length_mul"),
        Scale(-0.25, "linear"),
        Gated(Tilt(3.0), 0.25, 0.0),
        Gated(AtMost(64, "hard"), 0.0, 0.5),
    ],
)
def test_what_is_written_is_read_as_it_was(control):
    assert read_custom_params(write_custom_params(control)) == control
    assert read_custom_params(write_custom_params(control, 0.997)) == control


def test_a_request_without_a_control():
    assert read_custom_params({}) is None
    assert read_custom_params({"gamma": 0.99, "value_min": 0.2}) is None


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"value_mod": "mul"}, "'value_mod' is unknown; did you mean 'value_mode'"),
        ({"value_mode": "twist", "value_scale": 1}, "value_mode='twist' is none of centered_exp, mul"),
        ({"value_mode": "mul"}, "value_scale must be a number, found None"),
        ({"value_mode": "mul", "value_scale": -1}, "must lie in"),
        ({"value_mode": "centered_exp", "value_scale": True}, "value_scale must be a number, found True"),
        ({"value_mode": "centered_exp", "value_scale": float("nan")}, "beta"),
        ({"target_length": 12.5}, "whole number of tokens, found 12.5"),
        ({"target_length": 10**400}, "whole number of tokens, found 1000"),
        ({"value_mode": "mul", "value_scale": 10**400}, "value_scale is larger than any number"),
        ({"target_length": 0}, "whole number of tokens, found 0"),
        ({"target_length": 12, "value_constraint": "about"}, "'about' is none of eq, eq_soft, le, ge"),
        ({"target_length": 12, "value_constraint": ["eq"]}, "is none of eq"),
        ({"target_length": 12, "target_length_mode": "remaining"}, "'remaining' is not served here"),
        ({"target_length": 12, "value_mode": "mul", "value_scale": 1}, "two controls"),
        ({"target_length": 12, "value_min": "much"}, "value_min must be a number, found 'much'"),
    ],
)
def test_what_means_nothing_is_refused_with_a_sentence(params, said):
    with pytest.raises(GenerationError, match=said):
        read_custom_params(params)


def test_the_research_server_knows_no_segments():
    with pytest.raises(GenerationError, match="has no name for until"):
        write_custom_params(AtMost(64, mode="hard", until="</think>"))
