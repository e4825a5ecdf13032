"""Segments through the server, with the value model that ships taken for one that counts to the end of a sentence."""

import dataclasses

import openai
import pytest
from served import SEA, chat, generator_of, serving

from lenvm_lightning.decoding.generate import generate
from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.decoding.segments import tokens_until
from lenvm_lightning.errors import GenerationError
from lenvm_lightning.guidance import AtMost
from lenvm_lightning.rollouts.generators.interface import Prompt, PromptRequest
from lenvm_lightning.rollouts.prompting import encode_prompt


@pytest.fixture(scope="module")
def generator():
    generator = generator_of()
    generator.lenvm.config = dataclasses.replace(generator.lenvm.config, until=".")
    return generator


@pytest.fixture(scope="module")
def server(generator):
    with serving(generator) as server:
        yield server


def test_a_request_ends_its_segment_and_goes_on(server, generator):
    answer = chat(server, lenvm="at-most:6:until=.", seed=7, n=4)
    ids, _ = encode_prompt(generator.processor, SEA, [])
    settings = {"control": AtMost(6, until="."), "n": 4, "seed": 7, "tokenizer": generator.tokenizer}
    same = generate(generator.model, generator.lenvm, [ids], **settings)
    texts = [generator.tokenizer.decode(one.token_ids, skip_special_tokens=True) for one in same]
    assert [choice.message.content for choice in answer.choices] == texts
    for one in same:
        assert tokens_until(one.token_ids, ".", generator.tokenizer) <= 6
        assert len(one.token_ids) > 20  # and what follows is as long as it likes
    # What is expected is said of whole answers, and this value model knows nothing of them.
    assert "expected_completion_tokens" not in answer.usage.model_extra


def test_a_stream_of_a_segment(server):
    settings = {"lenvm": "at-most:6:until=.", "seed": 7}
    whole = chat(server, **settings).choices[0].message.content
    pieces = [piece.choices[0] for piece in chat(server, stream=True, **settings) if piece.choices]
    assert "".join(piece.delta.content or "" for piece in pieces) == whole
    assert pieces[-1].lenvm["remaining_tokens"] == 0


@pytest.mark.parametrize("control", ["at-most:64", "tilt:-5", "at-most:64:until=!", "at-least:3:until=."])
def test_a_control_of_something_else_is_refused(server, control):
    with pytest.raises(openai.BadRequestError, match=r"counts to|ends a segment"):
        chat(server, lenvm=control)


def test_a_server_of_whole_lengths_refuses_segments(tiny_server):
    with pytest.raises(openai.BadRequestError, match=r"train one with fit\.data.init_args\.until"):
        chat(tiny_server, lenvm="at-most:64:until=.")


def test_the_local_generator_refuses_them_before_it_writes(generator):
    request = PromptRequest(Prompt("1", SEA), (0,), AtMost(64))
    with pytest.raises(GenerationError, match="counts to the end of the completion"):
        list(generator.sample([request], SamplingParams(max_tokens=4)))
