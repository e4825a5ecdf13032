"""What is sent where, and how much may come back in which time."""

import base64
import gzip
import json
import logging
import threading
import time

import pytest
from scripted_server import SAMPLING, Response, ScriptedServer, generator, models, prompts, said, sample

from lenvm_lightning.errors import GeneratorError
from lenvm_lightning.rollouts.generators.interface import Failure, GeneratedText
from lenvm_lightning.rollouts.generators.server import ServerGenerator
from lenvm_lightning.rollouts.generators.server.client import Credentials, read_address

KEY = "sk-very-secret-0123456789"


@pytest.mark.parametrize(
    ("given", "url", "shown", "user"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1", "http://localhost:8000/v1", None),
        ("localhost:8000/", "http://localhost:8000/v1", "http://localhost:8000/v1", None),
        ("https://host/api/v3/", "https://host/api/v3", "https://host/api/v3", None),
        ("http://me:a%40b@host", "http://host/v1", "http://host/v1", ("me", "a@b")),
        ("http://token@[::1]:80/v1", "http://[::1]:80/v1", "http://[::1]:80/v1", ("token", "")),
        ("http://host/v1?api-key=x", "http://host/v1?api-key=x", "http://host/v1", None),
    ],
)
def test_addresses_are_taken_apart(given, url, shown, user):
    found = read_address(given)
    assert (found.url, found.shown, found.user) == (url, shown, user)
    assert "a@b" not in repr(found)


@pytest.mark.parametrize(
    "given",
    ["", "http://", "ftp://x", "http://[::1", "http://host:port", "http://host:99999", "http://me:pass#word@host:x",
     "http://me:hunter2/pass@host", "http://\x1b[31m:x"],
)  # fmt: skip
def test_what_is_no_address_is_told_without_its_password(given):
    with pytest.raises(GeneratorError, match="is no address of a server") as error:
        read_address(given)
    assert "pass" not in str(error.value)
    assert "hunter2" not in str(error.value)
    assert str(error.value).isprintable()


