"""Prompts to what a model reads: token ids with or without a chat template."""

import copy

from PIL import Image

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
