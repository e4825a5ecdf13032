"""Replies that are no completions, of every kind: one completion fails or is tried again, the others go on."""

import json

import pytest
from scripted_server import Response, ScriptedServer, generator, models, prompts, said

from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.errors import GeneratorError
from lenvm_lightning.rollouts.generators.interface import Failure, GeneratedText
from lenvm_lightning.rollouts.generators.server.reply import Completion, ModelList, UnusableResponse, read_reply

SAMPLING = SamplingParams(max_tokens=64)
GOOD = said("Four.", token_ids=[7, 2]).body


@pytest.fixture(scope="module")
def server():
    server = ScriptedServer()
    yield server
    server.stop()


def changed(place, value):
    """The good reply with one thing changed, such as ``choices.0.message.content``; without it where it is Ellipsis."""
    body = json.loads(json.dumps(GOOD))
    *way, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    inner = body
    for part in way:
        if inner[part] is None:
            inner[part] = {}
        inner = inner[part]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return body


def step(**entries):
    return {"content": [{"token": "a", "logprob": -0.5, **entries}, {"token": "b", "logprob": -0.5}]}


def raw(text):
    """The good reply with a value that Python's writer would not write."""
    return json.dumps(changed("choices.0.message.content", "HERE")).replace('"HERE"', text).encode()


