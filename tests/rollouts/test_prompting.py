"""Prompts to what a model reads: token ids with or without a chat template."""

import copy

import pytest
from PIL import Image

from lenvm_lightning.errors import ChatTemplateError
from lenvm_lightning.rollouts import prompting
from lenvm_lightning.rollouts.prompting import encode_prompt


def test_a_chat_template_is_used_where_there_is_one(tiny_text):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    ids, inputs = encode_prompt(tiny_text, messages, [])
    assert inputs == {}
    text = tiny_text.decode(ids)
    assert text.index("Be brief.") < text.index("Why?") < text.rindex("assistant")
    bare = copy.deepcopy(tiny_text)
    bare.chat_template = None
    assert bare.decode(encode_prompt(bare, messages, [])[0]) == "Be brief.\n\nWhy?"


def test_images_stand_at_their_marks(tiny_vl):
    images = [Image.new("RGB", (56, 56), "red"), Image.new("RGB", (112, 56), "blue")]
    messages = [{"role": "user", "content": "<image>and <image>: same?"}]
    ids, inputs = encode_prompt(tiny_vl, messages, images)
    grids = inputs["image_grid_thw"].prod(-1)
    assert len(inputs["pixel_values"]) == grids.sum()
    pad = tiny_vl.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    first, second = (int(count) // tiny_vl.image_processor.merge_size**2 for count in grids)
    assert first < second
    text = tiny_vl.tokenizer.decode([token for token in ids if token != pad])
    assert ids.count(pad) == first + second
    between = ids[ids.index(pad) + first :]
    assert between.count(pad) == second
    assert "and " in text
    assert "<image>" not in text


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('only users and assistants') }}", "refuses the prompt: only users and assistants"),
        ("{{ messages[5].content }}", "refuses the prompt: .*has no element 5"),
        ("{{ messages[0].content + 1 }}", "refuses the prompt: TypeError"),
        ("{{ messages.append(1) }}", "refuses the prompt: .*unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "refuses the prompt: OverflowError: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses the prompt: RecursionError"),
        ("{% if %}", "refuses the prompt: Expected an expression"),
    ],
)
def test_what_a_chat_template_refuses_is_one_kind_of_error(tiny_text, template, words):
    strange = copy.deepcopy(tiny_text)
    strange.chat_template = template
    with pytest.raises(ValueError, match=f"^the chat template {words}"):
        encode_prompt(strange, [{"role": "user", "content": "?"}], [])


def test_a_chat_template_without_end_is_stopped(tiny_text, monkeypatch):
    monkeypatch.setattr(prompting, "_TEMPLATE_SECONDS", 0.1)
    strange = copy.deepcopy(tiny_text)
    strange.chat_template = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
    with pytest.raises(ChatTemplateError, match=r"did not come to an end within 0\.1 seconds.*chat_template\.jinja"):
        encode_prompt(strange, [{"role": "user", "content": "?"}], [])


def test_what_a_processor_refuses_is_one_kind_of_error(tiny_vl):
    with pytest.raises(ValueError, match=r"^the prompt cannot be encoded: absolute aspect ratio"):
        encode_prompt(tiny_vl, [{"role": "user", "content": "<image>?"}], [Image.new("RGB", (3000, 2))])
