r"""Servers side by side, over HTTP: `lenvm serve` and vLLM, each without a length value model, with one, guided by it.

All servers run at the same time and are asked in turn, round after round, each by the same clients with the same
prompts; medians of the rounds. A guided request asks for a length, and the others for no more than that, so that all
write about as much. What guidance costs is the ratio of the tokens a second of the same server, unguided and guided.
That
the texts are those of `generate` is what the tests of `serving` hold.

Tokens a second are of all clients together; the time to the first token is the median of the requests, waiting
included. A value model costs a step of every request of `lenvm serve`, for it tells what remains; in vLLM it is not
asked about unguided ones.

    python benchmarks/serving.py                                       # the tiny world, `lenvm serve` alone
    python benchmarks/serving.py --vllm ~/vllm/bin/python              # beside a vLLM in an environment of its own
    python benchmarks/serving.py --generator DIR --lenvm DIR --vllm … --clients 16
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

import lenvm_lightning
from lenvm_lightning.errors import LenVMError
from lenvm_lightning.models import embedded

TOPICS = ["the sea", "rain", "a river", "the moon", "a farm", "winter", "a market", "birds", "a train", "bread"]
PROCESSOR = "lenvm_lightning.serving.vllm:LenVMLogitsProcessor"
HOME = Path(lenvm_lightning.__file__).parents[1]


@dataclass
class Served:
    """A server and what is asked of it."""

    name: str
    url: str
    model: str
    control: dict[str, Any] = field(default_factory=dict)


@dataclass
class Round:
    """What one round of requests came to."""

    tokens_per_s: float
    first_token_s: float
    tokens: int


async def ask_all(server: Served, requests: int, clients: int, length: int) -> Round:
    """So many requests by so many clients."""
    first, tokens = [], 0
    free = asyncio.Semaphore(clients)

    async def ask(client: openai.AsyncOpenAI, number: int) -> None:
        nonlocal tokens
        async with free:
            began = time.perf_counter()
            stream = await client.chat.completions.create(
                model=server.model,
                messages=[{"role": "user", "content": f"Write a text about {TOPICS[number % len(TOPICS)]}."}],
                stream=True,
                stream_options={"include_usage": True},
                max_tokens=2 * length if server.control else length,
                extra_body={"top_k": 15, **server.control},
            )
            waits = True
            async for piece in stream:
                if waits and piece.choices and piece.choices[0].delta.content:
                    first.append(time.perf_counter() - began)
                    waits = False
                if piece.usage:
                    tokens += piece.usage.completion_tokens

    began = time.perf_counter()
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        await asyncio.gather(*(ask(client, number) for number in range(requests)))
    return Round(tokens / (time.perf_counter() - began), statistics.median(first), tokens)


@contextlib.contextmanager
def started(command: list[str], log: Path, **environment: str) -> Iterator[str]:
    """The address of a server, once it answers; it ends with the block.

    Raises:
        LenVMError: it does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as said:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=said, stderr=said, env={**os.environ, **environment}
        )
    try:
        for _ in range(600):
            with (
                contextlib.suppress(urllib.error.URLError, OSError),
                urllib.request.urlopen(f"{url}/health", timeout=1),
            ):
                break
            if process.poll() is not None:
                break
            time.sleep(0.5)
        else:
            raise LenVMError(f"{command[0]} does not answer after 300 seconds")
        if process.poll() is not None:
            raise LenVMError(f"{' '.join(command)} did not start:\n{log.read_text(errors='replace')[-3000:]}")
        yield url
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()


def known_as(url: str) -> str:
    """How a server calls its model."""
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        return str(json.load(answer)["data"][0]["id"])


def servers(given: argparse.Namespace, folder: Path, stack: contextlib.ExitStack) -> list[Served]:
    """All servers, started."""
    model, control = given.name, f"equal-to:{given.length}"
    found: list[Served] = []
    own = [sys.executable, "-c", "from lenvm_lightning.cli.main import lenvm; lenvm()", "serve"]
    own += ["--generator", given.generator, "--dtype", given.dtype]
    # An embedded generator brings its value model: a copy of its folder has none.
    plain = [*own[:5], str(given.folder), *own[6:]]
    url = stack.enter_context(started(plain, folder / "lenvm-plain.log"))
    found.append(Served("lenvm serve", url, known_as(url)))
    url = stack.enter_context(started([*own, "--lenvm", given.lenvm], folder / "lenvm.log"))
    found.append(Served("lenvm serve, with a value model", url, known_as(url)))
    found.append(Served("lenvm serve, guided", url, known_as(url), {"lenvm": control}))
    if given.vllm:
        base = [given.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(given.folder)]
        base += ["--served-model-name", model, "--dtype", given.dtype, "--enforce-eager", "--max-model-len", "2048"]
        environment = {"PYTHONPATH": str(HOME), "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}
        url = stack.enter_context(started(base, folder / "vllm-plain.log", **environment))
        found.append(Served("vLLM", url, model))
        guided = [*base, "--logits-processors", PROCESSOR]
        url = stack.enter_context(started(guided, folder / "vllm.log", LENVM_MODEL=given.lenvm, **environment))
        found.append(Served("vLLM, with the processor", url, model))
        found.append(Served("vLLM, guided", url, model, {"vllm_xargs": {"lenvm": control}}))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", default="tiny-text")
    parser.add_argument("--lenvm", default="tiny-text-lenvm")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment with vLLM")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.quick:
        given.requests, given.clients, given.length, given.rounds = 4, 2, 16, 1
    is_embedded = embedded.is_embedded(given.generator)
    given.folder = embedded.folder(given.generator) if is_embedded else Path(given.generator)
    given.name = given.generator if is_embedded else Path(given.generator).name
    rounds: dict[str, list[Round]] = {}
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        folder = Path(place)
        if is_embedded:  # under a name that is not embedded, so that it comes without a value model
            (folder / "plain").symlink_to(given.folder)
            given.folder = folder / "plain"
        found = servers(given, folder, stack)
        for server in found:  # to get warm
            asyncio.run(ask_all(server, given.clients, given.clients, given.length))
        for _ in range(given.rounds):
            for server in found:
                rounds.setdefault(server.name, []).append(
                    asyncio.run(ask_all(server, given.requests, given.clients, given.length))
                )
    result: dict[str, Any] = {"generator": given.name, "clients": given.clients, "length": given.length, "servers": {}}
    print(f"{given.requests} requests by {given.clients} clients, about {given.length} tokens each, {given.dtype}")
    for name, some in rounds.items():
        row = {
            "tokens_per_s": statistics.median(one.tokens_per_s for one in some),
            "first_token_s": statistics.median(one.first_token_s for one in some),
            "tokens": some[0].tokens / given.requests,
        }
        result["servers"][name] = row
        print(
            f"  {name:32} {row['tokens_per_s']:8.1f} tokens/s   first token {row['first_token_s']:.2f} s   "
            f"{row['tokens']:.0f} tokens an answer"
        )
    speed = {name: row["tokens_per_s"] for name, row in result["servers"].items()}
    result["cost_of_guidance_lenvm"] = speed["lenvm serve"] / speed["lenvm serve, guided"]
    told = f"guided costs {result['cost_of_guidance_lenvm']:.2f}x in lenvm serve"
    if "vLLM" in speed:
        result["cost_of_guidance_vllm"] = speed["vLLM"] / speed["vLLM, guided"]
        told += f", {result['cost_of_guidance_vllm']:.2f}x in vLLM"
        result["processor_without_controls_vllm"] = speed["vLLM"] / speed["vLLM, with the processor"]
    print(told)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
