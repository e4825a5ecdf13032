"""Controls as short texts: each means what it says, and mistakes are named."""

import pytest
import torch

from lenvm_lightning.decoding.control_text import EXAMPLES, control_as_text, parse_control
from lenvm_lightning.errors import GenerationError
from lenvm_lightning.guidance import AtLeast, AtMost, EqualTo, Gated, Scale, Tilt


@pytest.mark.parametrize(
    ("text", "control"),
    [
        ("none", None),
        ("tilt:-5", Tilt(-5)),
        ("equal-to:128", EqualTo(128)),
        ("equal-to:128:hard", EqualTo(128, mode="hard")),
        (" equal-to : 128 : soft ", EqualTo(128, mode="soft")),
        ("at-most:64", AtMost(64)),
        ("at-most:64:hard", AtMost(64, mode="hard")),
        ("at-least:200:penalty", AtLeast(200)),
        ("scale:mul:0.5", Scale(0.5, "mul")),
        ("scale:length-mul:2", Scale(2, "length_mul")),
        ("gated:0.1:0.5:equal-to:128:hard", Gated(EqualTo(128, mode="hard"), 0.1, 0.5)),
        ("at-most:64:until=</think>", AtMost(64, until="</think>")),
        (" equal-to : 64 : soft:until= a:b ", EqualTo(64, mode="soft", until=" a:b ")),
        ("at-most:64:until=\\\\n\\n\\t", AtMost(64, until="\\n\n\t")),
        ("gated:0.1:0.5:at-most:64:until=:until=x", Gated(AtMost(64, until=":until=x"), 0.1, 0.5)),
    ],
)
def test_controls_are_read(text, control):
    assert parse_control(text) == control


@pytest.mark.parametrize("until", ["</think>", "\n\n", "```", "\\n", " a: b\t", "until=", "\\"])
def test_any_text_that_ends_a_segment_comes_back(until):
    for control in (AtMost(64, until=until), Gated(EqualTo(9, mode="hard", until=until), 0.1)):
        assert parse_control(control_as_text(control)) == control


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("at-least:64:until=x", "equal-to and at-most"),
        ("tilt:-5:until=x", "2 parts after its name"),
        ("at-most:64:until=", "until must be a text such as"),
        ("at-most:until=x", "not a whole number"),
        (r"at-most:64:until=\q", "write"),
        ("at-most:64:hard:hard:until=x", "4 parts"),
        ("at-most:64:hard:hard", "one mode at most"),
    ],
)
def test_segments_that_mean_nothing_are_refused(text, told):
    with pytest.raises(GenerationError, match=told):
        parse_control(text)


@pytest.mark.parametrize("text", EXAMPLES)
def test_a_control_is_written_as_it_is_read(text):
    control = parse_control(text)
    assert parse_control(control_as_text(control)) == control


@pytest.mark.parametrize("control", [EqualTo(9, strength=3.0), Tilt(torch.tensor([1.0, 2.0])), lambda *_: None])
def test_a_control_without_a_text_form_is_refused(control):
    with pytest.raises(GenerationError, match="has no text form"):
        control_as_text(control)


def test_the_examples_are_right():
    assert [parse_control(text) is None for text in EXAMPLES] == [text == "none" for text in EXAMPLES]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("equalto:128", "control 'equalto:128' is none; did you mean 'equal-to'"),
        ("tilt-5", "control 'tilt-5' is none; did you mean 'tilt'?.*such as tilt:-5"),
        ("", "control '' is none .such as tilt:-5"),
        ("tilt", "control 'tilt' has 0 parts after its name; write it like 'tilt:-5'"),
        ("tilt:short", "control 'tilt:short': 'short' is not a number"),
        ("tilt:inf", "control 'tilt:inf': beta must be finite"),
        ("equal-to:12.5", "control 'equal-to:12.5': '12.5' is not a whole number of tokens"),
        ("at-most:2147483648", "control 'at-most:2147483648': no text has so many tokens"),
        ("equal-to:0", "control 'equal-to:0': n must be a whole number of at least 1"),
        ("at-most:64:soft", "control 'at-most:64:soft': mode must be one of penalty, hard; got 'soft'"),
        ("scale:sum:2", "control 'scale:sum:2': kind must be one of mul, linear, length_mul"),
        ("gated:0.1:0.5:none", "control 'gated:0.1:0.5:none': control must be a control"),
        ("none:1", "has 1 parts after its name"),
    ],
)
def test_mistakes_in_controls_are_named(text, said):
    with pytest.raises(GenerationError, match=said):
        parse_control(text)
