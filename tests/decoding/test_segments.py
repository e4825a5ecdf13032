"""Segments: where they end, and a control that ends them and leaves the rest alone."""

import dataclasses
from random import Random

import pytest
import torch
from pairs import END, prompts_of, value_model
from tiny_generators import build

from lenvm_lightning.decoding.generate import generate, stream
from lenvm_lightning.decoding.sampling import sample_tokens
from lenvm_lightning.decoding.sampling_params import SamplingParams, completion_seed
from lenvm_lightning.decoding.segments import Segment, segment_of, tokens_until, why_not_until
from lenvm_lightning.decoding.transformers_hook import guided
from lenvm_lightning.errors import GenerationError
from lenvm_lightning.guidance import AtLeast, AtMost, EqualTo, Gated, Tilt

TEXTS = ["</think>", "\n\n", "```", "so", "e"]  # of five tokens, of one, of three, of letters that tokens hold within


@pytest.fixture(scope="module")
def generator():
    return build("tiny-text", torch.float64, eos_bias=3.0)


def counting_to(until):
    lenvm = value_model("tiny-text")
    lenvm.config = dataclasses.replace(lenvm.config, until=until)
    return lenvm


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_segment_ends_with_the_token_that_completes_the_text(tiny_text):
    ids = [*ids_of(tiny_text, "First"), *ids_of(tiny_text, "\n\n"), *ids_of(tiny_text, "Second\n\n")]
    count = len(ids_of(tiny_text, "First"))
    assert tokens_until(ids, "\n\n", tiny_text) == count + 1
    assert tokens_until(ids, "\n", tiny_text) == count + 1  # inside a token
    assert tokens_until(ids, "Third", tiny_text) is None
    assert tokens_until([], "x", tiny_text) is None


def test_a_character_in_parts_counts_with_its_last_token(tiny_text):
    parts = ids_of(tiny_text, "é→")
    assert len(parts) > 2
    whole = next(k for k in range(1, 9) if tiny_text.decode(parts[:k]) == "é")
    assert tokens_until(parts, "é", tiny_text) == whole
    assert tokens_until(parts, "→", tiny_text) == len(parts)
    with pytest.raises(GenerationError, match="writes a character of it in parts"):
        Segment("→", tiny_text)


@pytest.mark.parametrize("until", TEXTS)
def test_closing_tokens_are_those_after_which_the_text_is_there(until, tiny_text):
    """By definition: every token of the vocabulary behind every beginning of the text, decoded."""
    segment = segment_of(until, tiny_text)
    for place in range(len(until)):
        written = ids_of(tiny_text, f"x{until[:place]}")
        assert segment.place(written) == place
        expected = [token for token in range(len(tiny_text)) if until in tiny_text.decode([*written, token])]
        assert segment.closing(place).tolist() == expected


@pytest.mark.parametrize("until", TEXTS)
def test_the_way_to_the_end_of_a_text(until, tiny_text):
    segment = segment_of(until, tiny_text)
    for place in range(len(until)):
        ids = ids_of(tiny_text, f"x{until[:place]}")
        begun = len(ids)
        while not segment.is_ended_by(ids):
            ids.append(segment.next_id(segment.place(ids)))
        assert len(ids) - begun <= segment.tokens
        assert tiny_text.decode(ids) == f"x{until}"


def test_a_text_that_repeats_itself_is_found_behind_a_false_start(tiny_text):
    segment = segment_of("aab", tiny_text)
    ids = [*ids_of(tiny_text, "a")] * 3
    assert segment.place(ids) == 2
    assert tiny_text.convert_tokens_to_ids("b") in segment.closing(2).tolist()


@pytest.mark.parametrize("low", [0.0, 0.7])
@pytest.mark.parametrize("until", ["</think>", "so", "\n\n"])
def test_a_segment_is_never_longer_than_asked_for(until, low, generator, tiny_text, text_inputs):
    lenvm, tokens = counting_to(until), segment_of(until, tiny_text).tokens
    for n in (tokens, tokens + 1, 12):
        control = AtMost(n, low=low, until=until)
        settings = {"n": 3, "max_tokens": 40, "seed": n, "tokenizer": tiny_text}
        completions = generate(generator, lenvm, text_inputs, control=control, **settings)
        lengths = [tokens_until(one.token_ids, until, tiny_text) for one in completions]
        ended_whole = [one.token_ids[-1] == END and len(one.token_ids) <= n for one in completions]
        assert all(
            (length is not None and length <= n) or ended for length, ended in zip(lengths, ended_whole, strict=True)
        )
        if low:  # else this generator, which likes to end, ends as soon as it can
            assert any(length is not None for length in lengths)
            assert max(len(one.token_ids) for one in completions) > n  # and something follows


@torch.no_grad()
def test_behind_the_segment_the_base_model_writes_with_the_same_numbers(generator, tiny_text, text_inputs):
    params = {"top_k": 15, "top_p": 0.999}
    [prompt] = prompts_of(text_inputs)[2:3]
    completions = generate(
        generator, counting_to("so"), [prompt], control=EqualTo(6, until="so"), n=12, max_tokens=24, seed=3,
        tokenizer=tiny_text, **params,
    )  # fmt: skip
    checked = 0
    for one in completions:
        uniforms = Random(completion_seed(3, "", one.index))
        numbers = [uniforms.random() for _ in one.token_ids]
        length = tokens_until(one.token_ids, "so", tiny_text)
        for place in range(length or len(one.token_ids), len(one.token_ids)):
            logits = generator(torch.tensor([[*prompt, *one.token_ids[:place]]])).logits[:, -1]
            uniform = torch.tensor([numbers[place]], dtype=torch.float64)
            token, _ = sample_tokens(logits, uniform, SamplingParams(**params))
            assert token.item() == one.token_ids[place]
            checked += 1
    assert checked > 20


