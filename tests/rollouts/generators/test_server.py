"""Our client against a real socket: a small HTTP server that speaks the protocol and does as the test tells it."""

import asyncio
import base64
import contextlib
import io
import json
import logging
import os
import pickle
import signal
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count

import pytest
import torch
from PIL import Image

from lenvm_lightning.decoding.sampling_params import SamplingParams, completion_seed
from lenvm_lightning.errors import GenerationError, GeneratorError
from lenvm_lightning.guidance import AtLeast, AtMost, EqualTo, Gated, Scale, Tilt
from lenvm_lightning.rollouts.generators.interface import Failure, GeneratedText, Prompt, PromptRequest
from lenvm_lightning.rollouts.generators.server import ServerGenerator
from lenvm_lightning.rollouts.generators.server.backends import DIALECTS, find_dialect
from lenvm_lightning.rollouts.generators.server.controls import custom_params

SAMPLING = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=32, seed=5)


@dataclass
class Reply:
    """What the server sends: a body with a status, after ``wait`` seconds; ``cut`` closes the connection instead."""

    body: object = None
    status: int = 200
    headers: dict = field(default_factory=dict)
    wait: float = 0.0
    cut: str = ""


def said(text="Four.", finish="stop", tokens=None, logprobs=None, **extra):
    """A chat completion; ``extra`` goes into the choice."""
    content = None if logprobs is None else {"content": [{"token": t, "logprob": p} for t, p in logprobs]}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish, **extra}
    usage = None if tokens is None else {"completion_tokens": tokens, "prompt_tokens": 3, "total_tokens": 3 + tokens}
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "usage": usage}
    return Reply({**body, "choices": [{**choice, "logprobs": content}]})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.seen_headers.append({name.lower(): value for name, value in self.headers.items()})
        self.send(self.server.pages.get(self.path, Reply({"detail": "Not Found"}, 404)))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
            attempt = sum(b["seed"] == body["seed"] for b in server.bodies)
            server.bodies.append(body)
            server.times.append(time.monotonic())
            server.seen_headers.append({name.lower(): value for name, value in self.headers.items()})
        reply = server.act(body, attempt)
        time.sleep(reply.wait)
        with server.lock:
            server.under_way -= 1
        self.send(reply)

    def send(self, reply):
        content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        if reply.cut != "at once":
            self.send_response(reply.status)
            for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if reply.cut else content)
        if reply.cut:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def log_message(self, *arguments):
        pass


class Scripted(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.act = lambda body, attempt: said()
        self.pages = {"/v1/models": models(("m", "someone"))}
        self.lock, self.under_way, self.most_under_way = threading.Lock(), 0, 0
        self.bodies, self.times, self.seen_headers, self.connections = [], [], [], []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def get_request(self):
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def handle_error(self, request, client_address):
        pass  # clients that hang up are part of the tests

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self):
        """As if killed: nothing answers any more, not even to those who are connected."""
        self.shutdown()
        self.socket.close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def models(*names):
    return Reply({"object": "list", "data": [{"id": name, "object": "model", "owned_by": by} for name, by in names]})


@pytest.fixture
def server():
    server = Scripted()
    yield server
    server.stop()


def generator(server, /, **options):
    defaults = {"model": "m", "server": "other", "processor": "tiny-text", "backoff": 0.02, "concurrency": 4}
    return ServerGenerator(server.url, **{**defaults, **options})


def prompts(number, n=1):
    return [
        PromptRequest(Prompt(f"p{i}", [{"role": "user", "content": f"{i}?"}]), tuple(range(n))) for i in range(number)
    ]


def sample(server, /, number=1, n=1, sampling=SAMPLING, **options):
    return list(generator(server, **options).sample(prompts(number, n), sampling))


# -- what is asked and what comes back --------------------------------------------------------------------------------


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


def test_a_completion_that_was_cut_gets_no_end(server, tiny_text):
    server.act = lambda body, attempt: said("One two", "length")
    assert sample(server)[0].result.token_ids == tiny_text("One two")["input_ids"]


