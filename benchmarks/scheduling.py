r"""Does it help to start short answers first? A simulated server, and a real one.

**Simulated**, see `scheduling_simulation.py`: requests come at random, Poisson or in bursts, at several loads, or all
at once. A load of 1 is what the server can just write. Every policy orders those that wait by a number that it knows of
each: nothing (as they come), the true length (oracle), the predicted mean, a quantile, CVaR, TIE's mean + CVaR (see
`tail_inflated` for what of TIE is not known here). ``patience 8`` is the predicted mean as `lenvm serve` uses it: who
waits comes nearer to its turn.

**Real**, see `scheduling_server.py`: `lenvm serve` on the tiny world.

All numbers are ratios to as they come, of the same arrivals; the ± is half the range over seeds, or over rounds.

Rows come from ``--rows-file``, JSONL, one line a request, in tokens, the end included:

    {"prompt_tokens": 31, "tokens": 87, "quantiles": {"0.05": 40.1, "0.5": 80.2, …}, "expected": 83.0}

``quantiles`` are those of the predicted length, at the same levels in all lines; ``expected`` is its mean, that of the
quantiles where it is missing. Without a file they are made of the tiny world, and written to ``--save-rows``: tiny-text
writes, tiny-text-lenvm predicts one number, and a log-normal around it, whose sigma is fitted on other prompts of the
same set, stands for its distribution. With one sigma for all, mean, quantiles and CVaR would be the same order.

    python benchmarks/scheduling.py                              # both, some minutes
    python benchmarks/scheduling.py --only simulated --rows-file rows.jsonl --prefill 0.01
    python benchmarks/scheduling.py --only real --clients 400 --batch 16
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scheduling_server import CLOCKS, MEASURES, real_run, told
from scheduling_simulation import POLICIES, Arrival, Known, gaps_of, simulate, spread

from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.distributions.length_distribution import lognormal
from lenvm_lightning.errors import DataError
from lenvm_lightning.evaluation.prediction import predict_lengths
from lenvm_lightning.models.value_model import LengthValueModel
from lenvm_lightning.rollouts.generators.interface import GeneratedText, Prompt, PromptRequest
from lenvm_lightning.rollouts.generators.local import LocalGenerator
from lenvm_lightning.rollouts.prompts import load_prompts
from lenvm_lightning.serving.waiting import PATIENCE

LEVELS = [round(0.05 * k, 2) for k in range(1, 20)] + [0.99]
SETS = ("tiny-math", "tiny-write")
ENDLESS = 1024  # tokens: tiny-text hardly ever writes more
PATIENCES = {f"patience {patience:g}": patience for patience in (PATIENCE / 4, PATIENCE, 4 * PATIENCE)}


def mixed_prompts(count: int) -> list[Prompt]:
    """Held-out prompts of both sets, one after the other."""
    of_sets = [load_prompts([{"source": name, "split": "test", "limit": -(-count // 2)}]) for name in SETS]
    return [prompt for pair in zip(*of_sets, strict=True) for prompt in pair][:count]


def tiny_rows(count: int) -> list[dict[str, Any]]:
    """Rows of so many prompts; sigma is fitted on as many others."""
    generator = LocalGenerator.load("tiny-text")
    lenvm = LengthValueModel.from_pretrained("tiny-text-lenvm").eval()
    prompts = mixed_prompts(2 * count)
    requests = [PromptRequest(prompt, (0,)) for prompt in prompts]
    answers = {one.prompt_id: one.result for one in generator.sample(requests, SamplingParams(max_tokens=ENDLESS))}
    rows, misses = [], {name: [] for name in SETS}
    for number, (prompt, predicted) in enumerate(predict_lengths(lenvm, generator.processor, prompts)):
        answer = answers[prompt.prompt_id]
        if not isinstance(answer, GeneratedText) or isinstance(predicted, str):
            raise DataError(f"{prompt.prompt_id}: {predicted if isinstance(predicted, str) else answer}")
        tokens, of_set = len(answer.token_ids), prompt.meta["set"]
        if number < count:
            ids, _ = generator.encode(prompt, SamplingParams(max_tokens=1))
            row = {"set": of_set, "prompt_tokens": len(ids), "tokens": tokens, "expected": predicted.expected_tokens}
            rows.append(row)
        else:
            misses[of_set].append(np.log((1 + tokens) / (1 + predicted.expected_tokens)))
    sigmas = {name: float(np.sqrt(np.mean(np.square(some)))) for name, some in misses.items()}
    print("sigma of the log-normal: " + ", ".join(f"{name} {sigma:.3f}" for name, sigma in sigmas.items()))
    for row in rows:
        lengths = lognormal(torch.tensor(row["expected"], dtype=torch.float64), sigmas[row["set"]])
        row["quantiles"] = {str(level): round(float(lengths.quantile(level)), 2) for level in LEVELS}
        row["expected"] = round(float(lengths.mean()), 2)
    return rows


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a file.

    Raises:
        DataError: what is missing or is not as it must be, of all lines.
    """
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    wrong = [] if rows else ["there are none"]
    for number, row in enumerate(rows, start=1):
        lacks = [name for name in ("prompt_tokens", "tokens", "quantiles") if name not in row]
        if lacks:
            wrong.append(f"line {number} has no {', '.join(lacks)}")
        elif row["tokens"] < 1 or row["quantiles"].keys() != rows[0].get("quantiles", {}).keys():
            wrong.append(f"line {number} has no tokens, or other levels than line 1")
    if wrong:
        raise DataError(f"{file}: {'; '.join(wrong[:5])}")
    return rows


