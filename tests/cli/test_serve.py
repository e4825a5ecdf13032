"""``lenvm serve`` as a process: it serves, says what is wrong before it loads anything, and ends when it is told to."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from lenvm_lightning.cli.main import main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--host 0.0.0.0", "--host 0.0.0.0: anybody who reaches this machine could use it. Set $LENVM_API_KEY"),
        ("--host example.org", "could use it"),
        ("--port 99999", "--port 99999 is none: 0 to 65535"),
        ("--patience -1", "--patience -1 is none: a number, at least 0"),
        ("--patience inf", "--patience inf is none"),
        (
            "--order shortest --generator no/such",
            "--order shortest: nothing predicts lengths for 'no/such'. Give --lenvm",
        ),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(words, message, capsys, monkeypatch):
    monkeypatch.delenv("LENVM_API_KEY", raising=False)
    assert main(["serve", *words.split()]) == 2
    assert message in capsys.readouterr().err


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ask(port, path, body=None):
    headers = {"content-type": "application/json", "authorization": "Bearer secret"}
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=content, headers=headers)
    return urllib.request.urlopen(request, timeout=60)


def test_it_serves_and_writes_what_is_under_way_to_its_end_when_it_is_told_to_stop():
    port = free_port()
    command = [sys.executable, "-m", "lenvm_lightning", "serve", "--port", str(port), "--rows", "2"]
    environment = {**os.environ, "LENVM_API_KEY": "secret"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            until = time.monotonic() + 120
            while True:
                try:
                    ask(port, "/health")
                    break
                except OSError:
                    assert server.poll() is None, server.stderr.read()
                    assert time.monotonic() < until
                    time.sleep(0.1)
            question = [{"role": "user", "content": "Write a text about the sea."}]
            body = {"messages": question, "lenvm": "equal-to:300", "stream": True, "seed": 0}
            with ask(port, "/v1/chat/completions", body) as answer:
                first = answer.readline()
                server.send_signal(signal.SIGTERM)
                rest = answer.read().decode()
            assert first.startswith(b"data: ")
            assert '"finish_reason": "stop"' in rest
            assert rest.rstrip().endswith("data: [DONE]")
            assert server.wait(60) == 0
        finally:
            server.kill()
        told = server.stderr.read()
    assert "tiny-text, lengths by tiny-text-lenvm, 2 rows" in told
    assert f"http://127.0.0.1:{port} in a browser, http://127.0.0.1:{port}/v1 for OpenAI's clients" in told
    assert "Traceback" not in told
