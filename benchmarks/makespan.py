r"""How long a batch of completions takes to its last token: what is started first, and whether the last are waited for.

A batch has more completions than the generator has rows, as in reinforcement learning: a row that is free takes the
next completion, and in the end all but a few rows wait for the longest. The makespan is the number of decode steps, or
the seconds, from the first token to the last.

Measured with the generators of the tiny world, the same batch in three orders: at random, by what the length value
model expects at the end of the prompt (``lenvm sample --longest-first``, its prediction included in the seconds), and
by the oracle, which knows the mean length of each prompt's completions. Beside them ``--abort-at-quantile``, in the
random order, whose batch ends when a share of it has. The orders take turns in one process; a ratio is the median over
the rounds. All must write the same tokens (the aborted ones: the first of them), or nothing is printed.

Then simulated, a row a token a step: the lengths of the batch, or those of another one (``--lengths FILE``), on more
and fewer rows, with predictions whose logarithm is off by a normal error of so many nats. ``bound`` is what no order
can be below: the longest completion, or all tokens divided by the rows. Ratios are means over random orders and errors.

    python benchmarks/makespan.py                                   # minutes on one core
    python benchmarks/makespan.py --lengths rollouts/mine/rollouts.jsonl --simulate-only
"""

import argparse
import heapq
import json
import math
import random
import statistics
import time
import unittest.mock
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lenvm_lightning.decoding.engine import Engine
from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.errors import LenVMError
from lenvm_lightning.evaluation.prediction import predict_lengths
from lenvm_lightning.models.dtypes import open_value_model
from lenvm_lightning.pipeline.longest_first import order_by
from lenvm_lightning.rollouts.generators.interface import GeneratedText, Prompt, PromptRequest
from lenvm_lightning.rollouts.generators.local import LocalGenerator
from lenvm_lightning.rollouts.quantile_limit import QuantileLimit, ended_in
from lenvm_lightning.tinyworld import NOTICE
from lenvm_lightning.tinyworld.prompt_sets import prompt_set

Batch = dict[tuple[str, int], list[int]]  # token ids by (prompt_id, number)


def makespan(lengths: Sequence[int], rows: int) -> int:
    """Steps until all completions are written, each begun in this order when a row is free."""
    ends = [0] * rows
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def bound(lengths: Sequence[int], rows: int) -> int:
    """Steps that no order of beginning can be below."""
    return max(max(lengths), math.ceil(sum(lengths) / rows))


def aborted_makespan(lengths: Sequence[int], rows: int, quantile: float) -> int:
    """Steps with a limit that falls while they are written, as `QuantileLimit` does."""
    limit = QuantileLimit(quantile, len(lengths), max(lengths))
    left, running, step = list(reversed(lengths)), [], 0
    while left or running:
        while left and len(running) < rows:
            running.append([0, left.pop()])
        step += 1
        most = limit()
        for one in running:
            one[0] += 1
        for written, length in running:
            if written == length:
                limit.ended(length)
        running = [one for one in running if one[0] < one[1] and one[0] < most]
    return step


# -- measured ---------------------------------------------------------------------------------------------------------


def write(generator: LocalGenerator, prompts: list[Prompt], args: argparse.Namespace, abort: bool) -> dict[str, Any]:
    """The batch in the order of its prompts: token ids, steps, tokens written."""
    limit = QuantileLimit(args.quantile, len(prompts) * args.n, args.max_tokens) if abort else None
    requests = [PromptRequest(prompt, tuple(range(args.n)), limit=limit) for prompt in prompts]
    batch: Batch = {}
    steps, step, before = 0, Engine._step, generator.tokens_written

    def counted(engine: Engine[Any]) -> Any:
        nonlocal steps
        steps += 1
        return step(engine)

    with unittest.mock.patch.object(Engine, "_step", counted):
        for answer in generator.sample(requests, SamplingParams(max_tokens=args.max_tokens)):
            if not isinstance(answer.result, GeneratedText):
                raise LenVMError(f"prompt {answer.prompt_id}: {answer.result.reason}")
            batch[answer.prompt_id, answer.number] = answer.result.token_ids
            if limit is not None and answer.result.finish_reason == "stop":
                limit.ended(len(answer.result.token_ids))
    return {"batch": batch, "steps": steps, "tokens": generator.tokens_written - before, "limit": limit and limit()}


