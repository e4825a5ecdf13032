r"""How fast a local generator samples, against transformers' ``generate`` in static batches.

Both write the same number of completions of the same prompts with the same weights at temperature 1, interleaved
A B A B in one process, medians of the rounds. ``generate`` gets its prompts in batches, padded on the left, and a batch
ends with its longest completion; ``LocalGenerator`` refills its rows as completions end. Tokens are those up to EOS,
padding not counted. That both write the same tokens when they take the likeliest is checked before anything is timed.
With several threads, engines side by side are also compared with one engine that uses all of them.

Each has the batch size that suits it: ``generate`` copies its whole cache at every step, so on a CPU more rows make it
slower, and 64 was its best. The prompts are arithmetic stories of the tiny world, about 75 tokens long.

Tokens per second of CPU time are per core; those of the wall clock are what waiting feels like, and are lower where
other work shares the core. The ratio is what to read.

    python benchmarks/sampling.py                # about five minutes on one core
    python benchmarks/sampling.py --skip-static
    python benchmarks/sampling.py --generator Qwen/Qwen2.5-0.5B-Instruct --prompts 16 --threads 8
"""

import argparse
import copy
import json
import statistics
import time
import unittest.mock
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.errors import LenVMError
from lenvm_lightning.models.processors import tokenizer_of
from lenvm_lightning.rollouts.generators.interface import GeneratedText, Prompt, PromptRequest
from lenvm_lightning.rollouts.generators.local import LocalGenerator
from lenvm_lightning.rollouts.generators.local import generator as local_generator
from lenvm_lightning.rollouts.prompting import encode_prompt
from lenvm_lightning.tinyworld import NOTICE
from lenvm_lightning.tinyworld.prompt_sets import prompt_set


def write_continuously(
    generator: LocalGenerator, prompts: list[Prompt], n: int, sampling: SamplingParams
) -> list[list[int]]:
    """Tokens of all completions, by prompt and number."""
    requests = [PromptRequest(prompt, tuple(range(n))) for prompt in prompts]
    written: dict[tuple[str, int], list[int]] = {}
    for answer in generator.sample(requests, sampling):
        if not isinstance(answer.result, GeneratedText):
            raise LenVMError(f"prompt {answer.prompt_id}: {answer.result.reason}")
        written[answer.prompt_id, answer.number] = answer.result.token_ids
    return [written[prompt.prompt_id, number] for prompt in prompts for number in range(n)]


def write_statically(
    model: PreTrainedModel,
    generator: LocalGenerator,
    prompts: list[Prompt],
    n: int,
    sampling: SamplingParams,
    batch_size: int,
) -> list[list[int]]:
    """The same through ``generate``, ``batch_size`` rows at a time; a prompt's completions stand side by side."""
    tokenizer = tokenizer_of(generator.processor)
    eos = model.generation_config.eos_token_id
    stop = set(eos if isinstance(eos, list) else [eos])
    model.generation_config = GenerationConfig(
        max_new_tokens=sampling.max_tokens,
        do_sample=sampling.temperature > 0,
        **({"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0} if sampling.temperature else {}),
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id,
    )
    rows = [encode_prompt(generator.processor, prompt.messages, [])[0] for prompt in prompts for _ in range(n)]
    written = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in batch])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
        output = model.generate(ids.to(model.device), attention_mask=mask.to(model.device))[:, width:].tolist()
        for row in output:
            length = next((place for place, token in enumerate(row, 1) if token in stop), len(row))
            written.append(row[:length])
    return written


def one_engine(run: Callable[[], list[list[int]]]) -> list[list[int]]:
    """The same in a single engine, whose products use all threads."""
    with unittest.mock.patch.object(local_generator, "_MOST_ENGINES", 1):
        return run()


def check(generator: LocalGenerator, model: PreTrainedModel, prompts: list[Prompt]) -> int:
    """Both write the same when they take the likeliest tokens; returns how many were compared."""
    greedy = SamplingParams(temperature=0.0, max_tokens=32)
    ours = write_continuously(generator, prompts, 1, greedy)
    theirs = write_statically(model, generator, prompts, 1, greedy, len(prompts))
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    if model.dtype in (torch.float32, torch.float64) and same < len(prompts):
        raise LenVMError(f"{len(prompts) - same} of {len(prompts)} greedy completions differ")
    return sum(map(len, ours))


