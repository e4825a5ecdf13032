"""The order in which requests that wait are started: short ones first where a server is told so, priorities always."""

import asyncio
import contextlib
import functools
import threading

import openai
import pytest
import torch
from PIL import Image
from served import SEA, generator_of, serving

from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.errors import GenerationError
from lenvm_lightning.guidance import AtLeast, AtMost, EqualTo, Tilt
from lenvm_lightning.rollouts.generators.interface import Prompt
from lenvm_lightning.serving.engine_loop import EngineLoop, Job
from lenvm_lightning.serving.expected_tokens import expected_tokens
from lenvm_lightning.serving.service import Limits, Service

TEXTS = [
    "Write a text about the sea.",
    "What is 3 + 4?",
    "Ann has 3 pens and buys 2. How many?",
    "Write a text of 150 words about the rain.",
]


def job_of(generator, text, control=None, n=1, max_tokens=400, priority=0):
    sampling = SamplingParams(max_tokens=max_tokens, top_k=15)
    ids, inputs = generator.encode(Prompt("0", [{"role": "user", "content": text}]), sampling, control)
    loop = asyncio.get_running_loop()
    return Job(ids, list(range(n)), sampling, control, inputs, None, loop, priority)


async def ended(job):
    """The first token of a job, when its last completion has ended."""
    first, left = None, len(job.seeds)
    while left:
        token = await asyncio.wait_for(job.tokens.get(), 60)
        first = first or token
        left -= token.finish_reason is not None
    return first


async def started_in_order(loop, jobs):
    """Submit all before any begins; the numbers of jobs as they end, and their first tokens."""
    order, firsts = [], {}
    held = threading.Event()
    loop.call(held.wait)

    async def follow(number, job):
        firsts[number] = await ended(job)
        order.append(number)

    for job in jobs:
        loop.submit(job)
    held.set()
    await asyncio.gather(*(follow(number, job) for number, job in enumerate(jobs)))
    return order, firsts


class Counted:
    """What predicts, and how often it was asked about each job."""

    def __init__(self, lenvm):
        self.lenvm, self.asked = lenvm, []

    def __call__(self, jobs):
        found = expected_tokens(self.lenvm, jobs)
        self.asked += jobs[: len(found)]
        return found


def test_what_is_expected_to_be_short_starts_first_and_is_read_once():
    generator = generator_of(rows=1)
    predict = Counted(generator.lenvm)

    async def ask():
        jobs = [job_of(generator, text) for text in TEXTS * 2]
        return jobs, *await started_in_order(loop, jobs)

    with EngineLoop(generator.engines(1)[0], most=9, predict=predict) as loop:
        jobs, order, firsts = asyncio.run(ask())
    assert order == sorted(range(8), key=lambda k: (jobs[k].expected, k))
    assert order != list(range(8))
    assert len(predict.asked) == len(set(map(id, predict.asked)))
    for number, job in enumerate(jobs):
        if job.predicted:  # what the answer says, read by another batch
            assert job.expected == pytest.approx(firsts[number].expected, rel=1e-4)
    assert sum(job.predicted for job in jobs) >= 7


def test_nothing_is_read_where_nobody_waits():
    generator = generator_of(rows=4)
    predict = Counted(generator.lenvm)

    async def ask():
        await started_in_order(loop, [job_of(generator, text, n=2, max_tokens=5) for text in TEXTS[:2]])

    with EngineLoop(generator.engines(1)[0], most=9, predict=predict) as loop:
        asyncio.run(ask())
        assert loop.completions == 0
    assert not predict.asked


def test_a_request_that_is_due_is_overtaken_no_more():
    """Without patience everybody is due at once: as they came, whatever is short."""
    generator = generator_of(rows=1)

    async def ask():
        jobs = [job_of(generator, TEXTS[3], max_tokens=30), job_of(generator, TEXTS[1], max_tokens=2)]
        return (await started_in_order(loop, jobs))[0]

    predict = functools.partial(expected_tokens, generator.lenvm)
    for patience, expected in ((0.0, [0, 1]), (8.0, [1, 0])):
        with EngineLoop(generator.engines(1)[0], most=9, predict=predict, patience=patience) as loop:
            assert asyncio.run(ask()) == expected


def test_expected_tokens_are_those_of_the_model_under_control_and_limit():
    generator = generator_of()
    lenvm = generator.lenvm

    async def ask():
        jobs = [job_of(generator, text) for text in TEXTS]
        with torch.inference_mode():
            alone = [float(lenvm.remaining(lenvm(torch.tensor([job.prompt_ids])))[0, -1]) for job in jobs]
        assert expected_tokens(lenvm, jobs) == pytest.approx(alone, rel=1e-4)  # float32, another batch
        sea = alone[0]
        of_sea = functools.partial(job_of, generator, TEXTS[0])
        cases = [
            (of_sea(n=3), 3 * sea),
            (of_sea(max_tokens=7), 7),
            (of_sea(EqualTo(111)), 111),
            (of_sea(EqualTo(111), n=2), 222),
            (of_sea(AtMost(9)), 9),
            (of_sea(AtMost(300)), sea),
            (of_sea(AtLeast(300)), 300),
            (of_sea(AtLeast(2)), sea),
            (of_sea(Tilt(-5)), sea),
        ]
        assert expected_tokens(lenvm, [job for job, _ in cases]) == pytest.approx([e for _, e in cases], rel=1e-4)
        many = [job_of(generator, TEXTS[0]) for _ in range(200)]
        width = len(many[0].prompt_ids)
        assert len(expected_tokens(lenvm, many)) == 1024 // width  # so many by one forward
        bad = job_of(generator, TEXTS[0], n=2)
        bad.prompt_ids = [*bad.prompt_ids[:-1], 10**6]  # no such token: its limit counts, the others are read
        assert expected_tokens(lenvm, [jobs[1], bad, jobs[0]]) == pytest.approx([alone[1], 800, sea], rel=1e-4)

    asyncio.run(ask())