def oracle(prompts: list[Prompt], batch: Batch) -> list[str]:
    """Ids in the order of the mean length of the completions that were written, the longest first."""
    lengths: dict[str, list[int]] = {prompt.prompt_id: [] for prompt in prompts}
    for (prompt_id, _), tokens in batch.items():
        lengths[prompt_id].append(len(tokens))
    return sorted(lengths, key=lambda prompt_id: -statistics.fmean(lengths[prompt_id]))


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[list[int]], list[float]]:
    """What was measured; lengths of each prompt's completions, and what is expected of them."""
    generator = LocalGenerator.load(args.generator, rows=args.rows)
    lenvm = open_value_model(
        args.lenvm or f"{args.generator}-lenvm", gamma=None, dtype=None, device=generator.model.device
    )
    prompts = list(prompt_set(args.prompt_set, count=args.prompts))
    known = {prompt.prompt_id: prompt for prompt in prompts}
    whole = write(generator, prompts, args, False)["batch"]  # and a warm-up
    by_oracle = [known[prompt_id] for prompt_id in oracle(prompts, whole)]
    by_chance = random.Random(0)
    expected = {}
    for prompt, prediction in predict_lengths(lenvm, generator.processor, prompts):
        assert not isinstance(prediction, str), prediction
        expected[prompt.prompt_id] = prediction.expected_tokens
    by_prediction = order_by(lambda asked: predict_lengths(lenvm, generator.processor, asked))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ("random", "predicted", "oracle", "aborted")}
    for _ in range(args.rounds):
        shuffled = by_chance.sample(prompts, len(prompts))
        for name, rounds in found.items():
            began = time.perf_counter()
            order = {"oracle": by_oracle, "predicted": prompts}.get(name, shuffled)
            if name == "predicted":
                order = [known[prompt_id] for prompt_id in by_prediction(iter(prompts))]
            one = write(generator, order, args, name == "aborted")
            one["seconds"] = time.perf_counter() - began
            check(name, one, whole)
            del one["batch"]
            rounds.append(one)
    lengths = [[len(whole[prompt.prompt_id, number]) for number in range(args.n)] for prompt in prompts]
    return told(found, lengths, args), lengths, [expected[prompt.prompt_id] for prompt in prompts]


def check(name: str, one: dict[str, Any], whole: Batch) -> None:
    """Refuse a run that wrote something else than the first one.

    Raises:
        LenVMError: it did.
    """
    limit = one["limit"] or max(map(len, whole.values()))
    differ = sum(one["batch"][key][:limit] != tokens[:limit] for key, tokens in whole.items())
    if differ or len(one["batch"]) != len(whole):
        raise LenVMError(f"order {name!r}: {differ} of {len(whole)} completions are not those of the first order")


def told(found: dict[str, list[dict[str, Any]]], lengths: list[list[int]], args: argparse.Namespace) -> dict[str, Any]:
    """Medians and ratios, printed and returned."""
    flat = [length for many in lengths for length in many]
    least = bound(flat, args.rows)
    print(
        f"\n{args.generator}: {len(lengths)} prompts of {args.prompt_set} x {args.n} completions, {args.rows} rows; "
        f"mean {np.mean(flat):.0f}, median {np.median(flat):.0f}, longest {max(flat)} tokens; all orders wrote "
        f"the same\n{'order':12}{'steps':>8}{'of bound':>10}{'seconds':>10}{'random / it: steps':>20}{'seconds':>10}"
        f"{'tokens':>10}"
    )
    result: dict[str, Any] = {"bound_steps": least}
    for name, rounds in found.items():
        steps, seconds = (statistics.median(one[key] for one in rounds) for key in ("steps", "seconds"))
        ratios = {
            key: statistics.median(a[key] / b[key] for a, b in zip(found["random"], rounds, strict=True))
            for key in ("steps", "seconds")
        }
        tokens = statistics.median(one["tokens"] for one in rounds)
        print(
            f"{name:12}{steps:>8.0f}{steps / least:>10.2f}{seconds:>10.2f}{ratios['steps']:>20.2f}"
            f"{ratios['seconds']:>10.2f}{tokens:>10,.0f}"
        )
        result[f"{name}_steps"], result[f"{name}_s"], result[f"{name}_tokens"] = steps, seconds, tokens
        result[f"{name}_steps_ratio"], result[f"{name}_seconds_ratio"] = ratios["steps"], ratios["seconds"]
    limit = found["aborted"][0]["limit"]
    ended = sum(length <= limit for length in flat)
    kept = sum(min(length, limit) for length in flat)
    print(f"aborted when {args.quantile:.0%} have ended: limit {limit} tokens, {ended} of {len(flat)} ended, "
          f"{kept:,} tokens kept")  # fmt: skip
    return {**result, "aborted_limit_tokens": limit, "aborted_kept_tokens": kept}


