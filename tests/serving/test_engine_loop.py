"""The engine in its thread: the same tokens as everywhere, clients that leave, queues that are full, failures."""

import asyncio
import threading

import pytest
from PIL import Image
from served import generator_of

from lenvm_lightning.decoding.sampling_params import SamplingParams, completion_seed
from lenvm_lightning.errors import LenVMError
from lenvm_lightning.guidance import EqualTo
from lenvm_lightning.rollouts.generators.interface import Prompt, PromptRequest
from lenvm_lightning.serving.engine_loop import EngineLoop, Job, QueueFullError

SAMPLING = SamplingParams(max_tokens=40, top_k=15)
PROMPTS = [Prompt(str(i), [{"role": "user", "content": f"Ann has {i} pens and buys 2. How many?"}]) for i in range(6)]


def job_of(generator, prompt, control=None, n=1, sampling=SAMPLING):
    ids, inputs = generator.encode(prompt, sampling, control)
    seeds = [completion_seed(sampling.seed, prompt.prompt_id, k) for k in range(n)]
    return Job(ids, seeds, sampling, control, inputs, None, asyncio.get_running_loop())


async def read(job):
    """Tokens of each completion, and how they ended."""
    tokens, ended = [[] for _ in job.seeds], [None] * len(job.seeds)
    while None in ended:
        token = await asyncio.wait_for(job.tokens.get(), 60)
        assert ended[token.index] is None, "a token after the last one"
        if token.token_id >= 0:
            tokens[token.index].append(token)
        ended[token.index] = token.finish_reason
    return tokens, ended


def test_requests_that_come_at_any_time_get_the_tokens_that_they_get_elsewhere():
    generator = generator_of(rows=4)
    controls = [None, EqualTo(20), None, EqualTo(30), EqualTo(12), None]
    requests = [PromptRequest(prompt, (0, 1), control) for prompt, control in zip(PROMPTS, controls, strict=True)]
    expected = {(a.prompt_id, a.number): a.result for a in generator.sample(requests, SAMPLING)}

    async def ask(loop, prompt, control, delay):
        await asyncio.sleep(delay)
        job = job_of(generator, prompt, control, n=2)
        loop.submit(job)
        return await read(job)

    async def ask_all():
        pairs = enumerate(zip(PROMPTS, controls, strict=True))
        return await asyncio.gather(*(ask(loop, prompt, control, 0.03 * i) for i, (prompt, control) in pairs))

    with EngineLoop(generator.engines(1)[0], most=99) as loop:
        found = asyncio.run(ask_all())
        assert loop.completions == 0
    for prompt, (tokens, ended) in zip(PROMPTS, found, strict=True):
        for number in (0, 1):
            same = expected[prompt.prompt_id, number]
            assert [token.token_id for token in tokens[number]] == same.token_ids
            assert sum(token.logprob for token in tokens[number]) == pytest.approx(same.logprob)
            assert ended[number] == same.finish_reason
            first, *others = tokens[number]
            assert first.expected > 0
            assert all(token.expected is None for token in others)
            assert all(token.remaining is not None for token in tokens[number])


def test_a_client_that_leaves_frees_its_rows_and_nobody_waits_for_one_that_waited():
    generator = generator_of(rows=1)

    async def leave():
        long = SamplingParams(max_tokens=2000, seed=1)
        first, second, third = (job_of(generator, prompt, sampling=long) for prompt in PROMPTS[:3])
        for job in (first, second, third):
            loop.submit(job)
        assert loop.completions == 3
        await first.tokens.get()
        loop.cancel(first)
        loop.cancel(second)
        _, ended = await read(third)
        assert ended == ["stop"]
        assert second.tokens.qsize() <= 1  # its prompt may have been read ahead

    with EngineLoop(generator.engines(1)[0], most=3) as loop:
        asyncio.run(leave())
        assert loop.completions == 0


def test_more_than_there_may_be_are_refused():
    generator = generator_of(rows=1)

    async def ask():
        jobs = [job_of(generator, PROMPTS[0], n=2), job_of(generator, PROMPTS[1])]
        loop.submit(jobs[0])
        with pytest.raises(QueueFullError, match="2 completions are under way or wait, of 2 at most"):
            loop.submit(jobs[1])
        await read(jobs[0])
        loop.submit(jobs[1])
        await read(jobs[1])

    with EngineLoop(generator.engines(1)[0], most=2) as loop:
        asyncio.run(ask())
    with pytest.raises(QueueFullError, match="about to end"):
        asyncio.run(_submit(loop, generator))


async def _submit(loop, generator):
    loop.submit(job_of(generator, PROMPTS[0]))


def test_closed_it_writes_what_is_under_way_to_its_end():
    generator = generator_of(rows=2)

    async def ask():
        jobs = [job_of(generator, prompt) for prompt in PROMPTS[:3]]
        with EngineLoop(generator.engines(1)[0], most=9) as loop:
            for job in jobs:
                loop.submit(job)
        return [await read(job) for job in jobs]

    assert all(ended[0] in ("stop", "length") for _, ended in asyncio.run(ask()))


def test_a_failure_is_told_to_those_under_way_and_the_next_are_served(monkeypatch):
    generator = generator_of(rows=2)
    engine = generator.engines(1)[0]
    step, failing = engine._step, [True]

    def fail_once():
        if failing:
            failing.clear()
            raise MemoryError
        return step()

    monkeypatch.setattr(engine, "_step", fail_once)

    async def ask():
        job = job_of(generator, PROMPTS[0], n=2)
        loop.submit(job)
        for _ in range(2):
            token = await asyncio.wait_for(job.tokens.get(), 60)
            assert (token.finish_reason, token.error) == ("error", "there is not enough memory")
        again = job_of(generator, PROMPTS[0], n=2)
        loop.submit(again)
        return await read(again)

    with EngineLoop(engine, most=9) as loop:
        _, ended = asyncio.run(ask())
    assert set(ended) <= {"stop", "length"}
    assert loop.completions == 0


