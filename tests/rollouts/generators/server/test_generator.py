"""Our client against a real socket: what it asks for, what it counts, and the key."""

import json
import logging
import pickle
import socket
from dataclasses import replace

import pytest
from scripted_server import SAMPLING, Response, generator, prompts, said, sample

from lenvm_lightning.decoding.sampling_params import completion_seed
from lenvm_lightning.errors import GeneratorError
from lenvm_lightning.rollouts.generators.interface import GeneratedText
from lenvm_lightning.rollouts.generators.server import ServerGenerator


def test_tokens_written_are_those_of_all_completions(server):
    server.act = lambda body, attempt: said(token_ids=[5, 6, 2])
    made = generator(server, server="vllm", processor=None)
    assert made.tokens_written == 0
    list(made.sample(prompts(4, n=2), SAMPLING))
    assert made.tokens_written == 24


KEY = "sk-very-secret-0123456789"


def test_the_key_goes_into_the_requests_and_nowhere_else(server, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("MY_KEY", f"{KEY}\n")  # as files with keys end
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    caplog.set_level(logging.DEBUG)

    def act(body, attempt):
        echo = Response({"error": {"message": f"who is {KEY}?"}}, 400 if "0?" in str(body) else 500)
        return echo if "0?" in str(body) or "1?" in str(body) else said()

    server.act = act
    made = generator(server, model=None, server="auto", api_key_env="MY_KEY", retries=1)
    answers = list(made.sample(prompts(4), SAMPLING))
    server.act = lambda body, attempt: Response({"error": {"message": f"wrong key {KEY}"}}, 401)
    with pytest.raises(GeneratorError) as refused:
        list(made.sample(prompts(1), SAMPLING))
    sent = [headers["authorization"] for headers in server.seen_headers if "authorization" in headers]
    assert len(sent) > len(server.bodies)
    assert set(sent) == {f"Bearer {KEY}"}
    left = [repr(made), repr(vars(made)), json.dumps(made.fingerprint()), made.name, repr(answers), repr(refused.value)]
    left += [record.getMessage() + repr(vars(record)) for record in caplog.records]
    left += [repr(pickle.dumps(answers))]
    assert "who is ***?" in left[4]
    assert "wrong key ***" in left[5]
    assert not [text for text in left if KEY in text or "secret" in text]


def test_no_other_key_is_sent_than_the_one_named(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    sample(server, api_key_env="NOT_SET_ANYWHERE")
    assert KEY not in str(server.seen_headers)


def test_a_password_in_the_address_is_not_repeated():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with pytest.raises(GeneratorError, match=r"no server answers at http://127\.0\.0\.1") as refused:
            ServerGenerator(f"http://me:hunter2@127.0.0.1:{nobody.getsockname()[1]}")
    assert "hunter2" not in str(refused.value)


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


def test_a_setting_that_no_request_can_carry_is_told(server):
    with pytest.raises(GeneratorError, match="no request can carry"):
        list(generator(server).sample(prompts(1), replace(SAMPLING, stop=("half \udc80",))))
