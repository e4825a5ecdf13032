r"""What attention over row groups is for: rows of very different lengths, side by side.

Completions have a long tail of lengths. Where all rows are as wide as the longest, transformers' ``sdpa`` reads mostly
padding, and copies keys for every query head that shares them; `row_attention` reads rows in groups of one width
(`kv_layout.py`), each key once. Both decode one token of the same rows in turn (A B A B …), and medians of steps are
compared; logits must agree. What float32 has beside that: the bits of a row do not depend on the rows beside it
(`tests/decoding/test_model_runner.py`).

    python benchmarks/row_attention.py                   # about a minute on one core
    python benchmarks/row_attention.py --shape 896 24 14 2 4864 --dtype bfloat16
"""

import argparse
import json
import statistics
import sys
import time

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from lenvm_lightning.decoding.kv_cache import KVCache
from lenvm_lightning.decoding.model_runner import ModelRunner

ROWS = {
    "8 of 256": [256] * 8,
    "8 of 1024": [1024] * 8,
    "8, 60 to 1200": [1200, 700, 500, 300, 200, 150, 100, 60],
    "1 of 2000, 15 of 100": [2000, *[100] * 15],
}


def runner_with(attention: str, shape: list[int], dtype: torch.dtype) -> ModelRunner:
    """A model of random weights, the same for both attentions."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=8192, **dict(zip(names, shape, strict=True)))
    # Told "eager" first, so that the runner leaves the attention as it is.
    config._attn_implementation = "eager" if attention == "sdpa" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    runner = ModelRunner(model)
    if attention == "sdpa":
        model.set_attn_implementation("sdpa")
    return runner


def filled(runner: ModelRunner, lengths: list[int], steps: int) -> KVCache:
    """A cache with rows of these lengths and room for so many steps."""
    cache = runner.new_cache(1)
    random = torch.Generator().manual_seed(1)
    for row, length in enumerate(lengths):
        prompt = torch.randint(8000, (length,), generator=random).tolist()
        cache.fill([row], runner.prefill([prompt]), [0], length)
    cache.lay_out(range(len(lengths)), [length + steps for length in lengths])
    return cache


def step(runner: ModelRunner, cache: KVCache, tokens: Tensor) -> tuple[Tensor, float]:
    """Logits of every row, and seconds of CPU time."""
    began = time.process_time()
    logits = runner.forward(cache, tokens).logits[:, -1]
    return logits, time.process_time() - began


@torch.inference_mode()
def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    results = []
    dtype = getattr(torch, args.dtype)
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    runners = {attention: runner_with(attention, args.shape, dtype) for attention in ("row_groups", "sdpa")}
    for name, lengths in ROWS.items():
        lengths = [max(2, length // args.shorter) for length in lengths]
        caches = {key: filled(runner, lengths, args.steps) for key, runner in runners.items()}
        seconds: dict[str, list[float]] = {key: [] for key in runners}
        for number in range(args.steps):
            tokens = torch.full((len(lengths), 1), 7 + number)
            written = {}
            for key, runner in runners.items():
                written[key], spent = step(runner, caches[key], tokens)
                if number >= args.steps // 5:  # the first ones warm up
                    seconds[key].append(spent)
            if (apart := float((written["row_groups"] - written["sdpa"]).abs().max())) > tolerance:
                sys.exit(f"{name}: logits differ by {apart:.2g}")
        ratio = statistics.median(seconds["sdpa"]) / statistics.median(seconds["row_groups"])
        groups = len(caches["row_groups"].layout.row_groups)
        results.append({"rows": name, "row_groups": groups, "sdpa_over_row_groups_ratio": ratio})
        print(f"{name:24} {groups:2} row groups: sdpa takes {ratio:.2f} times as long", flush=True)
    print(json.dumps({"benchmark": "row_attention", "dtype": args.dtype, "rows": results}))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=5, default=[576, 6, 9, 3, 1536], metavar="N",
                        help="width, layers, heads, key-value heads, width of the MLP")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--quick", action="store_true", help="seconds; the numbers mean nothing")
    args = parser.parse_args()
    args.shorter = 1
    if args.quick:
        args.shape, args.steps, args.shorter = [64, 2, 4, 2, 128], 6, 16
    return args


if __name__ == "__main__":
    main()