# -- simulated --------------------------------------------------------------------------------------------------------


def simulate(lengths: list[list[int]], expected: list[float] | None, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Steps as a multiple of the bound, by rows and by what decides the order; means over random orders and errors."""
    flat = [length for many in lengths for length in many]
    means = [statistics.fmean(many) for many in lengths]
    columns = ["random", *(["predicted"] if expected else []), "error 0.6", "error 0.3", "oracle", "aborted"]
    print(f"\nsimulated, {len(lengths)} prompts, {len(flat)} completions: steps / bound")
    print(f"{'rows':>6}{'bound':>8}" + "".join(f"{name:>12}" for name in columns) + f"{'cut, longest first':>20}")
    table = []
    several = {max(1, len(flat) // part) for part in (1, 2, 4, 8, 16)}
    for rows in sorted({*several, *([args.rows] if expected else [])}, reverse=True):
        least, draws = bound(flat, rows), np.random.default_rng(0)
        steps: dict[str, list[int]] = {name: [] for name in [*columns, "aborted longest"]}
        for _ in range(args.draws):
            keys = {"random": draws.random(len(means)), "oracle": np.array(means)}
            for error in (0.6, 0.3):
                keys[f"error {error}"] = np.array(means) * np.exp(error * draws.standard_normal(len(means)))
            if expected:
                keys["predicted"] = np.array(expected)
            for name, key in keys.items():
                ordered = [length for place in np.argsort(-key, kind="stable") for length in lengths[place]]
                steps[name].append(makespan(ordered, rows))
                if name in ("random", "oracle"):
                    steps["aborted" if name == "random" else "aborted longest"].append(
                        aborted_makespan(ordered, rows, args.quantile)
                    )
        shares = {name: statistics.fmean(many) / least for name, many in steps.items()}
        print(f"{rows:>6}{least:>8}" + "".join(f"{shares[name]:>12.2f}" for name in columns)
              + f"{shares['aborted longest']:>20.2f}")  # fmt: skip
        table.append({"rows": rows, "bound_steps": least, **{name: round(share, 4) for name, share in shares.items()}})
    kept = sorted(flat)[ended_in(args.quantile, len(flat)) - 1]
    print(f"aborted: when {args.quantile:.0%} have ended, at {kept} tokens")
    return table


def lengths_of(file: Path) -> list[list[int]]:
    """Lengths of each prompt's completions, from a rollouts.jsonl."""
    lengths: dict[str, list[int]] = {}
    for line in file.open():
        record = json.loads(line)
        lengths.setdefault(record["prompt_id"], []).append(len(record["token_ids"]))
    return list(lengths.values())


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", default="tiny-text", help="tiny-text or tiny-vl")
    parser.add_argument("--lenvm", help="length value model (default: the embedded one)")
    parser.add_argument("--prompt-set", default="tiny-math", help="tiny-math, tiny-write or tiny-vqa")
    parser.add_argument("--prompts", type=int, default=64, help="prompts of a batch")
    parser.add_argument("--n", type=int, default=4, help="completions of each")
    parser.add_argument("--rows", type=int, default=32, help="completions written side by side")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest completion")
    parser.add_argument("--quantile", type=float, default=0.9, help="share with whose end a batch is aborted")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each order")
    parser.add_argument("--draws", type=int, default=100, help="random orders and errors of the simulation")
    parser.add_argument("--lengths", type=Path, help="simulate the lengths of this rollouts.jsonl instead")
    parser.add_argument("--simulate-only", action="store_true", help="measure nothing; needs --lengths")
    parser.add_argument("--quick", action="store_true", help="seconds; few short completions, whose ratio means little")
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.n, args.rows, args.max_tokens, args.rounds, args.draws = 16, 2, 16, 160, 1, 5
        args.quantile = 0.7
    if args.simulate_only and args.lengths is None:
        parser.error("--simulate-only needs --lengths FILE")
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"benchmark": "makespan", "rows": args.rows, "quantile": args.quantile}
    lengths, expected = [], None
    if not args.simulate_only:
        measured, lengths, expected = measure(args)
        result |= {"generator": args.generator, "prompt_set": args.prompt_set, **measured}
    if args.lengths is not None:
        lengths, expected = lengths_of(args.lengths), None
    result["simulated"] = simulate(lengths, expected, args)
    if not args.simulate_only:
        print(NOTICE)
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