def simulated(rows: list[dict[str, Any]], given: argparse.Namespace) -> dict[str, Any]:
    """All policies at all loads; ratios to as they come, and that in steps."""
    known = Known.of(rows)
    keys = {name: policy(known) for name, policy in POLICIES.items()}
    cost = known.tokens.mean() / given.batch + given.prefill * known.prompt_tokens.mean()  # steps of a request
    results: dict[str, Any] = {}
    cases = [(shape, load) for shape in ("poisson", "bursty") for load in given.loads] + [("at once", 1.0)]
    for shape, load in cases:
        found: dict[str, list[dict[str, float]]] = {}
        for seed in range(given.seeds):
            rng = np.random.default_rng(seed)
            chosen = rng.integers(len(rows), size=given.requests)
            at = gaps_of(shape, given.requests, load / cost, rng).cumsum()
            for name in [*POLICIES, *PATIENCES]:
                if name == "longest first" and shape != "at once":
                    continue
                key = keys["expected" if name in PATIENCES else name]
                arrivals = [
                    Arrival(when, int(known.tokens[k]), int(known.prompt_tokens[k]), float(key[k]))
                    for when, k in zip(at, chosen, strict=True)
                ]
                outcome = simulate(arrivals, given.batch, given.prefill, PATIENCES.get(name))
                found.setdefault(name, []).append(outcome.summary())
        results[f"{shape}, load {load:g}" if shape != "at once" else shape] = found
    return results


def show_simulated(results: dict[str, Any]) -> None:
    """Tables."""
    for case, found in results.items():
        base = found["as they come"]
        steps = ", ".join(f"{name} {statistics.fmean(one[name] for one in base):.4g}" for name in MEASURES)
        print(f"\n{case}: as they come {steps} (steps)")
        print(f"  {'':16}" + "".join(f"{name:>18}" for name in MEASURES))
        for name, many in found.items():
            if name != "as they come":
                pairs = [ratios(many, base, measure) for measure in MEASURES]
                print(f"  {name:16}" + "".join(f"{'{:.3f} ± {:.3f}'.format(*spread(pair)):>18}" for pair in pairs))


def ratios(many: Sequence[dict[str, float]], base: Sequence[dict[str, float]], measure: str) -> list[float]:
    """Of one measure, seed by seed."""
    return [one[measure] / by[measure] for one, by in zip(many, base, strict=True)]


def means(found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Mean ratios to as they come, of each policy."""
    base = found["as they come"]
    return {
        name: {measure: round(statistics.fmean(ratios(many, base, measure)), 4) for measure in MEASURES}
        for name, many in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("simulated", "real"))
    parser.add_argument("--rows-file", type=Path)
    parser.add_argument("--save-rows", type=Path)
    parser.add_argument(
        "--prompts", type=int, default=400, help="of the tiny world: rows, and requests of the real run"
    )
    parser.add_argument("--batch", type=int, default=16, help="rows of both servers")
    parser.add_argument(
        "--prefill", type=float, default=0.005, help="steps that a token of a prompt stops all rows for"
    )
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.7, 0.9, 1.2])
    parser.add_argument("--requests", type=int, default=2000, help="of a simulation")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--clients", type=int, nargs="+", default=[400, 64], help="of the real run, one run each")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=400, help="of the real run")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.quick:
        given.prompts, given.batch, given.loads, given.requests, given.seeds = 12, 2, [0.9], 60, 2
        given.clients, given.rounds, given.max_tokens = [12, 6], 1, 24
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    if given.only != "real":
        rows = read_rows(given.rows_file) if given.rows_file else tiny_rows(given.prompts)
        if given.save_rows:
            given.save_rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        tokens = np.array([row["tokens"] for row in rows])
        print(
            f"{len(rows)} rows of {tokens.mean():.0f} tokens (10% under {np.quantile(tokens, 0.1):.0f}, 10% over "
            f"{np.quantile(tokens, 0.9):.0f}), {given.requests} requests, {given.batch} rows, {given.seeds} seeds"
        )
        found = simulated(rows, given)
        show_simulated(found)
        result["simulated"] = {case: means(policies) for case, policies in found.items()}
    if given.only != "simulated":
        few = max(1, given.batch // 2)
        real = real_run(mixed_prompts(given.prompts), given.clients, given.batch, given.rounds, given.max_tokens, few)
        for run, found in real.items():
            print("\n".join(told(run, found, given.batch)))
        result["real"] = {
            run: {clock: means(many) if clock in CLOCKS else many for clock, many in found.items()}
            for run, found in real.items()
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
