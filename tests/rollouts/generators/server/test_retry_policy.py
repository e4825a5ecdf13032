"""Servers that are busy, broken, restarting or dead: what is asked again, and when it is enough."""

import threading
import time
from collections import Counter
from email.utils import formatdate

import pytest
from scripted_server import SAMPLING, Response, ScriptedServer, generator, prompts, said, sample

from lenvm_lightning.errors import GeneratorError
from lenvm_lightning.rollouts.generators.interface import Failure, GeneratedText

TROUBLES = {
    "too many": Response({"error": {"message": "slow down"}}, 429, {"Retry-After": "0.3"}),
    "too many, in ms": Response({"error": {"message": "slow down"}}, 429, {"Retry-After-Ms": "300"}),
    "timed out there": Response({"detail": "timeout"}, 408),
    "broken": Response(b"Internal Server Error", 500, {"Content-Type": "text/plain"}),
    "hung up": Response(hang_up="at once"),
    "hung up in the middle": Response(said().body, hang_up="in the middle"),
    "half of its JSON": Response(b'{"choices": [', 200),
    "no JSON": Response(b"<html>Welcome</html>", 200, {"Content-Type": "text/html"}),
    "no text": Response(b"\xff\xfe", 200),
    "nothing chosen": Response({"choices": []}),
    "given up": said(finish="abort"),
    "slow": Response(said().body, wait=1.0),
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
        return said() if attempt else Response({}, 429, {"Retry-After": formatdate(time.time() + 1.99, usegmt=True)})

    server.act = act
    sample(server)
    assert 0.9 < server.times[1] - server.times[0] < 2.5  # dates have whole seconds


def test_backing_off_takes_longer_each_time_and_ends(server):
    server.act = lambda body, attempt: Response({"error": {"message": "out of memory"}}, 500)
    (answer,) = sample(server, retries=3, backoff=0.1)
    assert answer.result == Failure("500: out of memory (asked 4 times)", final=False)
    pauses = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
    for pause, expected in zip(pauses, (0.1, 0.2, 0.4), strict=True):
        assert 0.5 * expected <= pause < expected + 0.1  # half to whole, and some time to answer


def test_nobody_waits_an_hour(server):
    server.act = lambda body, attempt: Response({"error": {"message": "quota"}}, 429, {"Retry-After": "3600"})
    assert sample(server)[0].result == Failure("429: quota (the server asks to wait 3600 s)", final=False)


def test_a_refused_prompt_is_not_tried_again(server):
    def act(body, attempt):
        too_long = body["messages"][0]["content"] == "1?"
        return Response({"detail": "prompt is too long"}, 400) if too_long else said()

    server.act = act
    results = {answer.prompt_id: answer.result for answer in sample(server, 3)}
    assert results.pop("p1") == Failure("400: prompt is too long", final=True)
    assert all(isinstance(result, GeneratedText) for result in results.values())
    assert len(server.bodies) == 3


def test_a_server_that_refuses_everything_is_not_asked_a_million_times(server):
    server.act = lambda body, attempt: Response({"detail": "Unexpected fields in the request: {'top_k'}"}, 422)
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
def test_what_no_prompt_can_fix_stops_at_once(server, status, body, advice):
    server.act = lambda _, attempt: Response(body, status)
    with pytest.raises(GeneratorError, match=f"(?s)answered {status}: .*{advice}"):
        sample(server, 50)
    assert len(server.bodies) <= 4


def test_a_dead_server_is_recognised_and_what_was_answered_stays(server):
    answers = generator(server, unreachable_timeout=0.6).sample(prompts(200), SAMPLING)
    got = [next(answers) for _ in range(10)]
    server.stop()
    began = time.monotonic()
    with pytest.raises(GeneratorError, match=r"has not answered for \d s .*refused.*Start it again"):
        got.extend(answers)  # keeps what came before the error
    assert 0.5 < time.monotonic() - began < 4
    assert 10 <= len(got) < 200
    assert all(isinstance(answer.result, GeneratedText) for answer in got)


def test_a_gateway_without_a_server_behind_it_is_dead_too(server):
    server.act = lambda body, attempt: Response(b"Bad Gateway", 502)
    with pytest.raises(GeneratorError, match=r"has not answered for .* 502: Bad Gateway"):
        sample(server, 50, unreachable_timeout=0.4)


def test_a_restart_is_waited_for(server, caplog):
    answers = generator(server, unreachable_timeout=20).sample(prompts(60, n=2), SAMPLING)
    got = [next(answers) for _ in range(5)]
    port = server.server_port
    server.stop()
    again = threading.Timer(0.7, lambda: started.append(ScriptedServer(port)))
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
    server.act = lambda body, attempt: Response(hang_up="at once") if body["messages"][0]["content"] == "1?" else said()
    results = {a.prompt_id: a.result for a in sample(server, 5, retries=2, unreachable_timeout=30)}
    broken = results.pop("p1")
    assert not broken.final
    assert "connection broke" in broken.reason
    assert all(isinstance(result, GeneratedText) for result in results.values())


ENDLESS = ["inf", "Infinity", "1e9", "1e400", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT", "1 Jan 99999 00:00:00 GMT"]


@pytest.mark.parametrize("wait", ENDLESS)
def test_no_server_is_waited_for_longer_than_we_have_patience(server, wait):
    """Neither one that is busy nor one that is not there."""
    began = time.monotonic()
    server.act = lambda body, attempt: Response({}, 429, {"Retry-After": wait})
    (answer,) = sample(server, retries=1)
    assert isinstance(answer.result, Failure)
    server.act = lambda body, attempt: Response(b"Bad Gateway", 503, {"Retry-After": wait})
    with pytest.raises(GeneratorError, match=r"has not answered for .* 503: Bad Gateway"):
        sample(server, unreachable_timeout=0.2)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("wait", ["nan", "-inf", "-5", "", "soon", "\xff", "Thu, 01 Jan 1970 00:00:00 GMT", "1 Jan -5"])
def test_a_wait_that_is_none_is_no_reason_to_stop(server, wait):
    server.act = lambda body, attempt: said() if attempt else Response({}, 429, {"Retry-After": wait})
    (answer,) = sample(server)
    assert isinstance(answer.result, GeneratedText)


ESCAPES = "\x1b]0;owned\x07\x1b[31m\u202e\ud800" + "x" * 5_000


@pytest.mark.parametrize("status", [400, 401, 429, 500, 503])
@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": ESCAPES}},
        {"detail": [{"loc": ["body", ESCAPES], "msg": "x"}]},
        {"error": {"message": {ESCAPES: [ESCAPES] * 1000}}},
        ESCAPES.encode("utf-8", "replace"),
    ],
)
def test_what_a_server_says_is_shown_without_its_escapes(server, caplog, status, body):
    server.act = lambda _, attempt: Response(body, status)
    told = []
    try:
        told = [answer.result.reason for answer in sample(server, retries=0, unreachable_timeout=0)]
    except GeneratorError as error:
        told = str(error).splitlines()
    told += caplog.messages
    assert told
    assert all(text.isprintable() and len(text) < 1_000 for text in told)
    assert "owned" in str(told)


