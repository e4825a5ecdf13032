r"""How long training takes to start where its rollouts are tokenised already, beside tokenising them.

The rows have random ids and lengths with a long tail. A start reads the rollout files and the table for changes and
damage, splits the rows, plans an epoch and reports on it; no model is loaded. CPU seconds, medians of the rounds; read
the ratio, times belong to the machine.

    python benchmarks/start.py                                    # a few minutes on one core
    python benchmarks/start.py --rows 1000000 --mean 300
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from datamodules import TextRollouts
from lenvm_lightning.models.processors import load_processor

_COMPLETIONS = 8  # of a prompt
_IDS = (300, 1500)  # words of the tiny vocabulary, none of them special


def write_rows(file: Path, rows: int, mean: int, seed: int = 0) -> None:
    """Rollouts as `lenvm sample` writes them."""
    random = np.random.default_rng(seed)
    end = load_processor("tiny-text").eos_token_id
    lengths = np.clip(random.exponential(mean, rows), 1, 3900).astype(int)
    with file.open("w", encoding="utf-8") as lines:
        for row, length in enumerate(lengths):
            prompt = row // _COMPLETIONS
            record = {
                "prompt_id": f"p{prompt}",
                "messages": [{"role": "user", "content": f"Say {prompt}."}],
                "completion": "",
                "token_ids": [*random.integers(*_IDS, length).tolist(), end],
                "finish_reason": "stop",
                "sampling": {"temperature": 1.0, "max_tokens": 4096},
                "generator": "random",
            }
            lines.write(json.dumps(record) + "\n")


def start(file: Path, cache: Path) -> float:
    """CPU seconds until the batches of the first epoch are planned."""
    data = TextRollouts(str(file), processor="tiny-text", cache_dir=str(cache), num_proc=1)
    assert data.processor is not None  # loaded before the clock starts
    began = time.process_time()
    data.setup("fit")
    return time.process_time() - began


def main() -> None:
    """Print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--mean", type=int, default=300, help="tokens of a completion")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few rows, one round: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.rounds = 2000, 1
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        file, cache = Path(folder) / "rollouts.jsonl", Path(folder) / "cache"
        write_rows(file, args.rows, args.mean)
        first = start(file, cache)
        again = statistics.median(start(file, cache) for _ in range(args.rounds))
    result = {
        "rows": args.rows,
        "tokenising_start_s": round(first, 2),
        "cached_start_s": round(again, 3),
        "cached_start_s_per_100k_rows": round(again * 100_000 / args.rows, 2),
        "cached_share_of_tokenising": round(again / first, 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
