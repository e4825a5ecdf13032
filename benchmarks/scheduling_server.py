"""The real half of `benchmarks/scheduling.py`: requests of mixed lengths through real `lenvm serve` processes.

One server as they come, one with `--order shortest`, and one that is told the true lengths as priorities: an oracle.
All are up at the same time and asked in turn, round after round, with the same prompts and seeds, so that all write the
same texts. So many clients each send their next request when the last one is answered.
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
from scheduling_simulation import spread
from serving import HOME, known_as, started

from lenvm_lightning.rollouts.generators.interface import Prompt

ORDERS = {"as they come": "arrival", "shortest": "shortest", "oracle": "arrival"}


@dataclass(frozen=True)
class Round:
    """What one round of requests came to.

    Attributes:
        latency: seconds from sending a request to its last token. Shape (N,).
        tokens: of the answers. Shape (N,).
        seconds: of the whole round.
    """

    latency: np.ndarray
    tokens: np.ndarray
    seconds: float

    def summary(self) -> dict[str, float]:
        """In seconds, and tokens a second."""
        return {
            "mean_latency": float(self.latency.mean()),
            "p99_latency": float(np.percentile(self.latency, 99)),
            "latency_a_token": float((self.latency / self.tokens).mean()),
            "throughput": float(self.tokens.sum() / self.seconds),
        }


async def ask_all(
    url: str, model: str, prompts: Sequence[Prompt], clients: int, most: int, priorities: Sequence[int] | None = None
) -> Round:
    """Every prompt once, with a seed of its own, by so many clients."""
    latency, tokens = np.zeros(len(prompts)), np.zeros(len(prompts))
    left = iter(range(len(prompts)))

    async def follow(client: openai.AsyncOpenAI) -> None:
        for number in left:
            extra: dict[str, Any] = {} if priorities is None else {"priority": int(priorities[number])}
            began = time.perf_counter()
            answer = await client.chat.completions.create(
                model=model, messages=prompts[number].messages, max_tokens=most, seed=number, extra_body=extra
            )
            latency[number] = time.perf_counter() - began
            tokens[number] = answer.usage.completion_tokens

    began = time.perf_counter()
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        await asyncio.gather(*(follow(client) for _ in range(clients)))
    return Round(latency, tokens, time.perf_counter() - began)


def real_run(
    prompts: Sequence[Prompt], clients: int, rows: int, rounds: int, most: int, few: int | None = None
) -> dict[str, Any]:
    """All rounds of all servers.

    Args:
        prompts: one request each.
        clients: that ask at the same time.
        rows: of the servers.
        rounds: of each server.
        most: ``max_tokens``.
        few: clients of one more round each, of a quarter of the requests, where nobody waits; None leaves it out.

    Returns:
        By name of the run: each policy's summaries, round by round.
    """
    command = [sys.executable, "-c", "from lenvm_lightning.cli.main import lenvm; lenvm()", "serve"]
    command += ["--rows", str(rows), "--order"]
    environment = {"PYTHONPATH": os.pathsep.join([str(HOME), os.environ.get("PYTHONPATH", "")])}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        urls = {}
        for name, order in ORDERS.items():
            log = Path(folder, f"{name}.log")
            urls[name] = stack.enter_context(started([*command, order], log, **environment))
        model = known_as(next(iter(urls.values())))

        def ask(name: str, count: int, some: Sequence[Prompt]) -> Round:
            priorities = true[: len(some)] if name == "oracle" else None
            return asyncio.run(ask_all(urls[name], model, some, count, most, priorities))

        true: Sequence[int] = [0] * len(prompts)
        warm = ask("as they come", clients, prompts)
        true = warm.tokens.astype(int).tolist()
        for name in ORDERS:
            ask(name, clients, prompts[: 2 * rows])
        runs = {f"{clients} clients": (clients, prompts, rounds)}
        if few is not None:
            runs[f"{few} clients"] = (few, prompts[: max(few, len(prompts) // 4)], rounds)
        for run, (count, some, times) in runs.items():
            found: dict[str, list[Round]] = {name: [] for name in ORDERS}
            for _ in range(times):
                for name in ORDERS:
                    found[name].append(ask(name, count, some))
            same = all((one.tokens == true[: len(some)]).all() for many in found.values() for one in many)
            results[run] = {"same_texts": bool(same)}
            results[run] |= {name: [one.summary() for one in many] for name, many in found.items()}
    return results


def told(run: str, result: dict[str, Any], rows: int) -> list[str]:
    """Lines about one run: seconds of the first policy, and ratios of the others to it, round by round."""
    measures = ("mean_latency", "p99_latency", "latency_a_token", "throughput")
    base = result["as they come"]
    lines = [f"\n{run}, {rows} rows; lengths the same in all rounds: {result['same_texts']}"]
    lines.append(f"  {'':14}" + "".join(f"{name:>18}" for name in measures))
    for name in ORDERS:
        if name == "as they come":
            cells = [f"{statistics.median(one[measure] for one in base):.3f}" for measure in measures]
        else:
            cells = []
            for measure in measures:
                ratios = [one[measure] / by[measure] for one, by in zip(result[name], base, strict=True)]
                cells.append("{:.3f} ± {:.3f}".format(*spread(ratios)))
        lines.append(f"  {name:14}" + "".join(f"{cell:>18}" for cell in cells))
    return lines