def test_errors_of_any_form_end_in_a_sentence(server):
    """What is no error message but is sent with a status of one."""
    bodies = [b"", b"null", b"[]", b"5", b"\xff\xfe", b"[" * 100_000, b'{"error": ' * 5_000 + b"1" + b"}" * 5_000]
    bodies += [b'{"error": {"message": 5, "code": [], "param": {}, "type": 1}}', b'{"error": []}', b'{"message": {}}']
    bodies += [b'{"code": "insufficient_quota", "x": NaN}', b"9" * 5_000, b'{"error": "\\ud800"}']

    def act(body, attempt):
        number = int(body["messages"][0]["content"].removesuffix("?"))
        headers = {"Content-Type": "application/json; charset=hex"}
        return Response(bodies[number // 2], 400 if number % 3 else 500, headers) if number % 2 else said()

    server.act = act
    results = {a.prompt_id: a.result for a in sample(server, 2 * len(bodies) - 6, retries=0)}
    for number in range(2 * len(bodies) - 6):
        assert isinstance(results[f"p{number}"], Failure if number % 2 else GeneratedText), number


def test_half_a_key_is_not_left_of_a_long_message(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-0123456789")
    server.act = lambda body, attempt: Response({"detail": "x" * 490 + "sk-very-secret-0123456789"}, 400)
    assert "sk-" not in sample(server)[0].result.reason


def test_a_server_that_dies_of_its_first_requests_may_have_died_of_their_seeds(server):
    def act(body, attempt):
        threading.Thread(target=server.stop).start()
        time.sleep(0.1)
        return Response(hang_up="at once")

    server.act = act
    with pytest.raises(GeneratorError, match=r"hung up on its first requests.*--options '\{seeds: false\}'"):
        sample(server, unreachable_timeout=0.3)
