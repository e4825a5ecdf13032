"""Tokens to text, piece by piece."""

import random

import pytest

from lenvm_lightning.decoding.text_stream import TextStream
from lenvm_lightning.models.processors import load_processor

TOKENIZER = load_processor("tiny-text")


def pieces_of(ids, stops=()):
    stream = TextStream(TOKENIZER, stops)
    return [stream.add(token, last=number == len(ids) - 1) for number, token in enumerate(ids)], stream.text


@pytest.mark.parametrize("text", ["The sea is calm. It is 5 o'clock.", "海很平静。", "a\n\n  b", "naïve 🌊 sea", " x"])
def test_the_pieces_are_the_text_and_none_holds_half_a_character(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    pieces, whole = pieces_of(ids)
    assert "".join(pieces) == whole == TOKENIZER.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_any_ids_come_out_as_they_are_decoded_at_once():
    for seed in range(50):
        ids = random.Random(seed).choices(range(300, len(TOKENIZER)), k=30)
        pieces, whole = pieces_of(ids)
        assert "".join(pieces) == whole
        assert whole == TOKENIZER.decode(ids, skip_special_tokens=True)


def test_nothing_behind_a_stop_text_is_shown_and_nothing_of_it():
    ids = TOKENIZER("One. Two. Three.", add_special_tokens=False)["input_ids"]
    for length in range(1, len(ids) + 1):
        pieces, whole = pieces_of(ids[:length], ["wo. T", "Three"])
        assert "".join(pieces) == whole
        decoded = TOKENIZER.decode(ids[:length])
        assert whole == (decoded.partition("wo. T")[0] if "wo. T" in decoded else decoded)
    stream = TextStream(TOKENIZER, ["wo. T"])
    shown = ""
    for token in ids:
        shown += stream.add(token, last=False)
        assert "wo" not in shown  # it might be the beginning of the stop text, until something else follows
    assert shown == "One. T"


def test_a_text_that_ends_without_a_token():
    stream = TextStream(TOKENIZER)
    [token] = TOKENIZER("sea", add_special_tokens=False)["input_ids"][:1]
    shown = stream.add(token, last=False)
    assert stream.add(-1, last=True) == ""
    assert stream.text == shown
