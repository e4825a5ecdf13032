"""Kinds of servers: how each is told to sample, and how they are told apart."""

import json

import pytest
from scripted_server import Response, models, sample

from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.errors import GeneratorError
from lenvm_lightning.rollouts.generators.server.backends import BACKENDS, find_backend


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("other", {"max_tokens": 32}),
        ("openai", {"max_completion_tokens": 32}),
        ("llamacpp", {"max_tokens": 32, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "logprobs": True}),
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


def test_the_kind_of_server_is_found_out(server):
    for owner in ("vllm", "sglang", "llamacpp"):
        server.pages["/v1/models"] = models(("m", owner))
        sample(server, server="auto")
        assert set(server.bodies[-1]) >= {"top_k", "min_p"}
    server.pages["/v1/models"] = Response(b"Internal Server Error", 500)
    server.pages["/openapi.json"] = Response({"paths": {"/load_model": {}}})
    sample(server, server="auto")
    assert "generation_config" in server.bodies[-1]
    assert find_backend("auto", "api.openai.com", ["system"], set) is BACKENDS["openai"]
    assert find_backend("auto", "notopenai.com", ["openai"], set) is BACKENDS["other"]