DEEP = b"[" * 100_000 + b"]" * 100_000
MALFORMED = {
    # bodies that are no JSON object
    "empty": b"",
    "blanks": b"  \n",
    "null": b"null",
    "true": b"true",
    "a number": b"5",
    "a huge number": b"9" * 6000,
    "a string": b'"Four."',
    "a list": b"[]",
    "a list of replies": json.dumps([GOOD]).encode(),
    "nested lists": b"[[[[]]]]",
    "deep lists": DEEP,
    "deep objects": b'{"choices":' * 50_000 + b"1" + b"}" * 50_000,
    "HTML": b"<html><body>502 Bad Gateway</body></html>",
    "text": b"Internal Server Error",
    "an event stream": b"data: " + json.dumps(GOOD).encode() + b"\n\ndata: [DONE]\n",
    "truncated": json.dumps(GOOD).encode()[:-20],
    "two replies": json.dumps(GOOD).encode() * 2,
    "no UTF-8": b'{"choices": "\xff\xfe"}',
    "UTF-16": json.dumps(GOOD).encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
    "zeros": b"\0" * 100,
    "an error with status 200": {"error": {"message": "out of memory", "code": 500}},
    "nothing": {},
    # choices
    "choices missing": changed("choices", ...),
    "choices null": changed("choices", None),
    "choices {}": changed("choices", {}),
    "choices a string": changed("choices", "Four."),
    "choices a number": changed("choices", 1),
    "choices []": changed("choices", []),
    "choices [null]": changed("choices", [None]),
    "choices [[]]": changed("choices", [[]]),
    "choices [5]": changed("choices", [5]),
    "choices of strings": changed("choices", ["Four."]),
    "choices of many wrong": changed("choices", ["x"] * 50_000),
    "choices deep": b'{"choices":' + DEEP + b"}",
    "choices by number": changed("choices", {"0": GOOD["choices"][0]}),
    # messages
    "message missing": changed("choices.0.message", ...),
    "message null": changed("choices.0.message", None),
    "message a string": changed("choices.0.message", "Four."),
    "message a list": changed("choices.0.message", [{"content": "Four."}]),
    "content a list": changed("choices.0.message.content", [{"type": "text", "text": "Four."}]),
    "content a number": changed("choices.0.message.content", 4),
    "content an object": changed("choices.0.message.content", {"text": "Four."}),
    "content false": changed("choices.0.message.content", False),
    "content with half a character": raw('"a \\ud800 b"'),
    "content NaN": raw("NaN"),
    "reasoning a list": changed("choices.0.message.reasoning", ["2+2"]),
    "reasoning_content a number": changed("choices.0.message.reasoning_content", 4),
    # ends
    "finish_reason missing": changed("choices.0.finish_reason", ...),
    "finish_reason a number": changed("choices.0.finish_reason", 1),
    "finish_reason a list": changed("choices.0.finish_reason", ["stop"]),
    "finish_reason an object": changed("choices.0.finish_reason", {"type": "stop"}),
    "finish_reason escapes": changed("choices.0.finish_reason", "\x1b]0;owned\x07\x1b[31m" * 1000),
    # token ids
    "ids a string": changed("choices.0.token_ids", "7, 2"),
    "ids an object": changed("choices.0.token_ids", {"0": 7}),
    "ids a number": changed("choices.0.token_ids", 7),
    "ids strings": changed("choices.0.token_ids", ["7", "2"]),
    "ids halves": changed("choices.0.token_ids", [7.5, 2]),
    "ids true": changed("choices.0.token_ids", [True, 2]),
    "ids null": changed("choices.0.token_ids", [None, 2]),
    "ids nested": changed("choices.0.token_ids", [[7, 2]]),
    "ids negative": changed("choices.0.token_ids", [-5]),
    "ids huge": changed("choices.0.token_ids", [2**70]),
    "ids of 33 bits": changed("choices.0.token_ids", [2**32]),
    "ids beyond the vocabulary": changed("choices.0.token_ids", [2048]),
    "ids with thousands of digits": raw('"x"').replace(b"[7, 2]", b"[" + b"9" * 5000 + b"]"),
    "100,000 ids": changed("choices.0.token_ids", [7] * 100_000),
    "many wrong ids": changed("choices.0.token_ids", ["x"] * 100_000),
    # log-probabilities
    "logprobs a list": changed("choices.0.logprobs", [-0.5]),
    "logprobs a string": changed("choices.0.logprobs", "-0.5"),
    "logprobs content an object": changed("choices.0.logprobs", {"content": {"a": -0.5}}),
    "logprobs content of numbers": changed("choices.0.logprobs", {"content": [-0.5, -0.5]}),
    "logprob missing": changed("choices.0.logprobs", {"content": [{"token": "a"}, {"token": "b"}]}),
    "logprob null": changed("choices.0.logprobs", step(logprob=None)),
    "logprob a string": changed("choices.0.logprobs", step(logprob="-0.5")),
    "logprob a list": changed("choices.0.logprobs", step(logprob=[-0.5])),
    "logprob 1e308": changed("choices.0.logprobs", step(logprob=1e308)),
    "logprob -1e308": changed("choices.0.logprobs", step(logprob=-1e308)),
    "logprob above 0": changed("choices.0.logprobs", step(logprob=3.0)),
    "logprob NaN": changed("choices.0.logprobs", step(logprob=float("nan"))),
    "logprob -Infinity": changed("choices.0.logprobs", step(logprob=float("-inf"))),
    "logprob 1e999": json.dumps(changed("choices.0.logprobs", step(logprob=7777))).replace("7777", "1e999").encode(),
    "logprob a huge number": changed("choices.0.logprobs", step(logprob=-(10**400))),
    "token a number": changed("choices.0.logprobs", step(token=5)),
    "token null": changed("choices.0.logprobs", step(token=None)),
    "ids as tokens that are none": {
        **GOOD,
        "choices": [
            {
                **{key: value for key, value in GOOD["choices"][0].items() if key != "token_ids"},
                "logprobs": {"content": [{"token": "token_id:x", "logprob": -0.5}]},
            }
        ],
    },
    # counts
    "usage a list": changed("usage", [2]),
    "usage a string": changed("usage", "2"),
    "usage a number": changed("usage", 2),
    "count a string": changed("usage.completion_tokens", "2"),
    "count a list": changed("usage.completion_tokens", [2]),
    "count an object": changed("usage.completion_tokens", {}),
    "count negative": changed("usage.completion_tokens", -2),
    "count half": changed("usage.completion_tokens", 1.5),
    "count true": changed("usage.completion_tokens", True),
    "count huge": changed("usage.completion_tokens", 10**400),
}
FINAL = {"finish_reason escapes", "100,000 ids", "count huge"}  # the same each time: not asked for again


@pytest.fixture(scope="module")
def made(server):
    return generator(server, server="vllm", processor="tiny-text", retries=1, backoff=0.001)


def test_there_are_enough_of_them():
    assert len(MALFORMED) >= 60


