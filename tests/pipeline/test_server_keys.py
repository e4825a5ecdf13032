"""Whom a key may be sent to, and where an address with a password is written."""

import json
from pathlib import Path

import pytest
import yaml
from scripted_server import ScriptedServer, said
from small_generator import recipe

from lenvm_lightning.cli.evaluate import main as lenvm_eval
from lenvm_lightning.cli.main import main
from lenvm_lightning.pipeline.sample_stage import SampleSettings, settled
from lenvm_lightning.pipeline.server_keys import named_servers, without_foreign_keys

KEY = "sk-very-secret-0123456789"
FOREIGN = "http://gateway.example:81"
OPTIONS = {"server": "other", "processor": "tiny-text", "api_key_env": "MY_KEY"}
SAMPLE = {
    "generator": FOREIGN, "model": "m", "prompts": "tiny-math", "limit": 2, "n": 1, "max_tokens": 20,
    "options": OPTIONS, "out": "mine",
}  # fmt: skip
TASK = {
    "task": "gsm8k",
    "data": "tiny",
    "generator": FOREIGN,
    "model": "m",
    "limit": 1,
    "n": 1,
    "max_tokens": 20,
    "options": OPTIONS,
}


@pytest.fixture
def server(monkeypatch):
    """Stands for every server of the world, as a proxy does."""
    server = ScriptedServer()
    server.act = lambda body, attempt: said("4")
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, server.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    monkeypatch.setenv("MY_KEY", KEY)
    yield server
    server.stop()


def kept(address, *overrides, options=None):
    settings = SampleSettings(address, "tiny-math", options=options)
    [found] = without_foreign_keys([settings], named_servers(overrides))
    return (found.options or {}).get("api_key_env", "OPENAI_API_KEY") != ""