def test_a_step_that_cannot_be_told_is_told_as_a_failure_to_all(monkeypatch):
    generator = generator_of(rows=2)

    async def ask():
        job = job_of(generator, PROMPTS[0], n=2)
        loop.submit(job)
        return [await asyncio.wait_for(job.tokens.get(), 60) for _ in range(2)]

    with EngineLoop(generator.engines(1)[0], most=9) as loop:
        told, count = loop._told, []

        def fail_at_the_second(one):
            count.append(one)
            if len(count) == 2:
                raise RuntimeError("no number came from the device")
            return told(one)

        monkeypatch.setattr(loop, "_told", fail_at_the_second)
        tokens = asyncio.run(ask())
        assert {(token.finish_reason, token.error) for token in tokens} == {
            ("error", "RuntimeError: no number came from the device")
        }
        assert loop.completions == 0


def test_one_that_waits_gives_its_place_to_others_when_its_client_leaves():
    generator = generator_of(rows=1)
    engine = generator.engines(1)[0]
    waiting = threading.Event()

    async def leave():
        loop.call(waiting.wait)  # nothing is begun until this ends
        jobs = [job_of(generator, prompt) for prompt in PROMPTS[:3]]
        loop.submit(jobs[0])
        loop.submit(jobs[1])
        with pytest.raises(QueueFullError):
            loop.submit(jobs[2])
        loop.cancel(jobs[1])
        assert loop.completions == 1
        loop.submit(jobs[2])
        waiting.set()
        await read(jobs[2])

    with EngineLoop(engine, most=2) as loop:
        asyncio.run(leave())
        assert loop.completions == 0


def test_what_needs_the_models_is_done_between_steps_by_the_thread_that_runs_them():
    generator = generator_of(rows=2)

    async def ask():
        job = job_of(generator, PROMPTS[0], n=2)
        loop.submit(job)
        calls = [loop.call(lambda: threading.current_thread().name) for _ in range(3)]
        failing = loop.call(lambda: 1 / 0)
        await read(job)
        assert [call.result(60) for call in calls] == ["serving"] * 3
        with pytest.raises(ZeroDivisionError):
            failing.result(60)

    with EngineLoop(generator.engines(1)[0], most=9) as loop:
        asyncio.run(ask())
        assert loop.call(lambda: 5).result(60) == 5  # when nothing is written, too
    with pytest.raises(QueueFullError, match="about to end"):
        loop.call(lambda: 5)


def test_images_that_wait_take_so_much_and_no_more():
    generator = generator_of("tiny-vl", rows=1)
    prompt = Prompt("0", [{"role": "user", "content": "<image>How many?"}], (Image.new("RGB", (56, 56), "red"),))

    async def ask():
        jobs = [job_of(generator, prompt) for _ in range(3)]
        assert jobs[0].bytes_of_images > 0
        waiting = threading.Event()
        loop.call(waiting.wait)
        loop.submit(jobs[0])
        with pytest.raises(QueueFullError, match="images of 0 MiB are waiting already"):
            loop.submit(jobs[1])
        loop.cancel(jobs[0])
        loop.submit(jobs[1])
        waiting.set()
        await read(jobs[1])
        loop.submit(jobs[2])
        await read(jobs[2])

    with EngineLoop(generator.engines(1)[0], most=9, most_bytes=1) as loop:
        asyncio.run(ask())


def test_a_prompt_that_a_model_cannot_read_fails_alone():
    generator = generator_of(rows=4)

    async def ask():
        good = [job_of(generator, prompt, n=2) for prompt in PROMPTS[:2]]
        beyond = [*good[0].prompt_ids[:-1], 10**6, good[0].prompt_ids[-1]]  # no such token
        bad = Job(beyond, [1, 2], SAMPLING, None, {}, None, asyncio.get_running_loop())
        waiting = threading.Event()
        loop.call(waiting.wait)
        for job in (good[0], bad, good[1]):
            loop.submit(job)
        waiting.set()
        for _ in range(2):
            token = await asyncio.wait_for(bad.tokens.get(), 60)
            assert token.finish_reason == "error"
            assert token.unread
            assert "index out of range" in token.error
        return [await read(job) for job in good]

    with EngineLoop(generator.engines(1)[0], most=9) as loop:
        for _, ended in asyncio.run(ask()):
            assert set(ended) <= {"stop", "length"}
        assert loop.completions == 0


def test_so_many_calls_may_wait_and_one_without_memory_is_told(monkeypatch):
    monkeypatch.setattr("lenvm_lightning.serving.engine_loop._MOST_CALLS", 1)
    generator = generator_of(rows=1)

    def fail():
        raise MemoryError

    with EngineLoop(generator.engines(1)[0], most=9) as loop:
        waiting, begun = threading.Event(), threading.Event()
        first = loop.call(lambda: begun.set() or waiting.wait())
        begun.wait()
        second = loop.call(fail)
        with pytest.raises(QueueFullError, match="1 texts wait to be read"):
            loop.call(fail)
        waiting.set()
        assert first.result(60)
        with pytest.raises(LenVMError, match="there is not enough memory"):
            second.result(60)
