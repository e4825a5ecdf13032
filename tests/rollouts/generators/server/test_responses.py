"""What is asked, and what is made of the responses."""

import json

import pytest
from scripted_server import generator, said, sample

from lenvm_lightning.decoding.sampling_params import SamplingParams, completion_seed
from lenvm_lightning.errors import GeneratorError
from lenvm_lightning.rollouts.generators.interface import Failure, GeneratedText


def test_every_completion_is_asked_for_once_with_its_own_seed(server, tiny_text):
    server.act = lambda body, attempt: said(f"Text of {body['seed']}")
    answers = sample(server, 5, n=3)
    assert sorted((a.prompt_id, a.number) for a in answers) == [(f"p{i}", k) for i in range(5) for k in range(3)]
    for answer in answers:
        seed = completion_seed(5, answer.prompt_id, answer.number)
        text = f"Text of {seed}"
        ids = [*tiny_text(text)["input_ids"], tiny_text.eos_token_id]
        assert answer.result == GeneratedText(text, ids, "stop", None, seed, reencoded=True)
    assert len(server.bodies) == 15
    assert {body["model"] for body in server.bodies} == {"m"}
    one = next(body for body in server.bodies if body["seed"] == completion_seed(5, "p2", 1))
    assert one["messages"] == [{"role": "user", "content": "2?"}]


def test_a_truncated_completion_gets_no_end(server, tiny_text):
    server.act = lambda body, attempt: said("One two", "length")
    assert sample(server)[0].result.token_ids == tiny_text("One two")["input_ids"]


def test_a_truncated_completion_without_text_is_no_completion(server, tiny_text):
    """Such as one of special tokens alone."""
    server.act = lambda body, attempt: said("", "length", tokens=32)
    assert sample(server)[0].result == Failure("there is no text to make tokens of", final=True)
    server.act = lambda body, attempt: said("", tokens=1)
    assert sample(server)[0].result.token_ids == [tiny_text.eos_token_id]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("other", {"max_tokens": 32}),
        ("openai", {"max_completion_tokens": 32}),
        ("llamacpp", {"max_tokens": 32, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}),
        (
            "sglang",
            {"max_completion_tokens": 32, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
             "return_token_ids": True, "separate_reasoning": False},
        ),
        (
            "vllm",
            {"max_completion_tokens": 32, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "logprobs": True,
             "return_token_ids": True, "return_tokens_as_token_ids": True},
        ),
    ],
)  # fmt: skip
def test_each_kind_of_server_is_told_all_it_understands(server, kind, expected):
    """Or it would use defaults of its own. SGLang's log-probabilities are after temperature: not asked for at 0.7."""
    sample(server, server=kind)
    body = server.bodies[0]
    for name in ("messages", "model", "seed"):
        del body[name]
    assert body == {"temperature": 0.7, "top_p": 0.9, **expected}


def test_truncation_is_passed_on(server):
    sampling = SamplingParams(top_k=15, min_p=0.01, max_tokens=32)
    for kind in ("vllm", "sglang", "llamacpp", "other"):
        sample(server, server=kind, sampling=sampling)
        assert (server.bodies[-1]["top_k"], server.bodies[-1]["min_p"]) == (15, 0.01)
    sample(server, server="sglang", sampling=sampling)
    assert server.bodies[-1]["logprobs"] is True
    sample(server, server="transformers", sampling=sampling)
    config = json.loads(server.bodies[-1]["generation_config"])
    assert (config["do_sample"], config["top_k"], config["min_p"]) == (True, 15, 0.01)
    sample(server, server="transformers", sampling=SamplingParams(temperature=0.0, max_tokens=32))
    assert json.loads(server.bodies[-1]["generation_config"])["do_sample"] is False
    with pytest.raises(GeneratorError, match=r"know neither top_k \(here 15\)"):
        sample(server, server="openai", sampling=sampling)


def test_ids_and_logprobs_of_the_server_are_used_as_they_are(server):
    steps = [("token_id:7", -0.5), ("token_id:8", -0.25), ("token_id:2", -0.125)]
    server.act = lambda body, attempt: said("ab", logprobs=steps, token_ids=[7, 8, 2])
    result = sample(server, server="vllm", processor=None)[0].result
    assert (result.token_ids, result.reencoded, result.logprob) == ([7, 8, 2], False, -0.875)
    server.act = lambda body, attempt: said("ab", logprobs=steps)  # as older versions say it
    assert sample(server, server="vllm", processor=None)[0].result == result