def test_user_and_password_of_the_address_are_sent_and_shown_nowhere(server, caplog, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    basic = base64.b64encode(b"me:hunter2").decode()

    def act(body, attempt):
        return said() if "0?" in str(body) else Response({"detail": f"no {basic}, hunter2!"}, 400)

    server.act = act
    made = ServerGenerator(server.url.replace("//", "//me:hunter2@"), processor="tiny-text")
    answers = list(made.sample(prompts(2), SAMPLING))
    assert {headers.get("authorization") for headers in server.seen_headers} == {f"Basic {basic}"}
    assert {type(answer.result) for answer in answers} == {GeneratedText, Failure}
    told = [repr(vars(made)), repr(answers), *(record.getMessage() for record in caplog.records)]
    assert not [text for text in told if "hunter2" in text or basic in text or KEY in text]
    assert f"user and password of the address are sent to {server.url}/v1" in caplog.messages


def test_which_key_goes_where_is_told(server, caplog, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    generator(server, api_key_env="MY_KEY")
    assert f"the key in $MY_KEY is sent to {server.url}/v1" in caplog.messages
    caplog.clear()
    generator(server, api_key_env="NOT_SET_ANYWHERE")
    assert caplog.messages == []


def test_without_a_variable_nothing_of_the_environment_is_sent(server, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"Authorization: Bearer {KEY}\nX-Mine: {KEY}")
    answers = sample(server, model=None, server="auto", api_key_env="")
    assert isinstance(answers[0].result, GeneratedText)
    assert len(server.seen_headers) > 1
    assert KEY not in str(server.seen_headers)


@pytest.mark.parametrize("key", ["ключ", "a\nb", "\x1b[31m", "half \udc80"])
def test_a_key_that_cannot_be_one_is_told(server, monkeypatch, key):
    with monkeypatch.context() as patched:
        patched.setenv("OPENAI_API_KEY", key)
        with pytest.raises(GeneratorError, match=r"^\$OPENAI_API_KEY holds characters that no key can have") as error:
            generator(server)
    assert key not in str(error.value)


def test_credentials_hide_themselves(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    assert Credentials("MY_KEY").hide(f"who is {KEY}?") == "who is ***?"
    assert Credentials("", ("me", "abc")).hide("abc") == "abc"  # a part of too many words
    assert "hunter2" not in repr(Credentials("", ("me", "hunter2")))


# -- redirects --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_prompts_are_not_sent_on_to_another_host(server, status):
    other = ScriptedServer()
    server.act = lambda body, attempt: Response({}, status, {"Location": f"http://me:hunter2@{other.url[7:]}/v1/x"})
    with pytest.raises(GeneratorError) as error:
        sample(server, 3)
    other.stop()
    assert f"{status}: it sends every request on to {other.url}\nRedirects are not followed" in str(error.value)
    assert "hunter2" not in str(error.value)
    assert other.bodies == other.seen_headers == []


def test_nor_does_the_list_of_models_lead_there(server):
    other = ScriptedServer()
    server.pages["/v1/models"] = Response({}, 307, {"Location": f"{other.url}/v1/models"})
    with pytest.raises(GeneratorError, match=f"on to {other.url}\nRedirects are not followed"):
        generator(server, model=None)
    other.stop()
    assert other.seen_headers == []


@pytest.mark.parametrize(
    ("location", "told"),
    [
        ({"Location": "/v2/chat"}, "another path of its own"),
        ({}, "an address that it does not name"),
        ({"Location": "//other:5/x"}, "other:5"),
    ],
)
def test_redirects_to_nowhere_are_told_too(server, location, told):
    server.act = lambda body, attempt: Response({}, 307, location)
    with pytest.raises(GeneratorError, match=f"on to {told}"):
        sample(server)


# -- how much, and how long -------------------------------------------------------------------------------------------


def test_a_reply_that_never_ends_is_given_up(server):
    """Bytes come all the time, so that no single read takes long."""
    stop = threading.Event()

    class Drip(bytes):
        pass

    def act(body, attempt):
        return Response(Drip(b" " * 10_000)) if "1?" in str(body) else said()

    server.drip = lambda content: isinstance(content, Drip) and not stop.is_set()
    server.act = act
    began = time.monotonic()
    results = {a.prompt_id: a.result for a in sample(server, 3, timeout=0.5, retries=1)}
    stop.set()
    assert time.monotonic() - began < 4
    assert results.pop("p1") == Failure("no answer in time (it was not whole after 0.5 s) (asked 2 times)", final=False)
    assert all(isinstance(result, GeneratedText) for result in results.values())


@pytest.mark.parametrize("status", [200, 500])
def test_a_small_reply_that_unpacks_to_a_large_one_is_given_up(server, status):
    bomb = gzip.compress(b"x" * 2**26, 1)
    assert len(bomb) < 2**20

    def act(body, attempt):
        return Response(bomb, status, {"Content-Encoding": "gzip"}) if "1?" in str(body) else said()

    server.act = act
    results = {a.prompt_id: a.result for a in sample(server, 3, retries=0)}
    assert results.pop("p1") == Failure("the server's answer is longer than 16 MiB (asked 1 times)", final=False)
    assert all(isinstance(result, GeneratedText) for result in results.values())


def test_a_packed_reply_is_read(server):
    packed = gzip.compress(json.dumps(said().body).encode())
    server.act = lambda body, attempt: Response(packed, headers={"Content-Encoding": "gzip"})
    assert isinstance(sample(server)[0].result, GeneratedText)
    server.act = lambda body, attempt: Response(packed[:20], headers={"Content-Encoding": "gzip"})
    assert isinstance(sample(server, retries=0)[0].result, Failure)


def test_a_list_of_models_may_not_be_endless_either(server):
    server.pages["/v1/models"] = Response(gzip.compress(b" " * 2**25), headers={"Content-Encoding": "gzip"})
    with pytest.raises(GeneratorError, match=r"does not say which one it serves .*longer than 16 MiB"):
        generator(server, model=None)
    server.pages["/v1/models"] = models(("m", "vllm"))