@pytest.mark.parametrize(
    ("address", "goes"),
    [
        ("https://api.openai.com/v1", True),
        ("https://eu.api.openai.com", True),
        ("http://api.openai.com/v1", False),  # everybody on the way could read it
        ("https://api.openai.com:8443/v1", False),
        ("https://api.openai.com.evil.example/v1", False),
        ("https://evilapi.openai.com", False),
        ("https://api.openai.com@evil.example/v1", False),
        ("https://evil.example/api.openai.com", False),
        ("https://mine.openai.azure.com", False),
        ("http://localhost:8000", True),
        ("http://LOCALHOST", True),
        ("http://127.0.0.1:8000", True),
        ("http://127.9.9.9", True),
        ("http://[::1]:8000", True),
        ("http://127.0.0.1.evil.example", False),
        ("http://localhost.evil.example", False),
        ("http://10.0.0.1", False),
        ("http://0.0.0.0:80", False),
        ("http://host:port", False),
        ("http://[::1", False),
        ("tiny-text", True),  # sends nothing
    ],
)
def test_a_key_goes_to_openai_and_to_this_machine(address, goes, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert kept(address) == goes
    assert ("no key is sent to " in capsys.readouterr().err) != goes


@pytest.mark.parametrize(
    ("address", "key", "value", "goes"),
    [
        (FOREIGN, "generator", FOREIGN, True),
        (FOREIGN, "sample.generator", f"'{FOREIGN}/v1'", True),
        (FOREIGN, "evaluate.generator", "http://me:pw@GATEWAY.example:81", True),
        ("https://gateway.example", "generator", "https://gateway.example:443/v1", True),
        (FOREIGN, "generator", "http://gateway.example:82", False),
        (FOREIGN, "generator", "https://gateway.example:81", False),
        (FOREIGN, "generator", "http://other.example:81", False),
        (FOREIGN, "generator", None, False),
        (FOREIGN, "sample.model", FOREIGN, False),
        (FOREIGN, "sample.options", "{api_key_env: MY_KEY}", False),
        ("http://host:port", "generator", "http://other:port", False),
    ],
)
def test_a_key_goes_where_the_command_line_says(address, key, value, goes):
    assert kept(address, (key, value)) == goes


@pytest.mark.parametrize("variable", [5, "", "A B", "\x1b[31m", None])
def test_variables_that_are_none_are_not_asked_for(variable, capsys):
    assert not kept(FOREIGN, options={"api_key_env": variable, "retries": 1})
    assert capsys.readouterr().err == ""


def test_every_server_is_told_once(capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    many = [SampleSettings(address, "tiny-math") for address in (FOREIGN, FOREIGN + "/v1", "http://b.example")]
    assert len(without_foreign_keys(many, frozenset())) == 3
    assert capsys.readouterr().err.splitlines() == [
        f"no key is sent to {host}: only the recipe names it. If $OPENAI_API_KEY may go there, name the server "
        "yourself: --generator ADDRESS"
        for host in ("http://b.example:80", "http://gateway.example:81")
    ]


@pytest.mark.parametrize("stages", [{"sample": SAMPLE}, {"evaluate": [TASK]}])
def test_a_recipe_cannot_send_a_key_to_a_server_of_its_own(here, server, stages, capsys):
    assert main(["run", recipe(here, **stages)]) == 0
    assert len(server.bodies) >= 1
    assert KEY not in str(server.seen_headers)
    assert "no key is sent to http://gateway.example:81: only the recipe names it" in capsys.readouterr().err


@pytest.mark.parametrize("stages", [{"sample": SAMPLE}, {"evaluate": [TASK]}])
def test_who_runs_it_can(here, server, stages, capsys, caplog):
    assert main(["run", recipe(here, **stages), "--generator", FOREIGN]) == 0
    assert {headers["authorization"] for headers in server.seen_headers} == {f"Bearer {KEY}"}
    assert "no key" not in capsys.readouterr().err
    assert "the key in $MY_KEY is sent to http://gateway.example:81/v1" in caplog.messages


def test_who_types_the_address_sends_the_key(here, server, caplog):
    command = f"sample --generator {FOREIGN} --model m --prompts tiny-math --limit 1 -n 1 --max-tokens 20 --out out"
    assert main([*command.split(), "--options", json.dumps(OPTIONS)]) == 0
    assert {headers["authorization"] for headers in server.seen_headers} == {f"Bearer {KEY}"}
    assert "the key in $MY_KEY is sent to http://gateway.example:81/v1" in caplog.messages


# -- passwords --------------------------------------------------------------------------------------------------------

SECRET = "http://me:hunter2@gateway.example:81"


def left_in(folder):
    """Names and bytes of everything that is there."""
    return b"\n".join(str(path).encode() + (path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*"))


def test_passwords_are_not_in_what_sampling_leaves(here, server, capsys, caplog):
    sample = {key: value for key, value in SAMPLE.items() if key != "out"}
    (here / "of_somebody.yaml").write_text(yaml.safe_dump({"sample": {**sample, "generator": SECRET}}))
    for words in (["--check"], [], []):
        assert main(["run", "of_somebody.yaml", *words]) == 0
    assert {headers["authorization"] for headers in server.seen_headers} == {"Basic bWU6aHVudGVyMg=="}
    assert b"hunter2" not in left_in(here / "runs")
    assert b"gateway.example-81-" in left_in(here / "runs" / "rollouts")
    assert "hunter2" not in "".join(capsys.readouterr()) + caplog.text


def test_passwords_are_not_in_the_settings_of_a_run():
    """As they go into its `recipe.yaml`; nor do they decide which folder it has."""
    with_password, without = (settled(SampleSettings(one, "tiny-math"), Path("runs")) for one in (SECRET, FOREIGN))
    assert with_password.as_dict() == without.as_dict()
    assert with_password.generator == SECRET


def test_passwords_are_not_in_what_an_evaluation_leaves(here, server, capsys, caplog, monkeypatch):
    words = f"--task gsm8k --data tiny --generator {SECRET} --model m --limit 1 --n 1 --max-tokens 20".split()
    assert lenvm_eval([*words, "--options", json.dumps(OPTIONS)]) == 0
    (here / "of_somebody.yaml").write_text(yaml.safe_dump({"evaluate": [{**TASK, "generator": SECRET}]}))
    typed = ["lightning", "run", "of_somebody.yaml", "--evaluate.generator", SECRET]
    monkeypatch.setattr("sys.argv", typed)
    assert main([*typed[1:], "--check"]) == 0
    assert main(typed[1:]) == 0
    assert {headers["authorization"] for headers in server.seen_headers} == {"Basic bWU6aHVudGVyMg=="}
    for folder in (here / "results", here / "runs"):
        assert FOREIGN.encode() in left_in(folder)  # the command, in the report
        assert b"hunter2" not in left_in(folder)
    assert "hunter2" not in "".join(capsys.readouterr()) + caplog.text


def test_passwords_are_not_in_errors(here, server, capsys):
    for words in (["--options", "{colour: 3}"], ["--options", "{retries: x}"], []):
        command = (
            f"sample --generator http://me:hunter2@127.0.0.1:9 --prompts tiny-math --out out {' '.join(words[:1])}"
        )
        assert main([*command.split(), *words[1:]]) == 2
        assert "hunter2" not in "".join(capsys.readouterr())