def test_a_cut_completion_without_text_is_no_completion(server, tiny_text):
    """Such as one of special tokens alone."""
    server.act = lambda body, attempt: said("", "length", tokens=32)
    assert sample(server)[0].result == Failure("cut, and there is no text to make tokens of", final=True)
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


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_stand_at_their_marks(server, tmp_path):
    red, blue = Image.new("RGB", (5, 4), "red"), Image.new("RGB", (3, 2), "blue")
    blue.save(tmp_path / "blue.png")
    prompt = Prompt(
        "p",
        [{"role": "system", "content": "Look."}, {"role": "user", "content": "<image>and <image>: same?"}],
        images=(red, str(tmp_path / "blue.png")),
    )
    answers = list(generator(server).sample([PromptRequest(prompt, (0, 1))], SAMPLING))
    assert len(answers) == 2
    system, user = server.bodies[0]["messages"]
    assert system == {"role": "system", "content": "Look."}
    assert [part["type"] for part in user["content"]] == ["image_url", "text", "image_url", "text"]
    assert [part["text"] for part in user["content"] if "text" in part] == ["and ", ": same?"]
    for part, picture in zip(user["content"][::2], (red, blue), strict=True):
        kind, _, content = part["image_url"]["url"].partition(",")
        assert kind == "data:image/png;base64"
        shown = Image.open(io.BytesIO(base64.b64decode(content)))
        assert (shown.format, shown.size, shown.tobytes()) == ("PNG", picture.size, picture.tobytes())


