"""Bodies of requests that are fuzzed: a server of the tiny world, asked over HTTP."""

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

from fuzz_targets import Run, Target
from served import SEA, Server, generator_of, serving

from lenvm_lightning.errors import LenVMError
from lenvm_lightning.serving.service import Limits

_ROUTES = {"chat": "/v1/chat/completions", "completion": "/v1/completions", "lengths": "/v1/lengths"}
_GOOD: dict[str, list[dict[str, Any]]] = {
    "chat": [
        {
            "model": "tiny-text",
            "messages": SEA,
            "max_tokens": 4,
            "lenvm": "equal-to:4",
            "logprobs": True,
            "top_logprobs": 2,
        },
        {"messages": SEA, "max_tokens": 3, "n": 2, "stop": ["."], "stream": True, "seed": 1, "temperature": 0.5},
    ],
    "completion": [
        {"prompt": ["The sea", "A hill"], "max_tokens": 3, "echo": True, "logprobs": 1, "top_p": 0.9},
        {"prompt": [1, 2, 3], "max_tokens": 2, "vllm_xargs": {"lenvm": "tilt:-5"}, "return_token_ids": True},
    ],
    "lengths": [
        {"prompt": "Write a text.", "completion": "The sea is wide."},
        {"messages": SEA},
    ],
}


_open = contextlib.ExitStack()


@functools.cache
def _server() -> Server:
    """One for all inputs, until `close_server`."""
    return _open.enter_context(serving(generator_of(), Limits(n=8, max_tokens=16, waiting=64)))


def close_server() -> None:
    """Its threads would keep the process from ending."""
    _open.close()
    _server.cache_clear()


def _requests(folder: Path) -> tuple[Run, dict[str, bytes]]:
    """Bodies that clients send. A refusal is one of ours; a status 500 is not, nor an answer that is no JSON."""
    server = _server()

    def run(name: str, data: bytes) -> None:
        status, headers, answer = server.ask(_ROUTES[name.split()[0]], data)
        assert status not in (500, 502, 503), (status, answer)
        if headers["content-type"].startswith("text/event-stream"):
            assert "server_error" not in answer, answer
            assert answer.rstrip().endswith("data: [DONE]"), answer
        else:
            assert isinstance(answer, dict), answer
        if status != 200:
            raise LenVMError(answer["error"]["message"])

    good = {f"{kind} {i}": json.dumps(body).encode() for kind, some in _GOOD.items() for i, body in enumerate(some)}
    return run, good


SERVER = {"requests to a server": Target(_requests, 0.3)}
