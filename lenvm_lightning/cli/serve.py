"""``lenvm serve``: an OpenAI-compatible server with control of length."""

import argparse
import ipaddress
import os
import signal
import sys
from importlib.util import find_spec
from typing import Any

from ..errors import GenerationError
from ..models import embedded
from .models import add_models, open_lenvm

EXAMPLES = """examples:
  lenvm serve                                                           the embedded tiny world, on port 8000
  lenvm serve --generator Qwen/Qwen2.5-3B-Instruct --lenvm runs/q/model --port 9000
  curl http://localhost:8000/v1/chat/completions -H 'content-type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "Write a text about the sea."}], "lenvm": "equal-to:64"}'

Requests name a control by `lenvm` (or `vllm_xargs`), such as "at-most:64"; answers say what length was expected.
$LENVM_API_KEY is asked of every request, where it is set.
"""
_KEY = "LENVM_API_KEY"
_UVICORN: dict[str, Any] = {"log_level": "warning", "timeout_graceful_shutdown": 300}  # for a client that reads no more
_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``lenvm serve``."""
    add_models(parser, "an embedded model, a model directory or a hub id (default: tiny-text)")
    parser.add_argument("--host", default="127.0.0.1", help="to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="to listen at (default: 8000)")
    parser.add_argument("--without-key", action="store_true", help=f"serve other machines without ${_KEY}")
    parser.add_argument("--rows", type=int, help="completions written side by side (default: by free memory)")
    parser.add_argument("--waiting", type=int, help="completions that wait beside those; more get status 429")
    parser.add_argument("--max-tokens", type=int, help="largest max_tokens of a request")
    parser.add_argument(
        "--order",
        choices=("arrival", "shortest"),
        default="arrival",
        help="which of the requests that wait start first: those that came first (default), or those whose answers the "
        "length value model expects to be short; a request's priority goes before both",
    )
    parser.add_argument(
        "--patience",
        type=float,
        help="a request is overtaken by those alone that come within so many steps for each token that is expected of "
        "it (default: 8)",
    )


def execute(arguments: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; what is under way then is written to its end.

    Returns:
        Exit status: 0.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise GenerationError(f"{', '.join(missing)} is missing: pip install 'lenvm-lightning[serving]'")
    api_key = os.environ.get(_KEY) or None
    if api_key is None and not _is_loopback(arguments.host) and not arguments.without_key:
        raise GenerationError(
            f"--host {arguments.host}: anybody who reaches this machine could use it. Set ${_KEY} to the key that "
            "clients must send, or say --without-key"
        )
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise GenerationError(f"${_KEY} holds blanks or characters beyond ASCII, which no client can send in a header")
    if not 0 <= arguments.port < 2**16:
        raise GenerationError(f"--port {arguments.port} is none: 0 to 65535")
    if (arguments.waiting or 0) < 0 or (arguments.max_tokens is not None and arguments.max_tokens < 1):
        raise GenerationError("--waiting is at least 0, --max-tokens at least 1")
    if arguments.patience is not None and not 0 <= arguments.patience < float("inf"):
        raise GenerationError(f"--patience {arguments.patience:g} is none: a number, at least 0")
    name = arguments.generator or "tiny-text"
    guided = arguments.lenvm is not None or embedded.value_model_of(name) is not None
    if arguments.order == "shortest" and not guided:
        raise GenerationError(f"--order shortest: nothing predicts lengths for {name!r}. Give --lenvm, or leave it out")
    import uvicorn

    from ..rollouts.generators.local import LocalGenerator
    from ..rollouts.generators.local.loading import require_same_tokens
    from ..serving.app import build_app
    from ..serving.service import Limits, Service
    from ..serving.waiting import PATIENCE

    lenvm = open_lenvm(arguments, name) if guided else None
    generator = LocalGenerator.load(name, dtype=arguments.dtype, device=arguments.device, rows=arguments.rows)
    if arguments.lenvm is not None:
        require_same_tokens(generator.tokenizer, arguments.lenvm)
    generator.lenvm = lenvm
    given = {"waiting": arguments.waiting, "max_tokens": arguments.max_tokens}
    limits = Limits(**{name: number for name, number in given.items() if number is not None})
    if notice := embedded.notice(name):
        print(notice, file=sys.stderr)
    told = f"lengths by {arguments.lenvm or embedded.value_model_of(name)}" if lenvm else "no length value model"
    print(f"{generator.name}, {told}, {generator.rows} rows", file=sys.stderr)
    if arguments.port:  # 0 leaves it to the system
        host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        address = f"http://{host}:{arguments.port}"
        print(f"{address} in a browser, {address}/v1 for OpenAI's clients; Ctrl-C ends it", file=sys.stderr)
    patience = PATIENCE if arguments.patience is None else arguments.patience
    with Service(generator, limits, arguments.order, patience) as service:
        # uvicorn raises the signal that has stopped it once more, when everything is written: then it is no news.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        uvicorn.run(build_app(service, api_key), host=arguments.host, port=arguments.port, **_UVICORN)
    return 0


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