def test_a_picture_that_cannot_be_shown_stops_only_its_own_prompt(server, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    content = [{"role": "user", "content": "<image>?"}]
    bad = [
        Prompt("gone", content, (str(tmp_path / "gone.png"),)),
        Prompt("torn", content, (str(tmp_path / "torn.png"),)),
        Prompt("none", content),
        Prompt("good", content, (Image.new("L", (2, 2)),)),
    ]
    answers = generator(server).sample([PromptRequest(prompt, (0,)) for prompt in bad], SAMPLING)
    results = {answer.prompt_id: answer.result for answer in answers}
    assert isinstance(results.pop("good"), GeneratedText)
    assert all(failure.final for failure in results.values())
    assert "gone.png does not exist" in results["gone"].reason
    assert "torn.png cannot be read" in results["torn"].reason
    assert results["none"].reason == "1 <image> marks in the prompt but 0 pictures"


# -- controls of the length, as the research code's server takes them ------------------------------------------------

WIRE = [
    (Tilt(-5), {"value_mode": "centered_exp", "value_scale": -5.0}),
    (EqualTo(128, mode="hard"), {"target_length": 128, "target_length_mode": "total", "value_constraint": "eq"}),
    (EqualTo(128, mode="soft"), {"target_length": 128, "target_length_mode": "total", "value_constraint": "eq_soft"}),
    (AtMost(64, mode="hard"), {"target_length": 64, "target_length_mode": "total", "value_constraint": "le"}),
    (AtLeast(200, mode="hard"), {"target_length": 200, "target_length_mode": "total", "value_constraint": "ge"}),
    (Scale(0.5, "mul"), {"value_mode": "mul", "value_scale": 0.5}),
    (Scale(2, "length_mul"), {"value_mode": "length_mul", "value_scale": 2.0}),
    (Scale(-0.25, "linear"), {"value_mode": "linear", "value_scale": 0.75}),
    (Scale(0.25, "linear"), {"value_mode": "linear", "value_scale": 1.25}),
    (Gated(Tilt(3), min_g=0.2), {"value_mode": "centered_exp", "value_scale": 3.0, "value_min": 0.2}),
    (
        Gated(Gated(AtMost(64, mode="hard"), min_entropy=0.5), min_entropy=0.3),
        {"target_length": 64, "target_length_mode": "total", "value_constraint": "le", "value_entropy_threshold": 0.5},
    ),
    (Gated(Tilt(-5)), {"value_mode": "centered_exp", "value_scale": -5.0}),
    (Tilt(torch.tensor(-5.0)), {"value_mode": "centered_exp", "value_scale": -5.0}),
]
SHORTLIST = SamplingParams(top_k=15, max_tokens=32, seed=5)


def under(*controls):
    return [
        PromptRequest(prompt.prompt, (0, 1), control) for prompt, control in zip(prompts(9), controls, strict=False)
    ]


def ask(server, requests, sampling=SHORTLIST, /, **options):
    return list(generator(server, **{"server": "research", **options}).sample(requests, sampling))


@pytest.mark.parametrize(("control", "expected"), WIRE)
def test_a_control_is_sent_with_its_request(server, control, expected):
    assert custom_params(control) == expected
    assert custom_params(control, 0.999) == {**expected, "gamma": 0.999}
    answers = ask(server, under(control), gamma=0.999)
    assert all(isinstance(answer.result, GeneratedText) for answer in answers)
    assert [body["custom_params"] for body in server.bodies] == 2 * [{**expected, "gamma": 0.999}]
    assert {(body["top_k"], body["return_token_ids"], body["max_completion_tokens"]) for body in server.bodies} == {
        (15, True, 32)
    }
    assert not any("logprobs" in body for body in server.bodies)


def test_each_request_has_its_own_numbers_and_none_has_none(server):
    ask(server, under(Tilt(-1), Tilt(-2)))
    sent = {body["messages"][0]["content"]: body["custom_params"]["value_scale"] for body in server.bodies}
    assert sent == {"0?": -1.0, "1?": -2.0}
    del server.bodies[:]
    ask(server, under(None, None), gamma=0.999)
    assert len(server.bodies) == 4
    assert not any("custom_params" in body for body in server.bodies)


@pytest.mark.parametrize(
    ("control", "said"),
    [
        (EqualTo(128), "no name for the mode 'penalty'.*mode='hard' or mode='soft'.*local generator"),
        (Gated(AtMost(64), min_entropy=0.1), "no name for the mode 'penalty'.*use mode='hard'"),
        (lambda probs, *_: probs, "no name for the control.*knows Tilt, EqualTo"),
        (Scale(0, "mul"), "leaves the distribution as it is"),
        (Gated(EqualTo(128, mode="hard"), min_g=0.1), "reads no min_g where there is a target"),
        (Tilt(torch.tensor([1.0, 2.0])), "numbers for several rows"),
    ],
)
def test_what_the_research_server_has_no_name_for_is_refused(server, control, said):
    with pytest.raises(GenerationError, match=said):
        ask(server, under(control))
    assert not server.bodies


@pytest.mark.parametrize(
    ("controls", "sampling", "said"),
    [
        ([Tilt(-5)], SamplingParams(), "tilts only among top_k candidates: set top_k"),
        ([AtMost(64, mode="hard")], SamplingParams(temperature=0.0), "does not guide at temperature 0"),
        ([Tilt(-5), AtMost(64, mode="hard")], SHORTLIST, r"Tilt\(beta=-5\) and AtMost.*one kind after the other"),
        ([None, Tilt(-5)], SHORTLIST, r"None and Tilt\(beta=-5\)"),
        ([Scale(0.5, "mul"), Scale(0.5)], SHORTLIST, "one kind after the other"),
    ],
)
def test_what_it_would_do_otherwise_is_refused(server, controls, sampling, said):
    """It sees no tilt without top_k, no control where it is greedy, and takes one kind of control a batch."""
    with pytest.raises(GeneratorError, match=said):
        ask(server, under(*controls), sampling)
    assert len(server.bodies) <= 2 * (len(controls) - 1)


@pytest.mark.parametrize("kind", [name for name in DIALECTS if name != "research"])
def test_other_servers_do_not_get_a_control_that_they_would_ignore(server, kind):
    with pytest.raises(GeneratorError, match=rf"Tilt\(beta=-5\).*kind '{kind}'.*server='research'"):
        ask(server, under(Tilt(-5)), SamplingParams(), server=kind)
    assert not server.bodies
    with pytest.raises(GeneratorError, match="gamma is for servers of kind 'research'"):
        generator(server, server=kind, gamma=0.99)


def test_a_gamma_that_is_none_is_refused(server):
    with pytest.raises(GenerationError, match=r"gamma must lie between 0 and 1, got 1\.2"):
        ask(server, under(Tilt(-5)), gamma=1.2)
    assert not server.bodies


def test_the_research_server_signs_as_sglang_and_has_to_be_named(server):
    server.pages["/v1/models"] = models(("m", "sglang"))
    with pytest.raises(GeneratorError, match="kind 'sglang'"):
        ask(server, under(Tilt(-5)), server="auto")


# -- trouble ----------------------------------------------------------------------------------------------------------

TROUBLES = {
    "too many": Reply({"error": {"message": "slow down"}}, 429, {"Retry-After": "0.3"}),
    "too many, in ms": Reply({"error": {"message": "slow down"}}, 429, {"Retry-After-Ms": "300"}),
    "timed out there": Reply({"detail": "timeout"}, 408),
    "broken": Reply(b"Internal Server Error", 500, {"Content-Type": "text/plain"}),
    "hung up": Reply(cut="at once"),
    "hung up in the middle": Reply(said().body, cut="in the middle"),
    "half of its JSON": Reply(b'{"choices": [', 200),
    "no JSON": Reply(b"<html>Welcome</html>", 200, {"Content-Type": "text/html"}),
    "no text": Reply(b"\xff\xfe", 200),
    "nothing chosen": Reply({"choices": []}),
    "given up": said(finish="abort"),
    "slow": Reply(said().body, wait=1.0),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_passing_trouble_is_tried_again(server, trouble):
    server.act = lambda body, attempt: (
        said() if attempt or body["messages"][0]["content"] != "1?" else TROUBLES[trouble]
    )
    answers = sample(server, 3, timeout=0.4)
    assert all(isinstance(answer.result, GeneratedText) for answer in answers)
    assert sorted(Counter(body["seed"] for body in server.bodies).values()) == [1, 1, 2]
    if trouble.startswith("too many"):
        times = [at for at, body in zip(server.times, server.bodies, strict=True) if "1?" in str(body["messages"])]
        assert times[1] - times[0] >= 0.3


def test_a_date_to_come_back_at_is_kept(server):
    def act(body, attempt):
        return said() if attempt else Reply({}, 429, {"Retry-After": formatdate(time.time() + 1.99, usegmt=True)})

    server.act = act
    sample(server)
    assert 0.9 < server.times[1] - server.times[0] < 2.5  # dates have whole seconds


def test_backing_off_takes_longer_each_time_and_ends(server):
    server.act = lambda body, attempt: Reply({"error": {"message": "out of memory"}}, 500)
    (answer,) = sample(server, retries=3, backoff=0.1)
    assert answer.result == Failure("500: out of memory (asked 4 times)", final=False)
    pauses = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
    for pause, expected in zip(pauses, (0.1, 0.2, 0.4), strict=True):
        assert 0.5 * expected <= pause < expected + 0.1  # half to whole, and some time to answer


def test_nobody_waits_an_hour(server):
    server.act = lambda body, attempt: Reply({"error": {"message": "quota"}}, 429, {"Retry-After": "3600"})
    assert sample(server)[0].result == Failure("429: quota (the server asks to wait 3600 s)", final=False)


def test_a_refused_prompt_is_not_tried_again(server):
    def act(body, attempt):
        too_long = body["messages"][0]["content"] == "1?"
        return Reply({"detail": "prompt is too long"}, 400) if too_long else said()

    server.act = act
    results = {answer.prompt_id: answer.result for answer in sample(server, 3)}
    assert results.pop("p1") == Failure("400: prompt is too long", final=True)
    assert all(isinstance(result, GeneratedText) for result in results.values())
    assert len(server.bodies) == 3


def test_a_server_that_refuses_everything_is_not_asked_a_million_times(server):
    server.act = lambda body, attempt: Reply({"detail": "Unexpected fields in the request: {'top_k'}"}, 422)
    with pytest.raises(GeneratorError, match=r"refuses every request.*Unexpected fields.*server="):
        sample(server, 100)
    assert len(server.bodies) < 20


@pytest.mark.parametrize(
    ("status", "body", "advice"),
    [
        (401, {"error": {"message": "Incorrect API key"}}, "OPENAI_API_KEY"),
        (403, {"error": "forbidden"}, "OPENAI_API_KEY"),
        (404, {"error": {"message": "The model `m` does not exist"}}, "the model's name"),
        (429, {"error": {"message": "You are out of money", "code": "insufficient_quota"}}, "out of money"),
    ],
)
def test_what_no_prompt_can_mend_stops_at_once(server, status, body, advice):
    server.act = lambda _, attempt: Reply(body, status)
    with pytest.raises(GeneratorError, match=f"(?s)answered {status}: .*{advice}"):
        sample(server, 50)
    assert len(server.bodies) <= 4


def test_a_dead_server_is_recognised_and_what_was_answered_stays(server):
    answers = generator(server, patience=0.6).sample(prompts(200), SAMPLING)
    got = [next(answers) for _ in range(10)]
    server.stop()
    began = time.monotonic()
    with pytest.raises(GeneratorError, match=r"has not answered for \d s .*refused.*Start it again"):
        got.extend(answers)  # keeps what came before the error
    assert 0.5 < time.monotonic() - began < 4
    assert 10 <= len(got) < 200
    assert all(isinstance(answer.result, GeneratedText) for answer in got)


def test_a_gateway_without_a_server_behind_it_is_dead_too(server):
    server.act = lambda body, attempt: Reply(b"Bad Gateway", 502)
    with pytest.raises(GeneratorError, match=r"has not answered for .* 502: Bad Gateway"):
        sample(server, 50, patience=0.4)


def test_a_restart_is_waited_for(server, caplog):
    answers = generator(server, patience=20).sample(prompts(60, n=2), SAMPLING)
    got = [next(answers) for _ in range(5)]
    port = server.server_port
    server.stop()
    again = threading.Timer(0.7, lambda: started.append(Scripted(port)))
    started = []
    again.start()
    got += answers
    again.join()
    started[0].stop()
    assert sorted((a.prompt_id, a.number) for a in got) == sorted((f"p{i}", k) for i in range(60) for k in range(2))
    assert all(isinstance(answer.result, GeneratedText) for answer in got)
    messages = [record.getMessage() for record in caplog.records]
    # Not once an attempt; an answer that was already on its way may come in between.
    assert 1 <= sum("does not answer" in m for m in messages) == sum("answers again" in m for m in messages) <= 3


def test_a_prompt_that_breaks_its_connection_every_time_does_not_hold_the_others_up(server):
    server.act = lambda body, attempt: Reply(cut="at once") if body["messages"][0]["content"] == "1?" else said()
    results = {a.prompt_id: a.result for a in sample(server, 5, retries=2, patience=30)}
    broken = results.pop("p1")
    assert not broken.final
    assert "connection broke" in broken.reason
    assert all(isinstance(result, GeneratedText) for result in results.values())


# -- many, few, and stopping ------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_prompts(server):
    pulled = count()
    taken = 0

    def endless():
        for i in pulled:
            yield PromptRequest(Prompt(f"p{i}", [{"role": "user", "content": "?"}]), (0, 1))

    server.act = lambda body, attempt: Reply(said().body, wait=0.005)
    answers = generator(server, concurrency=8).sample(endless(), SAMPLING)
    for _ in range(100):
        next(answers)
        taken += 1
    assert next(pulled) <= (taken + 2 * 8) / 2 + 2
    assert 4 <= server.most_under_way <= 8
    answers.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "server-generator"]


def test_stopping_does_not_wait_for_slow_answers(server):
    server.act = lambda body, attempt: Reply(said().body, wait=0.0 if body["messages"][0]["content"] == "0?" else 3.0)
    answers = generator(server).sample(prompts(8), SAMPLING)
    next(answers)
    began = time.monotonic()
    answers.close()
    assert time.monotonic() - began < 1


def test_an_interrupt_gets_through(server):
    server.act = lambda body, attempt: Reply(said().body, wait=3.0)
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


# -- the key ----------------------------------------------------------------------------------------------------------

KEY = "sk-very-secret-0123456789"


def test_the_key_goes_into_the_requests_and_nowhere_else(server, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("MY_KEY", f"{KEY}\n")  # as files with keys end
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    caplog.set_level(logging.DEBUG)

    def act(body, attempt):
        echo = Reply({"error": {"message": f"who is {KEY}?"}}, 400 if "0?" in str(body) else 500)
        return echo if "0?" in str(body) or "1?" in str(body) else said()

    server.act = act
    made = generator(server, model=None, server="auto", api_key_env="MY_KEY", retries=1)
    answers = list(made.sample(prompts(4), SAMPLING))
    server.act = lambda body, attempt: Reply({"error": {"message": f"wrong key {KEY}"}}, 401)
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


# -- finding the server and the model ---------------------------------------------------------------------------------


def test_the_only_model_is_taken_and_signs_the_fingerprint(server):
    made = generator(server, model=None, server="auto")
    assert made.name == "m"
    assert made.fingerprint() == {"kind": "server", "name": "m"}
    assert ServerGenerator(server.url + "/v1/", processor="tiny-text").name == "m"


def test_one_of_several_models_has_to_be_named(server):
    server.pages["/v1/models"] = models(("a", "vllm"), ("b", "vllm"))
    with pytest.raises(GeneratorError, match=r"which model.* lists 2: a, b.*model="):
        generator(server, model=None, server="auto")
    server.pages["/v1/models"] = Reply(b"Internal Server Error", 500)
    with pytest.raises(GeneratorError, match=r"does not say which one it serves.*model="):
        generator(server, model=None, server="auto")


def test_the_kind_of_server_is_found_out(server):
    for owner in ("vllm", "sglang", "llamacpp"):
        server.pages["/v1/models"] = models(("m", owner))
        sample(server, server="auto")
        assert set(server.bodies[-1]) >= {"top_k", "min_p"}
    server.pages["/v1/models"] = Reply(b"Internal Server Error", 500)
    server.pages["/openapi.json"] = Reply({"paths": {"/load_model": {}}})
    sample(server, server="auto")
    assert "generation_config" in server.bodies[-1]
    assert find_dialect("auto", "api.openai.com", ["system"], set) is DIALECTS["openai"]
    assert find_dialect("auto", "notopenai.com", ["openai"], set) is DIALECTS["other"]


def test_mistakes_in_settings_are_named(server):
    with pytest.raises(GeneratorError, match="unknown kind of server 'vlm'; did you mean 'vllm'"):
        generator(server, server="vlm")
    with pytest.raises(GeneratorError, match="concurrency must lie between 1 and 1000, got 0"):
        generator(server, concurrency=0)
    with pytest.raises(GeneratorError, match="is no address"):
        ServerGenerator("ftp://x", "m")


def test_a_refused_key_is_said_before_anything_is_sampled(server):
    server.pages["/v1/models"] = Reply({"error": {"message": "who are you?"}}, 401)
    with pytest.raises(GeneratorError, match=r"refuses the key in \$OPENAI_API_KEY \(401: who are you\?\)"):
        generator(server, model=None, server="auto")
