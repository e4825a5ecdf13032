import unicodedata
from random import Random

import pytest
from transformers import (
    AutoConfig,
)

from lenvm_lightning import tinyworld
from lenvm_lightning.tinyworld.tokenizer import SPECIAL_TOKENS, build_tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "",
        " two  spaces,\ttab\r\n\n and a newline \n",
        "naïve façade Ωmega 你好 שלום 🙂👩‍👩‍👧 \u200b\ufeff\x00\x7f",
        "".join(chr(code) for code in range(256)),
        "\\frac{1}{2} $x^{2}$ \\boxed{\\text{12.5 cm}}",
    ],
)
def test_any_nfc_text_comes_back(tokenizer, text):
    text = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_random_code_points_come_back(tokenizer):
    rng = Random(0)
    codes = [rng.randrange(0x110000) for _ in range(999)]
    text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)  # surrogates are no text
    text = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_layout(tokenizer):
    assert len(tokenizer) == 2048 == AutoConfig.from_pretrained(tinyworld.path("tiny-text")).vocab_size
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(2041, 2048))
    assert set(tokenizer.all_special_tokens) == set(SPECIAL_TOKENS)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert [tokenizer.decode([i]) for i in tokenizer("3.14159").input_ids] == list("3.14159")
    for sentence in ("So the answer is", " the area of the triangle", " there are more than"):
        assert len(tokenizer(sentence).input_ids) == len(sentence.split())


def test_built_tokenizer_is_the_shipped_one(tokenizer):
    built = build_tokenizer()
    text = "Wait, 12 * 3 = 36<|im_end|>\n<|im_start|>"
    assert built.get_vocab() == tokenizer.get_vocab()
    assert built(text).input_ids == tokenizer(text).input_ids
    assert built.chat_template == tokenizer.chat_template


def test_chat_template(tokenizer):
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}
    assert tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>How many?<|im_end|>\n<|im_start|>assistant\n"
    )
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n"
    )
