"""What clients may send: controls by either name, fields that mean nothing here, images that come along."""

import base64

import pytest
from pydantic import ValidationError

from lenvm_lightning.guidance import AtMost, EqualTo
from lenvm_lightning.serving.requests import ChatRequest, CompletionRequest, LengthsRequest

MESSAGES = [{"role": "user", "content": "Hello"}]


def chat(**fields):
    return ChatRequest(messages=MESSAGES, **fields)


def test_a_control_by_either_name():
    assert chat().control() is None
    assert chat(lenvm="equal-to:64").control() == EqualTo(64)
    assert chat(vllm_xargs={"lenvm": "at-most:64"}).control() == AtMost(64)
    assert chat(lenvm="none").control() is None
    with pytest.raises(ValueError, match="give one of them"):
        chat(lenvm="equal-to:64", vllm_xargs={"lenvm": "at-most:64"}).control()
    with pytest.raises(ValueError, match="did you mean 'equal-to'"):
        chat(lenvm="equals-to:64").control()
    with pytest.raises(ValueError, match="must be a text"):
        chat(vllm_xargs={"lenvm": 64}).control()


def test_guided_answers_are_sampled_as_generate_does_and_others_as_the_protocol_says():
    assert chat().sampling(9, guided=False).truncation == (1.0, 0, 1.0, 0.0)
    assert chat().sampling(9, guided=True).truncation == (1.0, 15, 0.999, 0.0)
    given = chat(temperature=0, top_k=-1, top_p=0.5, min_p=0.1, stop="x", seed=3).sampling(9, guided=True)
    assert (given.truncation, given.stop, given.seed, given.max_tokens) == ((0.0, 0, 0.5, 0.1), ("x",), 3, 9)


@pytest.mark.parametrize(
    "field",
    [
        {"tools": [{"type": "function"}]},
        {"logit_bias": {"5": 1}},
        {"best_of": 2},
        {"response_format": {"type": "json_object"}},
        {"presence_penalty": 0.5},
    ],
)
def test_what_would_change_an_answer_and_means_nothing_here_is_refused(field):
    with pytest.raises(ValidationError, match=f"{next(iter(field))}: this server does not do that"):
        chat(**field)


def test_what_changes_no_answer_is_ignored():
    chat(user="me", metadata={}, tools=[], logit_bias=None, frequency_penalty=0.0, response_format={"type": "text"})


def test_images_come_with_the_request_and_nothing_is_fetched():
    def message(url):
        part = {"type": "image_url", "image_url": {"url": url}}
        return ChatRequest(messages=[{"role": "user", "content": [part, {"type": "text", "text": "What? <image>"}]}])

    images = []
    content = base64.b64encode(b"some bytes").decode()
    read = message(f"data:image/png;base64,{content}").messages[0].read(images)
    assert read["content"].count("<image>") == 1  # what the text says of images is no image
    assert images == [b"some bytes"]
    for url in ("http://169.254.169.254/latest", "file:///etc/passwd", "data:text/html;base64,PGI+", "/etc/passwd"):
        with pytest.raises(ValueError, match="this server fetches nothing"):
            message(url).messages[0].read([])
    with pytest.raises(ValueError, match="is not base64"):
        message("data:image/png;base64,!").messages[0].read([])


def test_prompts_of_all_four_forms():
    assert CompletionRequest(prompt="a").prompts == ["a"]
    assert CompletionRequest(prompt=["a", "b"]).prompts == ["a", "b"]
    assert CompletionRequest(prompt=[1, 2]).prompts == [[1, 2]]
    assert CompletionRequest(prompt=[[1, 2], [3]]).prompts == [[1, 2], [3]]
    for wrong in ([], [[]], [-1], [2**40], 5, {"a": 1}):
        with pytest.raises(ValidationError):
            CompletionRequest(prompt=wrong)


def test_lengths_are_asked_in_one_way():
    for wrong in (
        {},
        {"prompts": []},
        {"prompts": ["a"], "messages": MESSAGES},
        {"prompts": ["a", "b"], "completion": "c"},
    ):
        with pytest.raises(ValidationError):
            LengthsRequest(**wrong)