def test_images_are_read_one_by_one():
    generator = generator_of("tiny-vl", rows=1)
    images = [Image.new("RGB", (56, 56), color) for color in ("red", "blue", "white")]
    prompts = [
        Prompt(str(k), [{"role": "user", "content": "<image>How many?"}], (one,)) for k, one in enumerate(images)
    ]

    async def ask():
        sampling = SamplingParams(max_tokens=200)
        encoded = [generator.encode(prompt, sampling) for prompt in prompts]
        loop_here = asyncio.get_running_loop()
        jobs = [Job(ids, [1], sampling, None, inputs, None, loop_here) for ids, inputs in encoded]
        assert len(expected_tokens(generator.lenvm, jobs)) == 1
        order, firsts = await started_in_order(loop, jobs)
        for number, job in enumerate(jobs):
            if job.predicted:
                assert job.expected == pytest.approx(firsts[number].expected, rel=1e-3)
        return jobs, order

    predict = functools.partial(expected_tokens, generator.lenvm)
    with EngineLoop(generator.engines(1)[0], most=9, predict=predict) as loop:
        jobs, order = asyncio.run(ask())
    assert sorted(order) == [0, 1, 2]
    assert sum(job.predicted for job in jobs) >= 2


# -- the server ---


async def order_of_answers(server, bodies):
    """One request fills the only row; the others come one after the other while it is written."""
    order = []
    loop = server.service.engine_loop

    async def ask(client, name, fields):
        await client.chat.completions.create(model="tiny-text", messages=SEA, **fields)
        order.append(name)

    async with server.client(openai.AsyncOpenAI) as client:
        first = {"max_tokens": 600, "extra_body": {"lenvm": "equal-to:300"}}
        tasks = []
        for count, (name, fields) in enumerate([("first", first), *bodies], start=1):
            tasks.append(asyncio.ensure_future(ask(client, name, fields)))
            while loop.completions < count or not loop.tokens_written:
                await asyncio.sleep(0.002)
        await asyncio.gather(*tasks)
    return order


LONG = {"max_tokens": 200, "extra_body": {"lenvm": "equal-to:100"}}
SHORT = {"max_tokens": 3}


@pytest.mark.parametrize("order", ["arrival", "shortest"])
def test_a_short_request_overtakes_long_ones_where_rows_are_busy_and_only_on_request(order):
    bodies = [("long", LONG), ("longer", LONG), ("short", SHORT)]
    with serving(generator_of(rows=1), order=order) as server:
        found = asyncio.run(order_of_answers(server, bodies))
    waited = {"arrival": ["long", "longer", "short"], "shortest": ["short", "long", "longer"]}[order]
    assert found == ["first", *waited]


@pytest.mark.parametrize("order", ["arrival", "shortest"])
def test_priorities_go_before_everything_and_equals_as_they_came(order):
    def of(priority, fields):
        extra = {**fields.get("extra_body", {}), "priority": priority}
        return {**fields, "extra_body": extra}

    bodies = [("0", SHORT), ("5", of(5, SHORT)), ("-1", of(-1, LONG)), ("0 too", of(0, SHORT)), ("-2", of(-2, SHORT))]
    with serving(generator_of(rows=1), order=order) as server:
        found = asyncio.run(order_of_answers(server, bodies))
    assert found == ["first", "-2", "-1", "0", "0 too", "5"]


@pytest.mark.parametrize("priority", ["high", "1", 1.5, True, 2**31, [1]])
@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/v1/completions"])
def test_a_priority_that_is_no_integer_is_refused(tiny_server, endpoint, priority):
    asked = {"messages": SEA} if "chat" in endpoint else {"prompt": "Hello"}
    status, _, told = tiny_server.ask(endpoint, {**asked, "priority": priority, "max_tokens": 1})
    assert status == 400
    assert told["error"]["message"].startswith("priority: Input should be")


def test_a_priority_of_none_is_none(tiny_server):
    with contextlib.closing(tiny_server.client()) as client:
        for priority in (None, 0, -7):
            extra = {"priority": priority}
            client.chat.completions.create(model="tiny-text", messages=SEA, max_tokens=1, extra_body=extra)


def test_shortest_first_needs_what_predicts():
    with pytest.raises(GenerationError, match="shortest first needs a length value model"):
        Service(generator_of(lenvm=False), Limits(), order="shortest")


def test_shortest_first_needs_whole_lengths():
    generator = generator_of()
    generator.lenvm.config.until = "</think>"
    with pytest.raises(GenerationError, match=r"shortest first: .* counts to '</think>', not to the end"):
        Service(generator, Limits(), order="shortest")