@pytest.mark.parametrize("until", ["</think>", "so"])
def test_rows_of_a_batch_are_written_as_one_by_one(until, generator, tiny_text, text_inputs):
    """Segments that close at different steps, a row without control beside them."""
    lenvm, prompts = counting_to(until), prompts_of(text_inputs)
    controls = [AtMost(9, until=until), None, EqualTo(14, until=until), Gated(AtMost(7, until=until), 0.0, 0.1)]
    settings = {"max_tokens": 30, "tokenizer": tiny_text}
    batch = generate(generator, lenvm, prompts, control=controls, seed=[1, 2, 3, 4], **settings)
    for row, completion in enumerate(batch):
        [alone] = generate(generator, lenvm, prompts[row : row + 1], control=controls[row], seed=row + 1, **settings)
        assert alone.token_ids == completion.token_ids
    unguided = generate(generator, None, prompts[1:2], seed=2, **settings)
    assert unguided[0].token_ids == batch[1].token_ids


def test_a_segment_of_a_length_ends_near_it(generator, tiny_text, text_inputs):
    completions = generate(
        generator, counting_to("so"), text_inputs, control=EqualTo(20, until="so"), n=3, max_tokens=40, seed=0,
        tokenizer=tiny_text,
    )  # fmt: skip
    lengths = [tokens_until(one.token_ids, "so", tiny_text) or len(one.token_ids) for one in completions]
    assert all(18 <= length <= 21 for length in lengths)


def test_a_stream_says_the_same_and_what_remains_of_the_segment(generator, tiny_text, text_inputs):
    [prompt] = prompts_of(text_inputs)[1:2]
    lenvm = counting_to("</think>")
    settings = {"control": AtMost(8, low=0.7, until="</think>"), "max_tokens": 20, "seed": 1, "tokenizer": tiny_text}
    [whole] = generate(generator, lenvm, [prompt], trace=True, **settings)
    pieces = list(stream(generator, lenvm, [prompt], **settings))
    assert [piece.token_id for piece in pieces] == whole.token_ids
    length = tokens_until(whole.token_ids, "</think>", tiny_text)
    assert length == 8 < len(whole.token_ids)
    assert all(piece.remaining > 0 for piece in pieces[: length - 1])
    assert all(piece.remaining == 0 for piece in pieces[length - 1 :])
    assert all(step.candidates for step in whole.trace[length - 5 : length])  # the text was brought in, token by token
    assert not any(step.candidates for step in whole.trace[length:])
    last = whole.trace[length - 1]
    assert last.remaining_after[last.candidates.index(last.token_id)] == 0


def test_an_end_before_the_segment_does_not_come_by_the_pull_of_a_control(tiny_text, text_inputs):
    """An end of everything is what is shortest: without care a control would take it where it is hardly likely."""
    generator = build("tiny-text", torch.float64, eos_bias=1.0)
    prompt = prompts_of(text_inputs)[1:2]
    settings = {"n": 24, "max_tokens": 12, "tokenizer": tiny_text, "top_k": 0, "seed": 0}
    completions = generate(generator, counting_to("</think>"), prompt, control=AtMost(12, until="</think>"), **settings)
    with torch.no_grad():
        for one in completions:
            if one.token_ids[-1] == END:
                before = generator(torch.tensor([[*prompt[0], *one.token_ids[:-1]]])).logits[0, -1]
                assert before.argmax() == END
    assert sum("</think>" in tiny_text.decode(one.token_ids) for one in completions) > 12


def test_controls_and_value_models_of_other_ends_are_refused_before_anything_is_written(generator, tiny_text):
    whole, segment = value_model("tiny-text"), counting_to("</think>")

    def refused(lenvm, control, tokenizer=tiny_text):
        with pytest.raises(GenerationError) as error:
            generate(generator, lenvm, [[5, 6]], control=control, tokenizer=tokenizer)
        return str(error.value)

    assert "counts to '</think>', and the length value model to the end of the completion" in refused(
        whole, AtMost(64, until="</think>")
    )
    assert "train one with fit.data.init_args.until: '</think>'" in refused(whole, AtMost(64, until="</think>"))
    for control in (AtMost(64), Tilt(-3), AtLeast(9), Gated(EqualTo(9))):
        told = refused(segment, control)
        assert "counts to the end of the completion, and the length value model to '</think>'" in told
        assert "at-most:N:until=TEXT" in told
    assert "'\\n\\n'" in refused(segment, EqualTo(64, until="\n\n"))
    assert "needs tokenizer" in refused(segment, AtMost(64, until="</think>"), tokenizer=None)
    assert "takes 5 tokens; raise n" in refused(segment, AtMost(4, until="</think>"))
    assert why_not_until(None, "</think>", None) is None


def test_the_hook_of_transformers_ends_segments_where_it_has_a_tokenizer(generator, tiny_text, text_inputs):
    lenvm, control = counting_to("</think>"), AtMost(8, until="</think>")
    options = {"do_sample": True, "top_k": 15, "max_new_tokens": 12, "pad_token_id": 0}
    sequences = generator.generate(**text_inputs, **options, custom_generate=guided(lenvm, control, None, tiny_text))
    for row in sequences[:, text_inputs["input_ids"].shape[1] :].tolist():
        assert tokens_until(row, "</think>", tiny_text) is not None or END in row[:8]
    with pytest.raises(GenerationError, match="needs tokenizer"):
        generator.generate(**text_inputs, **options, custom_generate=guided(lenvm, control))
