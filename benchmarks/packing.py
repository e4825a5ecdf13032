r"""What packing saves over padded batches of similar lengths, and those over random ones.

The same rows, every row once, under the same token budget, over lengths with a long tail like a reasoning set's. Packed
values and gradients are compared with those of padded rows first, and with those of packed rows that see one another,
which have to differ. Epochs are timed interleaved in one process, medians of the rounds. Read the ratios: times belong
to the machine, and on a CPU are CPU seconds. Padding is the share of the computed positions, of the timed rows and of
many more; real tokens/s counts no padding. Attention under a mask costs its whole width squared, so bins are only as
wide as pays off; pairs per token says what that comes to.

    python benchmarks/packing.py                                    # about two minutes on one core
    python benchmarks/packing.py --hidden 256 --median 256 --longest 4096 --max-tokens 8192
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2Model

from datamodules.batch_planning import plan_batches
from lenvm_lightning.batch import Layout, LengthBatch
from lenvm_lightning.models.lenvm_config import LenVMConfig
from lenvm_lightning.models.value_model import LengthValueModel
from lenvm_lightning.objectives import token_losses
from lenvm_lightning.training.batch_layouts import row_logits
from lenvm_lightning.training.packing import pack, width_of

GAMMA = 0.997
PLANS: dict[str, dict[str, bool]] = {"random": {"bucket": False}, "bucketed": {}, "packed": {"packed": True}}


def long_tailed(rows: int, args: argparse.Namespace, seed: int) -> list[int]:
    """Log-normal lengths: the 99th percentile at ten times the median."""
    sizes = np.random.default_rng(seed).lognormal(np.log(args.median), 1.0, rows)
    return np.clip(sizes, 4, args.longest).astype(int).tolist()


def shape_of(sizes: list[int], name: str) -> tuple[int, int]:
    """Rows and width of the forward of a batch."""
    if name != "packed":
        return len(sizes), max(sizes)
    bins = pack(sizes)
    return len(bins), width_of(bins, sizes)


def padding_percent(lengths: list[int], batches: list[list[int]], name: str) -> float:
    """Share of the computed positions that is padding."""
    shapes = [shape_of([lengths[row] for row in batch], name) for batch in batches]
    return 100.0 - 100.0 * sum(lengths) / sum(rows * width for rows, width in shapes)


def pairs_per_token(lengths: list[int], batches: list[list[int]], name: str) -> float:
    """Pairs of attention, masked ones included, for each real token."""
    shapes = [shape_of([lengths[row] for row in batch], name) for batch in batches]
    return sum(rows * width**2 for rows, width in shapes) / sum(lengths)


def make_batch(sizes: list[int], name: str, args: argparse.Namespace) -> LengthBatch:
    """Random ids of rows of the given sizes."""
    lengths, position = torch.tensor(sizes)[:, None], torch.arange(max(sizes))
    mask = position < lengths
    batch: Any = {
        "input_ids": (torch.randint(args.vocabulary, mask.shape) * mask).to(args.device),
        "attention_mask": mask.long().to(args.device),
        "remaining": (lengths - 1 - position).clamp(min=0).to(args.device),
        "vision": {},
    }
    if name == "packed":
        batch["layout"] = Layout("packed", sizes, [1] * len(sizes), list(range(len(sizes))))
    return batch


def step(model: LengthValueModel, batch: LengthBatch) -> Tensor:
    """Forward and backward of the default loss; gradients are left in place. Returns the logits."""
    model.zero_grad(set_to_none=True)
    logits, rule = row_logits(model, batch), model.config.rule
    losses = token_losses(logits, rule.of(batch["remaining"]), batch["remaining"], "mse", rule)
    torch.where(batch["attention_mask"].bool(), losses, 0.0).sum().backward()
    return logits.detach()


def check_parity(model: LengthValueModel, args: argparse.Namespace) -> dict[str, float]:
    """Largest difference of logits, of gradients as a share of their norm, and of logits where rows see one another.

    Raises:
        AssertionError: packed rows differ by more than rounding, or not at all where they should.
    """
    packed = make_batch([40, 25, 13, 7, 5], "packed", args)
    plain: Any = {key: value for key, value in packed.items() if key != "layout"}
    there = packed["attention_mask"].bool()
    found = []
    for batch in (plain, packed):
        logits = step(model, batch)[there]
        found.append((logits, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    values = float((found[0][0] - found[1][0]).abs().max())
    gradients = float((found[0][1] - found[1][1]).norm() / found[0][1].norm())
    whole = model(packed["input_ids"][there][None], torch.ones_like(packed["input_ids"][there][None]))[0]
    leak = float((found[0][0] - whole.detach()).abs().max())
    assert values <= 1e-4, f"values differ by {values}"
    assert gradients <= 1e-3, f"gradients differ by {gradients}"
    assert leak > 100 * values, "rows that see one another should differ"
    return {"parity_max_difference": values, "parity_gradient_share": gradients, "leaking_max_difference": leak}


def interleave(candidates: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of every candidate's calls, A B A B; on a CPU those that the process had it, not others."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            began = clock()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(clock() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=250, help="rows to time")
    parser.add_argument("--planned", type=int, default=20_000, help="rows whose padding is printed beside theirs")
    parser.add_argument("--median", type=int, default=128, help="median tokens of a row")
    parser.add_argument("--longest", type=int, default=1024, help="tokens a row is truncated to")
    parser.add_argument("--max-tokens", type=int, default=4096, help="tokens of a batch, padding included")
    parser.add_argument("--hidden", type=int, default=512, help="width of the backbone, a multiple of 64")
    parser.add_argument("--layers", type=int, default=1, help="its layers")
    parser.add_argument("--vocabulary", type=int, default=1024, help="tokens of the vocabulary")
    parser.add_argument("--rounds", type=int, default=2, help="timed epochs of each kind")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--quick", action="store_true", help="seconds; a tiny model, whose speed means nothing")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.longest, args.hidden, args.layers, args.rounds, args.planned = 40, 512, 64, 1, 1, 2000
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=3 * args.hidden,
                         num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64,
                         num_key_value_heads=max(1, args.hidden // 256), bos_token_id=None,
                         eos_token_id=None)  # fmt: skip
    model = LengthValueModel(Qwen2Model(config), LenVMConfig(GAMMA)).to(args.device).train()
    model.v_head.reset(0.0)
    result: dict[str, Any] = {"benchmark": "packing", "device": args.device, **check_parity(model, args)}
    sizes, every = long_tailed(args.rows, args, seed=1), long_tailed(args.planned, args, seed=0)

    def epoch(name: str, batches: list[list[int]]) -> Callable[[], None]:
        def run() -> None:
            for batch in batches:
                step(model, make_batch([sizes[row] for row in batch], name, args))

        return run

    plans = {name: plan_batches(sizes, args.max_tokens, seed=0, **options) for name, options in PLANS.items()}
    large = {name: plan_batches(every, args.max_tokens, seed=0, **options) for name, options in PLANS.items()}
    for batches in plans.values():
        assert sorted(row for batch in batches for row in batch) == list(range(len(sizes))), "every row once"
    times = interleave({name: epoch(name, batches) for name, batches in plans.items()}, args.rounds, args.device)
    print(
        f"{len(sizes):,} rows, median {np.median(sizes):.0f} and longest {max(sizes):,} tokens, batches of at most "
        f"{args.max_tokens:,} positions; {args.layers} layers of width {args.hidden}, float32, {args.device}\n"
        f"packed equals padded: largest difference {result['parity_max_difference']:.0e}; rows that see one another "
        f"differ by {result['leaking_max_difference']:.0e}\n"
    )
    print(
        f"{'':10}{'real tokens/s':>15}{'padding':>10}{f'of {args.planned:,} rows':>18}{'pairs / token':>15}"
        f"{'batches':>9}"
    )
    for name in PLANS:
        result[f"{name}_real_tokens_per_s"] = sum(sizes) / times[name]
        result[f"{name}_padding_percent"] = padding_percent(sizes, plans[name], name)
        result[f"{name}_padding_all_rows_percent"] = padding_percent(every, large[name], name)
        result[f"{name}_pairs_per_token"] = pairs_per_token(every, large[name], name)
        print(
            f"{name:10}{result[f'{name}_real_tokens_per_s']:>15,.0f}{result[f'{name}_padding_percent']:>9.1f}%"
            f"{result[f'{name}_padding_all_rows_percent']:>17.1f}%{result[f'{name}_pairs_per_token']:>15,.0f}"
            f"{len(plans[name]):>9}"
        )
    result["packed_to_bucketed_ratio"] = times["bucketed"] / times["packed"]
    result["packed_to_random_ratio"] = times["random"] / times["packed"]
    print(
        f"\npacked: {result['packed_to_bucketed_ratio']:.2f}x as fast as bucketed, "
        f"{result['packed_to_random_ratio']:.2f}x as fast as random"
    )
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
