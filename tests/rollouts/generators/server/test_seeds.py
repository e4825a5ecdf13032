"""Servers that cannot do with a seed."""

import logging

import pytest
from scripted_server import Response, said, sample

from lenvm_lightning.rollouts.generators.interface import Failure

OFFSET = "EngineCore failed: RuntimeError: CPU Generator does not use offset"


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "unknown field: seed"),
        (400, "Per-request seeds are not supported on this device"),
        (422, "Extra inputs are not permitted: body.seed"),
        (500, OFFSET),
    ],
)
def test_a_refused_seed_is_left_out_from_then_on(server, caplog, status, message):
    server.act = lambda body, attempt: Response({"detail": message}, status) if "seed" in body else said()
    results = [answer.result for answer in sample(server, 6, concurrency=1)]
    assert [result.text for result in results] == ["Four."] * 6
    assert [result.seed for result in results] == [None] * 6
    assert [("seed" in body) for body in server.bodies] == [True] + [False] * 6
    (told,) = [m for m in caplog.messages if "does not take seeds" in m]
    assert message in told
    assert "cannot be sampled a second time" in told


def test_completions_that_had_one_keep_it(server):
    """The first of two has a seed and is answered."""
    server.act = lambda body, attempt: (
        Response({"detail": "no seed, please"}, 400) if "seed" in body and "1?" in str(body) else said()
    )
    results = {a.prompt_id: a.result.seed for a in sample(server, 3, concurrency=1)}
    assert results["p0"] is not None
    assert results["p1"] is results["p2"] is None


def test_a_request_that_is_refused_either_way_says_nothing_about_seeds(server, caplog):
    """The word may be the prompt's."""
    server.act = lambda body, attempt: (
        Response({"detail": "too long: 'a seed ...'"}, 400) if "1?" in str(body) else said()
    )
    results = {a.prompt_id: a.result for a in sample(server, 3, concurrency=1)}
    assert results["p1"] == Failure("400: too long: 'a seed ...'", final=True)
    assert results["p0"].seed is not None
    assert results["p2"].seed is not None
    assert not [m for m in caplog.messages if "seeds" in m]


@pytest.mark.parametrize(("status", "message"), [(400, "too long"), (429, "seed"), (503, "seed")])
def test_other_errors_are_no_reason_to_leave_it_out(server, status, message):
    server.act = lambda body, attempt: Response({"detail": message}, status) if not attempt else said()
    sample(server)
    assert all("seed" in body for body in server.bodies)


def test_seeds_can_be_left_out_from_the_beginning(server, caplog):
    (answer,) = sample(server, seeds=False)
    assert "seed" not in server.bodies[0]
    assert answer.result.seed is None
    assert "seed" not in caplog.text


def test_the_key_is_not_in_the_note(server, caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-0123456789")
    server.act = lambda body, attempt: (
        Response({"detail": "seed\x1b[31m of sk-very-secret-0123456789"}, 400) if "seed" in body else said()
    )
    sample(server)
    assert "sk-very" not in caplog.text
    assert "\x1b" not in caplog.text
