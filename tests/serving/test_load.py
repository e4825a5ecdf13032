"""The server when much is asked of it: queues, memory, clients that leave, that are slow, or a thousand at once."""

import asyncio
import json
import random
import socket
import statistics
import threading
import time

import openai
import psutil
import pytest
from served import SEA, chat, generator_of, serving

from lenvm_lightning.serving.service import Limits


def test_bodies_that_fill_the_memory_have_to_wait(monkeypatch):
    monkeypatch.setattr("lenvm_lightning.serving.gate._BODIES", 100)
    with serving(generator_of(rows=1)) as server:
        stream = chat(server, stream=True, max_tokens=1500, temperature=2.0)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="bodies of other requests"):
            chat(server)
        stream.close()
        server.wait_until_idle()
        assert chat(server, max_tokens=2).choices


def test_a_queue_that_is_full_says_when_to_come_again():
    with serving(generator_of(rows=1), Limits(waiting=1, max_tokens=2000)) as server:
        streams = [chat(server, stream=True, max_tokens=1500, temperature=2.0) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as told:
            chat(server)
        assert told.value.response.headers["retry-after"] == "1"
        for stream in streams:
            stream.close()
        server.wait_until_idle()
        assert chat(server, max_tokens=3).choices


def test_a_client_that_leaves_frees_its_rows():
    with serving(generator_of(rows=1)) as server:
        stream = chat(server, stream=True, max_tokens=1500, temperature=2.0)
        next(iter(stream))
        stream.close()
        server.wait_until_idle()
        body = json.dumps({"messages": SEA, "max_tokens": 1500, "temperature": 2.0}).encode()
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as raw:  # waits for the whole answer, then does not
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            raw.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            until = threading.Event()
            while not server.service.engine_loop.completions:
                until.wait(0.01)
        server.wait_until_idle()


async def crowd(server, count):
    """So many clients at once: half want an answer, the others leave, or send what nobody understands."""
    kinds = random.Random(0).choices(["whole", "stream", "leaves", "garbage"], weights=[3, 3, 2, 2], k=count)
    answered, seconds = [], []
    began = time.monotonic()

    async def one(client, number, kind):
        if kind == "garbage":
            with pytest.raises(openai.BadRequestError):
                await client.chat.completions.create(model="tiny-text", messages=SEA, temperature=-1 - number)
            return
        control = {"lenvm": ["at-most:24", "equal-to:16", "none"][number % 3]}
        common = {"model": "tiny-text", "messages": SEA, "seed": number, "max_tokens": 40, "extra_body": control}
        if kind == "whole":
            answer = await client.chat.completions.create(**common)
            answered.append((number, answer.choices[0].message.content))
            seconds.append(time.monotonic() - began)
            return
        stream = await client.chat.completions.create(stream=True, **common)
        text = ""
        async for piece in stream:
            text += piece.choices[0].delta.content or ""
            if kind == "leaves" and len(text) > 20:
                await stream.close()
                return
        if kind == "stream":
            answered.append((number, text))
            seconds.append(time.monotonic() - began)

    async with server.client(openai.AsyncOpenAI) as client:
        await asyncio.gather(*(one(client, number, kind) for number, kind in enumerate(kinds)))
    wanted = [number for number, kind in enumerate(kinds) if kind in ("whole", "stream")]
    middle, late = statistics.quantiles(seconds, n=100)[49::49]
    print(f"{count} clients at once: half are answered after {middle:.1f} s, 99% after {late:.1f} s")
    return wanted, answered


@pytest.mark.parametrize("count", [80, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_crowd_of_clients_some_of_which_leave_or_talk_nonsense(count):
    with serving(generator_of(rows=16), Limits(waiting=2 * count)) as server:
        if count >= 1000:
            asyncio.run(crowd(server, count))
            server.wait_until_idle()
        before = psutil.Process().memory_info().rss
        wanted, answered = asyncio.run(crowd(server, count))
        if count >= 1000:  # a second crowd finds what the first one left
            grown = (psutil.Process().memory_info().rss - before) / 2**20
            print(f"memory grew by {grown:.0f} MiB")
            assert grown < 64
        assert sorted(number for number, _ in answered) == wanted  # none lost, none answered twice
        server.wait_until_idle()
        number, text = answered[len(answered) // 2]  # alone, it is the same
        control = ["at-most:24", "equal-to:16", "none"][number % 3]
        [alone] = chat(server, seed=number, max_tokens=40, lenvm=control).choices
        assert alone.message.content == text


def test_a_body_that_does_not_come_keeps_no_room(monkeypatch):
    monkeypatch.setattr("lenvm_lightning.serving.gate._BODIES", 1000)
    monkeypatch.setattr("lenvm_lightning.serving.gate._BODY_SECONDS", 0.3)
    with serving(generator_of(rows=1)) as server:
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n{")
            assert server.ask("/v1/completions", {"prompt": "a", "max_tokens": 2})[0] in (200, 429)
            time.sleep(0.6)
            assert server.ask("/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200


def test_those_who_write_go_on_while_texts_are_read(tiny_server):
    """One text is read a step: a crowd of readers must not stop a stream."""
    stop = threading.Event()

    def read():
        while not stop.is_set():
            assert tiny_server.ask("/v1/lengths", {"prompts": ["What is 3 + 4?"] * 4})[0] in (200, 429)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    try:
        assert chat(tiny_server, max_tokens=30, seed=1).usage.completion_tokens > 5
    finally:
        stop.set()
        for reader in readers:
            reader.join()