def test_logprobs_that_do_not_belong_to_the_ids_are_left_out(server):
    server.act = lambda body, attempt: said("Four.", logprobs=[("Four", -1.0)])
    assert sample(server, logprobs=True)[0].result.logprob is None
    assert server.bodies[0]["logprobs"] is True


def test_text_alone_is_not_enough_without_a_tokenizer(server):
    with pytest.raises(GeneratorError, match=r"text without token ids.*processor"):
        sample(server, server="vllm", processor=None)
    with pytest.raises(GeneratorError, match=r"kind 'other' returns text only.*none in 'm'"):
        generator(server, processor=None)


def test_reasoning_counts_where_its_ids_are_known_and_is_refused_where_not(server):
    message = {"role": "assistant", "content": "4", "reasoning_content": "2+2 = "}
    server.act = lambda body, attempt: said(message=message, token_ids=[5, 6, 7, 2])
    assert sample(server, server="sglang")[0].result.text == "2+2 = 4"
    server.act = lambda body, attempt: said(message=message)
    assert "reasoning" in sample(server)[0].result.reason


@pytest.mark.parametrize("kind", ["other", "openai", "llamacpp", "sglang", "vllm", "transformers"])
def test_stop_texts_are_sent_to_every_kind_of_server(server, kind):
    stopping = SamplingParams(max_tokens=32, stop=("\n\n", "END"))
    sample(server, server=kind, sampling=stopping)
    body = server.bodies[-1]
    assert body["stop"] == ["\n\n", "END"]
    kept = {"vllm": "include_stop_str_in_output", "sglang": "no_stop_trim"}
    assert body.keys() & set(kept.values()) == ({kept[kind]} if kind in kept else set())
    assert all(body[name] is True for name in body.keys() & set(kept.values()))
    sample(server, server=kind, sampling=SamplingParams(max_tokens=32))
    assert not server.bodies[-1].keys() & {"stop", *kept.values()}


@pytest.mark.parametrize(
    ("text", "extra", "ended_by_token"),
    [
        ("Four. END", {}, False),  # left in its place
        ("Four. ENDING", {}, False),  # with the rest of its token, as by transformers serve
        ("Four. ", {"stop_reason": "END"}, False),  # vLLM
        ("Four. ", {"matched_stop": "END"}, False),  # SGLang
        ("Four. ", {"stop_reason": None}, True),
        ("Four. ", {"matched_stop": 2}, True),
        ("Four. ", {}, True),  # nobody says: it ends where it was stopped
    ],
)
def test_a_stop_text_is_no_end_token(server, tiny_text, text, extra, ended_by_token):
    server.act = lambda body, attempt: said(text, **extra)
    result = sample(server, sampling=SamplingParams(max_tokens=32, stop=("END",)))[0].result
    end = [tiny_text.eos_token_id] if ended_by_token else []
    assert (result.token_ids, result.finish_reason) == ([*tiny_text(text)["input_ids"], *end], "stop")


@pytest.mark.parametrize("reason", ["content_filter", "tool_calls"])
def test_other_ends_are_failures(server, reason):
    server.act = lambda body, attempt: said(finish=reason)
    result = sample(server)[0].result
    assert isinstance(result, Failure)
    assert result.final
    assert reason in result.reason


def test_a_server_that_ignores_the_limit_is_noticed(server):
    server.act = lambda body, attempt: said(tokens=33)
    assert sample(server)[0].result == Failure("33 tokens written, more than max_tokens 32", final=True)


def test_differing_counts_are_reported_once(server, tiny_text, caplog):
    real = len(tiny_text("Four.")["input_ids"]) + 1
    server.act = lambda body, attempt: said(tokens=real + 2 if "1" in body["messages"][0]["content"] else real)
    assert all(isinstance(a.result, GeneratedText) for a in sample(server, 3))
    (message,) = [r.getMessage() for r in caplog.records if "text only" in r.getMessage()]
    assert "in 1 of 3 completions (by -2.0 on average)" in message
