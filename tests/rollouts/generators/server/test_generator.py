"""Our client against a real socket: many completions, few, stopping, and the key."""

import asyncio
import json
import logging
import os
import pickle
import signal
import socket
import threading
import time
from itertools import count

import pytest
from scripted_server import SAMPLING, Response, generator, prompts, said, sample

from lenvm_lightning.errors import GeneratorError
from lenvm_lightning.rollouts.generators.interface import Prompt, PromptRequest
from lenvm_lightning.rollouts.generators.server import ServerGenerator


def test_memory_does_not_grow_with_the_prompts(server):
    pulled = count()
    taken = 0

    def endless():
        for i in pulled:
            yield PromptRequest(Prompt(f"p{i}", [{"role": "user", "content": "?"}]), (0, 1))

    server.act = lambda body, attempt: Response(said().body, wait=0.005)
    answers = generator(server, concurrency=8).sample(endless(), SAMPLING)
    for _ in range(100):
        next(answers)
        taken += 1
    assert next(pulled) <= (taken + 2 * 8) / 2 + 2
    assert 4 <= server.most_under_way <= 8
    answers.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "server-generator"]


def test_stopping_does_not_wait_for_slow_answers(server):
    def act(body, attempt):
        return Response(said().body, wait=0.0 if body["messages"][0]["content"] == "0?" else 3.0)

    server.act = act
    answers = generator(server).sample(prompts(8), SAMPLING)
    next(answers)
    began = time.monotonic()
    answers.close()
    assert time.monotonic() - began < 1


def test_an_interrupt_gets_through(server):
    server.act = lambda body, attempt: Response(said().body, wait=3.0)
    threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(generator(server).sample(prompts(8), SAMPLING))
    assert time.monotonic() - began < 2
    assert not [thread for thread in threading.enumerate() if thread.name == "server-generator"]


def test_what_goes_wrong_with_the_prompts_is_passed_on(server):
    def broken():
        yield from prompts(3)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(generator(server).sample(broken(), SAMPLING))


def test_it_works_inside_a_running_event_loop(server):
    async def notebook():
        return sample(server, 3)

    assert len(asyncio.run(notebook())) == 3


def test_tokens_written_are_those_of_all_completions(server):
    server.act = lambda body, attempt: said(token_ids=[5, 6, 2])
    made = generator(server, server="vllm", processor=None)
    assert made.tokens_written == 0
    list(made.sample(prompts(4, n=2), SAMPLING))
    assert made.tokens_written == 24


def test_nothing_to_ask(server):
    assert list(generator(server).sample([], SAMPLING)) == []


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