def test_a_malformed_reply_costs_one_completion_at_most(server, made):
    """All of them in one run: every second prompt gets a good reply, the others theirs, each time they ask."""
    names = list(MALFORMED)

    def act(asked, attempt):
        number = int(asked["messages"][0]["content"].removesuffix("?"))
        return Response(GOOD if number % 2 else MALFORMED[names[number // 2]])

    server.act = act
    server.bodies.clear()
    results = {answer.prompt_id: answer.result for answer in made.sample(prompts(2 * len(names)), SAMPLING)}
    for number, name in enumerate(names):
        failed = results.pop(f"p{2 * number}")
        assert isinstance(failed, Failure), name
        assert failed.final == (name in FINAL), name
        assert failed.reason.isprintable(), name
        assert len(failed.reason) < 1000, name
    assert [result.token_ids for result in results.values()] == [[7, 2]] * len(names)
    assert len(server.bodies) == 3 * len(names) - len(FINAL)


def test_what_passes_is_tried_again_and_kept(server, made):
    server.bodies.clear()
    wrong = [body for name, body in MALFORMED.items() if name not in FINAL]
    server.act = lambda asked, attempt: Response(
        GOOD if attempt else wrong[int(asked["messages"][0]["content"].removesuffix("?"))]
    )
    results = [answer.result for answer in made.sample(prompts(len(wrong)), SAMPLING)]
    assert len(results) == len(wrong)
    assert all(isinstance(result, GeneratedText) and result.token_ids == [7, 2] for result in results)
    assert len(server.bodies) == 2 * len(wrong)


def test_things_that_nobody_asked_for_may_be_anything(server, made):
    body = changed("choices.0.message.tool_calls", "none")
    body |= {"id": 5, "created": "yesterday", "model": None, "system_fingerprint": [], "service_tier": {"a": 1}}
    body["choices"][0] |= {"index": "first", "stop_reason": 2, "seed": "x"}
    server.act = lambda asked, attempt: Response(body, headers={"Content-Type": "text/html; charset=hex"})
    assert next(made.sample(prompts(1), SAMPLING)).result.token_ids == [7, 2]


def test_the_place_of_a_mistake_is_named():
    with pytest.raises(
        UnusableResponse, match=r"choices\.0\.message\.content: Input should be a valid string"
    ) as error:
        read_reply(Completion, json.dumps(changed("choices.0.message.content", [])).encode())
    assert error.value.begin == ""  # of the right kind
    with pytest.raises(UnusableResponse, match="not JSON") as error:
        read_reply(Completion, b"<html>")
    assert error.value.begin == "<html>"
    with pytest.raises(UnusableResponse, match="cannot be read: it is nested too deeply"):
        read_reply(Completion, DEEP)


LISTS = {
    "nonsense": {"data": "m"},
    "cards that are none": {"data": ["m"]},
    "a number": {"data": [{"id": 5}]},
    "no list": [],
    "no JSON": b"<html>",
    "deep": DEEP,
    "no UTF-8": b'{"data": [{"id": "\xff"}]}',
    "nothing": {},
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_models_that_is_none_is_told_and_does_without_where_the_model_is_named(server, name):
    pages = server.pages
    server.pages = dict.fromkeys(("/v1/models", "/openapi.json"), Response(LISTS[name]))
    try:
        with pytest.raises(GeneratorError, match=r"does not say which one it serves.*Name it"):
            generator(server, model=None, server="vllm")
        assert generator(server, server="auto").name == "m"
    finally:
        server.pages = pages


@pytest.mark.parametrize("name", ["\x1b[31mred", "", " ", "a\nb", "x" * 1000, "\u202eabc"])
def test_a_model_whose_name_would_do_harm_is_not_taken(server, name):
    pages = server.pages
    server.pages = {"/v1/models": models((name, "vllm"))}
    try:
        with pytest.raises(GeneratorError, match=r"is called .* which is no name") as error:
            generator(server, model=None, server="vllm", processor=None)
        assert str(error.value).isprintable()
    finally:
        server.pages = pages


def test_a_list_may_have_what_it_likes_beside_the_names():
    assert read_reply(ModelList, b'{"data": [{"id": "m", "created": "x"}], "object": 3}').data[0].id == "m"
