"""The real half of `benchmarks/scheduling.py`: requests of mixed lengths through real `lenvm serve` processes.

One server as they come, one with `--order shortest`, and one that is told the true lengths as priorities: an oracle.
All are up at the same time and asked in turn, round after round, with the same prompts and seeds, so that all write the
same texts. So many clients each send their next request when the last one is answered. As many clients as requests ask
all at once. Of fewer, who all wait all the time, the mean latency is nearly the same in any order: by Little's law it
is the number of clients divided by the requests that are answered in a second, and that is up to the server alone.

Two clocks: seconds, and CPU seconds of the server that is asked, which is about what latency would be on a machine with
nothing else to do, as long as the server is never idle. Where other work shares the cores, read the second.
"""

import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
from scheduling_simulation import spread
from serving import HOME, known_as, started

from lenvm_lightning.rollouts.generators.interface import Prompt

CLOCKS = ("seconds", "CPU seconds of the server")
MEASURES = ("mean_latency", "p99_latency", "latency_a_token", "throughput")
ORDERS = {"as they come": "arrival", "shortest": "shortest", "oracle": "arrival"}


@dataclass(frozen=True)
class Round:
    """What one round of requests came to.

    Attributes:
        latency: from sending a request to its last token, in seconds of both `CLOCKS`. Shape (2, N).
        tokens: of the answers. Shape (N,).
        seconds: of the whole round. Shape (2,).
    """

    latency: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray

    def summary(self, clock: int) -> dict[str, float]:
        """In seconds of a clock, and tokens a second."""
        latency = self.latency[clock]
        return {
            "mean_latency": float(latency.mean()),
            "p99_latency": float(np.percentile(latency, 99)),
            "latency_a_token": float((latency / self.tokens).mean()),
            "throughput": float(self.tokens.sum() / self.seconds[clock]),
        }


@dataclass(frozen=True)
class Asked:
    """A server that is asked.

    Attributes:
        url: its address.
        process: its own.
    """

    url: str
    process: psutil.Process

    def now(self) -> np.ndarray:
        """Seconds of both clocks. Shape (2,)."""
        spent = self.process.cpu_times()
        return np.array([time.perf_counter(), spent.user + spent.system])


async def ask_all(
    server: Asked,
    model: str,
    prompts: Sequence[Prompt],
    clients: int,
    most: int,
    priorities: Sequence[int] | None = None,
) -> Round:
    """Every prompt once, with a seed of its own, by so many clients."""
    latency, tokens = np.zeros((2, len(prompts))), np.zeros(len(prompts))
    left = iter(range(len(prompts)))

    async def follow(client: openai.AsyncOpenAI) -> None:
        for number in left:
            extra: dict[str, Any] = {} if priorities is None else {"priority": int(priorities[number])}
            began = server.now()
            answer = await client.chat.completions.create(
                model=model, messages=prompts[number].messages, max_tokens=most, seed=number, extra_body=extra
            )
            latency[:, number] = server.now() - began
            tokens[number] = answer.usage.completion_tokens

    began = server.now()
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        await asyncio.gather(*(follow(client) for _ in range(clients)))
    return Round(latency, tokens, server.now() - began)


def real_run(
    prompts: Sequence[Prompt], clients: Sequence[int], rows: int, rounds: int, most: int, few: int | None = None
) -> dict[str, Any]:
    """All rounds of all servers.

    Args:
        prompts: one request each.
        clients: that ask at the same time, of each run.
        rows: of the servers.
        rounds: of each server.
        most: ``max_tokens``.
        few: clients of one more run, with a quarter of the requests, where nobody waits; None leaves it out.

    Returns:
        By name of the run: whether all rounds wrote the same texts, and of each clock each policy's summaries, round by
        round.
    """
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        servers = {name: _serve(stack, Path(folder, f"{name}.log"), order, rows) for name, order in ORDERS.items()}
        model = known_as(servers["oracle"].url)
        runs = {f"{count} clients": (count, prompts) for count in clients}
        if few is not None:
            runs[f"{few} clients"] = (few, prompts[: max(few, len(prompts) // 4)])
        for run, (count, some) in runs.items():
            found: dict[str, list[Round]] = {name: [] for name in ORDERS}
            for server in servers.values():
                asyncio.run(ask_all(server, model, some[: 2 * rows], count, most))  # to get warm
            for _ in range(rounds):
                for name, server in servers.items():
                    first = found["as they come"]
                    true = first[0].tokens.astype(int).tolist() if name == "oracle" else None
                    found[name].append(asyncio.run(ask_all(server, model, some, count, most, true)))
                    print(f"{run}, {name}: {found[name][-1].summary(0)}", file=sys.stderr, flush=True)
            lengths = found["as they come"][0].tokens
            results[run] = {"same_texts": all((one.tokens == lengths).all() for many in found.values() for one in many)}
            for number, clock in enumerate(CLOCKS):
                results[run][clock] = {name: [one.summary(number) for one in many] for name, many in found.items()}
    return results


def _serve(stack: contextlib.ExitStack, log: Path, order: str, rows: int) -> Asked:
    """Start a server, which ends with the stack."""
    command = [sys.executable, "-c", "from lenvm_lightning.cli.main import lenvm; lenvm()", "serve"]
    environment = {"PYTHONPATH": os.pathsep.join([str(HOME), os.environ.get("PYTHONPATH", "")])}
    before = set(psutil.Process().children())
    url = stack.enter_context(started([*command, "--rows", str(rows), "--order", order], log, **environment))
    [process] = set(psutil.Process().children()) - before
    return Asked(url, process)


def told(run: str, result: dict[str, Any], rows: int) -> list[str]:
    """Lines about one run: medians of the first policy, and ratios of the others to it, round by round."""
    lines = [f"\n{run}, {rows} rows; lengths the same in all rounds: {result['same_texts']}"]
    for clock in CLOCKS:
        base = result[clock]["as they come"]
        lines.append(f"  {clock:26}" + "".join(f"{name:>18}" for name in MEASURES))
        for name, many in result[clock].items():
            cells = []
            for measure in MEASURES:
                ratios = [one[measure] / by[measure] for one, by in zip(many, base, strict=True)]
                median = statistics.median(one[measure] for one in base)
                cells.append(f"{median:.3f}" if many is base else "{:.3f} ± {:.3f}".format(*spread(ratios)))
            lines.append(f"  {name:26}" + "".join(f"{cell:>18}" for cell in cells))
    return lines
