"""Many requests under way at once: how many, stopping, and what goes wrong."""

import asyncio
import os
import signal
import threading
import time
from itertools import count

import pytest
from scripted_server import SAMPLING, Response, generator, prompts, said, sample

from lenvm_lightning.rollouts.generators.interface import Prompt, PromptRequest


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


def test_nothing_to_ask(server):
    assert list(generator(server).sample([], SAMPLING)) == []