def measure(run: Callable[[], list[list[int]]]) -> dict[str, Any]:
    """Tokens, their lengths, and seconds of one round."""
    wall, cpu = time.perf_counter(), time.process_time()
    written = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    lengths = [len(tokens) for tokens in written]
    return {
        "lengths": lengths,
        "tokens_per_s": sum(lengths) / (time.perf_counter() - wall),
        "tokens_per_cpu_s": sum(lengths) / (time.process_time() - cpu),
    }


def ratio_of(rounds: dict[str, list[dict[str, Any]]], other: str, key: str) -> float:
    """Median over the rounds of how many times as fast the local generator was."""
    pairs = zip(rounds["continuous"], rounds[other], strict=True)
    return statistics.median(ours[key] / theirs[key] for ours, theirs in pairs)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", default="tiny-text", help="name, directory or hub id")
    parser.add_argument("--prompts", type=int, default=200, help="prompts")
    parser.add_argument("--n", type=int, default=8, help="completions of each")
    parser.add_argument("--rows", type=int, default=256, help="batch size of LocalGenerator")
    parser.add_argument("--static-batch", type=int, default=64, help="batch size of generate")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest completion")
    parser.add_argument("--rounds", type=int, default=2, help="timed rounds of each")
    parser.add_argument("--skip-static", action="store_true", help="time LocalGenerator alone")
    parser.add_argument("--dtype", help="of the weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--quick", action="store_true", help="seconds; few short completions, whose ratio means little")
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.n, args.rows, args.static_batch, args.max_tokens, args.rounds = 12, 4, 16, 16, 64, 1
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    generator = LocalGenerator.load(args.generator, rows=args.rows, device=args.device, dtype=args.dtype)
    model = copy.deepcopy(generator.model)  # ``generate`` changes its generation config
    prompts = list(prompt_set("tiny-math", count=args.prompts))
    print(f"same tokens: {check(generator, model, prompts[:4])} greedy ones compared")
    sampling = SamplingParams(max_tokens=args.max_tokens)
    runs = {"continuous": lambda: write_continuously(generator, prompts, args.n, sampling)}
    if args.threads > 1:
        runs["one engine"] = lambda: one_engine(runs["continuous"])
    if not args.skip_static:
        runs["static"] = lambda: write_statically(model, generator, prompts, args.n, sampling, args.static_batch)
    few = prompts[: max(1, generator.rows // args.n)]
    write_continuously(generator, few, args.n, SamplingParams(max_tokens=16))  # warm-up
    write_statically(model, generator, few, args.n, SamplingParams(max_tokens=16), args.static_batch)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            rounds[name].append(measure(run))
    rates = {
        name: {key: statistics.median(one[key] for one in many) for key in ("tokens_per_s", "tokens_per_cpu_s")}
        for name, many in rounds.items()
    }
    lengths = [length for one in rounds["continuous"] for length in one["lengths"]]
    p50, p99 = (float(np.percentile(lengths, share)) for share in (50, 99))
    print(
        f"\n{generator.name}: {args.prompts} prompts x {args.n} completions, mean {np.mean(lengths):.0f}, median "
        f"{p50:.0f}, 99th percentile {p99:.0f} tokens; batches of {generator.rows} "
        f"and {args.static_batch}, {args.threads} threads"
    )
    print(f"{'':12}{'tokens/s':>22}{'tokens/s of CPU time':>22}")
    for name, rate in rates.items():
        print(f"{name:12}{rate['tokens_per_s']:>22,.0f}{rate['tokens_per_cpu_s']:>22,.0f}")
    result = {
        "benchmark": "sampling",
        "device": args.device,
        "generator": generator.name,
        "rows": generator.rows,
        "static_batch": args.static_batch,
        "threads": args.threads,
        "length_p50_tokens": p50,
        "length_p99_tokens": p99,
        **{f"{name.replace(' ', '_')}_{key}": value for name, rate in rates.items() for key, value in rate.items()},
    }
    if args.threads > 1:
        result["one_engine_ratio"] = ratio_of(rounds, "one engine", "tokens_per_s")
        print(f"{'ratio':12}{result['one_engine_ratio']:>21.2f}x as fast as one engine on all threads")
    if not args.skip_static:
        key = "tokens_per_s" if args.device == "cuda" or args.threads > 1 else "tokens_per_cpu_s"
        result["speedup_ratio"] = ratio_of(rounds, "static", key)
        print(f"{'ratio':12}{result['speedup_ratio']:>21.2f}x as fast as static batches")
    if args.generator.startswith("tiny-"):
        print(NOTICE)
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
