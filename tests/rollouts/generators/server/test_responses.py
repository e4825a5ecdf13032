"""What is made of the responses."""

import pytest
from scripted_server import generator, said, sample

from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.errors import GeneratorError
from lenvm_lightning.rollouts.generators.interface import Failure, GeneratedText


def test_a_truncated_completion_gets_no_end(server, tiny_text):
    server.act = lambda body, attempt: said("One two", "length")
    assert sample(server)[0].result.token_ids == tiny_text("One two")["input_ids"]


def test_a_truncated_completion_without_text_is_no_completion(server, tiny_text):
    """Such as one of special tokens alone."""
    server.act = lambda body, attempt: said("", "length", tokens=32)
    assert sample(server)[0].result == Failure("there is no text to make tokens of", final=True)
    server.act = lambda body, attempt: said("", tokens=1)
    assert sample(server)[0].result.token_ids == [tiny_text.eos_token_id]


def test_ids_and_logprobs_of_the_server_are_used_as_they_are(server):
    steps = [("token_id:7", -0.5), ("token_id:8", -0.25), ("token_id:2", -0.125)]
    server.act = lambda body, attempt: said("ab", logprobs=steps, token_ids=[7, 8, 2])
    result = sample(server, server="vllm", processor=None)[0].result
    assert (result.token_ids, result.reencoded, result.logprob) == ([7, 8, 2], False, -0.875)
    server.act = lambda body, attempt: said("ab", logprobs=steps)  # as older versions say it
    assert sample(server, server="vllm", processor=None)[0].result == result


def test_ids_beside_logprobs_as_llama_cpp_tells_them(server):
    steps = [("Fo", -0.5, 7), ("ur.", -0.25, 8), ("", -0.125, 2)]
    server.act = lambda body, attempt: said("Four.", logprobs=steps)
    result = sample(server, server="llamacpp")[0].result
    assert (result.token_ids, result.reencoded, result.logprob) == ([7, 8, 2], False, -0.875)
    assert server.bodies[-1]["logprobs"] is True
    server.act = lambda body, attempt: said("Four.", logprobs=[*steps[:2], ("", -0.125)])
    assert sample(server, server="llamacpp")[0].result.reencoded


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
