"""A server with continuous batching, simulated: which request is started when, and what waiting costs.

The clock counts steps. In a step every row that is not free writes one token. A prompt that is started stops all rows
for ``prefill`` steps a token of it. Requests are started between steps only, as rows are free, in the order of their
keys; those of the same key as they came. Nothing is preempted. All of `benchmarks/scheduling.py`'s simulated numbers
come from here; the tests compute some of them on paper.
"""

import heapq
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lenvm_lightning.distributions.length_distribution import LengthDistribution, from_quantiles

TAIL = 0.9  # the worst tenth is the tail of CVaR
POINTS = 200  # quantiles that a mean or a CVaR is computed from


@dataclass(frozen=True)
class Arrival:
    """A request to the simulated server.

    Attributes:
        at: when it comes, in steps.
        tokens: of its answer, the end included, at least 1.
        prompt_tokens: of its prompt.
        key: the smallest starts first.
    """

    at: float
    tokens: int
    prompt_tokens: int = 0
    key: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """How it went.

    Attributes:
        latency: steps from a request's arrival to its last token. Shape (N,), in the order of the arrivals.
        tokens: of the answers. Shape (N,).
        makespan: steps from the first arrival to the last token.
    """

    latency: np.ndarray
    tokens: np.ndarray
    makespan: float

    def summary(self) -> dict[str, float]:
        """Mean and p99 latency, mean latency a token, in steps, and tokens a step."""
        return {
            "mean_latency": float(self.latency.mean()),
            "p99_latency": float(np.percentile(self.latency, 99)),
            "latency_a_token": float((self.latency / self.tokens).mean()),
            "throughput": float(self.tokens.sum() / self.makespan),
        }


def simulate(arrivals: Sequence[Arrival], rows: int, prefill: float = 0.0, patience: float | None = None) -> Outcome:
    """Serve some requests.

    Args:
        arrivals: in the order they come.
        rows: answers written side by side.
        prefill: steps that a token of a prompt stops all rows for.
        patience: steps for each unit of its key by which a request comes nearer to its turn while it waits, as
            `lenvm serve --patience`; None = keys stay as they are.
    """
    waiting: list[tuple[float, int]] = []  # by key, then by number
    running: list[tuple[int, int]] = []  # steps written by all when it ends, number
    ends = np.zeros(len(arrivals))
    now, written, came = arrivals[0].at, 0, 0  # written: steps since the beginning, prefills not counted
    while came < len(arrivals) or waiting or running:
        if not waiting and not running:
            now = max(now, arrivals[came].at)
        # 1. Who has come, waits.
        while came < len(arrivals) and arrivals[came].at <= now:
            one = arrivals[came]
            heapq.heappush(waiting, (one.key if patience is None else one.at + patience * one.key, came))
            came += 1
        # 2. Free rows are filled.
        while waiting and len(running) < rows:
            _, number = heapq.heappop(waiting)
            now += prefill * arrivals[number].prompt_tokens
            heapq.heappush(running, (written + arrivals[number].tokens, number))
        # 3. As many steps as nothing else can happen in.
        steps = running[0][0] - written
        if len(running) < rows and came < len(arrivals):
            steps = min(steps, max(1, int(np.ceil(arrivals[came].at - now))))
        now, written = now + steps, written + steps
        # 4. Who has ended, frees a row.
        while running and running[0][0] == written:
            ends[heapq.heappop(running)[1]] = now
    came_at = np.array([one.at for one in arrivals])
    tokens = np.array([one.tokens for one in arrivals])
    return Outcome(ends - came_at, tokens, float(ends.max() - came_at[0]))


# -- when requests come ---


def gaps_of(shape: str, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Steps between arrivals.

    Args:
        shape: ``poisson``; ``bursty`` = gamma with a coefficient of variation of 2.5; ``at once`` = all at the start.
        count: of them.
        rate: requests a step.
        rng: where they come from.

    Returns:
        Shape (count,).
    """
    if shape == "at once":
        return np.zeros(count)
    variation = {"poisson": 1.0, "bursty": 2.5}[shape]
    return rng.gamma(variation**-2, variation**2 / rate, count)


# -- what a scheduler knows ---


@dataclass(frozen=True)
class Known:
    """What a scheduler may be told of requests.

    Attributes:
        tokens: true ones. Shape (N,).
        expected: the mean of what was predicted. Shape (N,).
        lengths: what was predicted, of N states.
        prompt_tokens: shape (N,).
    """

    tokens: np.ndarray
    expected: np.ndarray
    lengths: LengthDistribution
    prompt_tokens: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]]) -> "Known":
        """Of the rows of a file, see `benchmarks/scheduling.py`."""
        levels = sorted(rows[0]["quantiles"], key=float)
        quantiles = torch.tensor([[row["quantiles"][level] for level in levels] for row in rows], dtype=torch.float64)
        lengths = from_quantiles(quantiles, torch.tensor(list(map(float, levels)), dtype=torch.float64))
        means = lengths.mean().numpy()
        given = np.array([row.get("expected", mean) for row, mean in zip(rows, means, strict=True)])
        columns = (np.array([row[name] for row in rows]) for name in ("tokens", "prompt_tokens"))
        tokens, prompt_tokens = columns
        return cls(tokens, given, lengths, prompt_tokens)


def cvar(lengths: LengthDistribution, level: float = TAIL) -> np.ndarray:
    """Mean tokens of the longest share ``1 - level``, numerically. Shape (N,)."""
    inside = (np.arange(POINTS) + 0.5) / POINTS
    return np.mean([lengths.quantile(level + (1 - level) * one).numpy() for one in inside], axis=0)


def tail_inflated(lengths: LengthDistribution) -> np.ndarray:
    """Expectation plus CVaR, as TIE (arXiv 2604.00499) inflates an expectation by its tail. Shape (N,).

    Theirs is of a log-t distribution, with a weight of the tail that we do not know: here it is of the predicted
    distribution, with weight 1.
    """
    return lengths.mean().numpy() + cvar(lengths)


POLICIES: dict[str, Callable[[Known], np.ndarray]] = {
    "as they come": lambda known: np.zeros(len(known.tokens)),
    "oracle": lambda known: known.tokens.astype(float),
    "expected": lambda known: known.expected,
    "quantile .5": lambda known: known.lengths.quantile(0.5).numpy(),
    "quantile .9": lambda known: known.lengths.quantile(0.9).numpy(),
    "CVaR .9": lambda known: cvar(known.lengths),
    "mean + CVaR .9": lambda known: tail_inflated(known.lengths),
    "longest first": lambda known: -known.expected,
}


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean of seeds, and half of their range."""
    return statistics.fmean(values), (max(values) - min(values)) / 2
