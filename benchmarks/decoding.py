r"""What guided decoding costs: tokens/s unguided, guided, by two forwards of the value model, with KV copied K times.

A base model of 12 layers, 512 wide, and a value model of 6 layers, 384 wide, random weights, K = 15 candidates for
every token of every row. All ways decode the same prompts for the same number of tokens, a step of each in turn (A B C
A B C …), and medians of steps are compared:

    unguided  one forward of the base model; its tokens are sampled as in plain sampling
    guided    that, and one forward of the value model on [token chosen last, K candidates], K cropped off again; the
              control and the choice with them: all that a step of `generate` does
    padded    in every row as many candidates as in the row with most, whatever it has itself
    two       the candidates scored by a forward of their own after the chosen token's, everything else the same
    copied    the value model's cache copied K times, one candidate a row, as by one who knows no tree masks
    limit     one forward of the base model and one forward of a single token of the value model, nothing else

With `--compile`, unguided, guided and limit with compiled steps, too (`generate(compile=True)`; CUDA graphs on a GPU),
the steps that compile apart.

With `--uneven 8`, seven rows of eight have two candidates and not 15, as where a model is sure of most tokens.

With `--mixed 30 60 … 3000`, prompts of these lengths side by side, too: a long row should cost what it holds, not what
every row holds. *Against even* is how many times as long a step takes as one of as many rows, all of the mean length.

*Share of the limit* is what guided reaches of that, 1 being free of charge; *share of unguided* what is left of plain
sampling's speed. Ways that scorer must choose the same tokens, but for one in a hundred, which rounding may part.

    python benchmarks/decoding.py                                    # about three minutes on one core
    python benchmarks/decoding.py --compile                          # and about ten for the compiler
    python benchmarks/decoding.py --batch 1 8 64 --prefix 1024 --device cuda --dtype bfloat16
    python benchmarks/decoding.py --generator DIR --layers 8 --batch 1 8 64 --prefix 64 512 --mixed 30 100 400 3000
    python benchmarks/decoding.py --base 3584 28 28 4 18944 --value 1536 28 12 2 8960 --vocabulary 151936 --device cuda
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, Qwen2Config

from lenvm_lightning.decoding.candidate_scorer import CandidateScorer, RowRules
from lenvm_lightning.decoding.end_tokens import EndTokens
from lenvm_lightning.decoding.kv_cache import KVCache
from lenvm_lightning.decoding.model_runner import ModelRunner
from lenvm_lightning.decoding.sampling import sample_tokens
from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.guidance import EqualTo
from lenvm_lightning.models.lenvm_config import LenVMConfig
from lenvm_lightning.models.value_model import LengthValueModel

CANDIDATES = 15
_ROOM = 64  # columns for the tokens of some steps


def config(shape: list[int], vocabulary: int) -> Qwen2Config:
    """Width, layers, heads, key-value heads, width of the MLP."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return Qwen2Config(vocab_size=vocabulary, **dict(zip(names, shape, strict=True)))


class Padded(CandidateScorer):
    """Scores as many candidates in every row as the row with most has."""

    def score(
        self, last_tokens: Tensor, ids: Tensor, ends: Tensor, wanted: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `CandidateScorer.score`."""
        return super().score(last_tokens, ids, ends)


class TwoForwards(CandidateScorer):
    """Scores with a forward of its own, after that of the chosen token."""

    def score(
        self, last_tokens: Tensor, ids: Tensor, ends: Tensor, wanted: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `CandidateScorer.score`."""
        _, before = super().score(last_tokens, ids[:, :0], ends[:, :0])
        count = ids.shape[1]
        within, depth = torch.eye(count, dtype=torch.bool, device=ids.device), torch.zeros_like(ids[0])
        hidden = self.runner.forward(self.cache, ids, within, depth).last_hidden_state
        self.cache.crop(count)
        return self.lenvm.remaining(self.lenvm.v_head(hidden)).masked_fill(ends, 0.0), before


class Copied(CandidateScorer):
    """Scores with the cache copied for every candidate, one new token a row."""

    def score(
        self, last_tokens: Tensor, ids: Tensor, ends: Tensor, wanted: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `CandidateScorer.score`."""
        _, before = super().score(last_tokens, ids[:, :0], ends[:, :0])
        wide = self.runner.new_cache(1)
        rows, count = ids.shape
        wide.lay_out([-1] * (rows * count), [self.cache.lengths[0] + 1] * (rows * count))
        wide.lengths = [length for length in self.cache.lengths for _ in range(count)]
        for layer in self.cache.layers:
            wide._grow_layers(len(wide.layers) + 1)
            own = wide.layers[-1]
            keys = torch.stack([self.cache_rows(layer, row)[0] for row in range(rows)])
            values = torch.stack([self.cache_rows(layer, row)[1] for row in range(rows)])
            own.lazy_initialization(keys, values)
            width = min(wide.layout.widths[0], keys.shape[2])
            for kept, states in zip(own.both, (keys, values), strict=True):
                view = kept.view(rows * count, own.heads, wide.layout.widths[0], -1)
                view[:, :, :width] = states[:, :, :width].repeat_interleave(count, 0)
        hidden = self.runner.forward(wide, ids.reshape(-1, 1)).last_hidden_state
        remaining = self.lenvm.remaining(self.lenvm.v_head(hidden)).view(rows, count)
        return remaining.masked_fill(ends, 0.0), before

    @staticmethod
    def cache_rows(layer: object, row: int) -> list[Tensor]:
        """Keys and values of a row."""
        return layer.row(row)  # type: ignore[attr-defined]


class Bench:
    """The ways to write a token of every row, each with caches of its own.

    Args:
        base: the generator.
        lenvm: the length value model.
        lengths: tokens of the prompts.
        compiled: with the compiled ways.
        uneven: of so many rows, one has `CANDIDATES` to choose among and the others two; 1 = all have them.
    """

    def __init__(
        self, base: AutoModelForCausalLM, lenvm: LengthValueModel, lengths: list[int], compiled: bool, uneven: int = 1
    ) -> None:
        self.device = base.device
        self.prompts = [torch.randint(base.config.vocab_size, (length,)).tolist() for length in lengths]
        self.runners = {False: ModelRunner(base), True: ModelRunner(base, compiled=True)}
        self.scorers = {
            "guided": CandidateScorer(lenvm),
            "padded": Padded(lenvm),
            "two": TwoForwards(lenvm),
            "limit": CandidateScorer(lenvm),
        }
        if len(set(lengths)) == 1:
            self.scorers["copied"] = Copied(lenvm)
        names = ["unguided", *self.scorers]
        if compiled:
            self.scorers |= {
                name: CandidateScorer(lenvm, compiled=True) for name in ("guided_compiled", "limit_compiled")
            }
            names += ["unguided_compiled", "guided_compiled", "limit_compiled"]
        self.caches = {name: self._filled(self._runner(name), self._runner(name).new_cache(1)) for name in names}
        for scorer in self.scorers.values():
            self._filled(scorer.runner, scorer.cache)
        last_tokens = torch.tensor([[ids[-1]] for ids in self.prompts], device=self.device)
        self.last_tokens = {name: last_tokens for name in self.caches}
        self.params = SamplingParams(top_k=CANDIDATES)
        few = SamplingParams(top_k=2)
        of_rows = [few if row % uneven else self.params for row in range(len(lengths))]
        self.rules = RowRules(of_rows, [EqualTo(max(lengths))] * len(lengths), self.device)
        self.ends = EndTokens(torch.tensor([0], device=self.device))
        self.generated = torch.zeros(len(lengths), dtype=torch.int64, device=self.device)

    def _runner(self, name: str) -> ModelRunner:
        return self.runners[name.endswith("_compiled")]

    def _filled(self, runner: ModelRunner, cache: KVCache) -> KVCache:
        for start in range(0, len(self.prompts), 8):
            part = self.prompts[start : start + 8]
            rows = list(range(start, start + len(part)))
            prefill = runner.prefill([ids[:-1] for ids in part])
            for place, (row, ids) in enumerate(zip(rows, part, strict=True)):
                cache.fill([row], prefill, [place], len(ids) - 1)
        lengths = [len(ids) for ids in self.prompts]
        cache.lay_out(range(len(lengths)), [length + _ROOM for length in lengths])  # as the engine lays rows out
        return cache

    def base_logits(self, name: str) -> Tensor:
        """What follows the token chosen last, by the base model."""
        return self._runner(name).forward(self.caches[name], self.last_tokens[name]).logits[:, -1]

    def unguided(self, name: str, uniforms: Tensor) -> Tensor:
        """One step."""
        tokens = sample_tokens(self.base_logits(name), uniforms, self.params)[0]
        self.last_tokens[name] = tokens[:, None]
        return tokens.cpu()

    def guided(self, name: str, uniforms: Tensor) -> Tensor:
        """One step."""
        result = self.scorers[name].choose(
            self.last_tokens[name], self.base_logits(name), uniforms, self.generated, self.rules, self.ends, None
        )
        self.last_tokens[name] = result.tokens[:, None]
        return result.tokens.cpu()

    def limit(self, name: str, uniforms: Tensor) -> Tensor:
        """One step that chooses nothing."""
        scorer = self.scorers[name]
        logits = self.base_logits(name)
        scorer.runner.forward(scorer.cache, self.last_tokens[name])
        return logits[:1, :1].cpu()

    def ways(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """All of them."""
        kinds = {"unguided": self.unguided, "limit": self.limit}
        return {name: partial(kinds.get(name.removesuffix("_compiled"), self.guided), name) for name in self.caches}


def measure(bench: Bench, steps: int, seed: int) -> dict[str, float]:
    """Median seconds of a step of each way; the same tokens are asserted of the ways that scorer."""
    random = torch.Generator().manual_seed(seed)
    times: dict[str, list[float]] = {name: [] for name in bench.ways()}
    guiding = [name for name in times if name.split("_")[0] not in ("unguided", "limit")]
    differ = dict.fromkeys(guiding, 0)
    total = 0
    for step in range(-3, steps):  # the first ones warm up
        uniforms = torch.rand(len(bench.prompts), dtype=torch.float64, generator=random).to(bench.device)
        written = {}
        for name, way in bench.ways().items():
            if name == "copied" and step % 4:  # slow, and steady
                continue
            began = time.perf_counter()
            written[name] = way(uniforms)
            if step >= 0:
                times[name].append(time.perf_counter() - began)
        if "copied" in times and "copied" not in written:  # its caches get the token all the same
            scorer = bench.scorers["copied"]
            scorer.runner.forward(scorer.cache, bench.last_tokens["copied"])
            bench.base_logits("copied")
        for name in guiding:
            differ[name] += int((written["guided"] != written.get(name, written["guided"])).sum())
            bench.last_tokens[name] = bench.last_tokens["guided"]  # one rounding must not part them for good
        total += len(bench.prompts)
    if max(differ.values()) > 0.01 * total:
        sys.exit(f"of {total} tokens so many were not those of guided: {differ}")
    return {name: statistics.median(values) for name, values in times.items() if values}


def compiled_ratios(seconds: dict[str, float]) -> dict[str, float]:
    """How the compiled ways compare with one another, and each with itself uncompiled."""
    ways = ("unguided", "guided", "limit")
    compiled = {name: seconds[f"{name}_compiled"] for name in ways}
    return {
        "compiled_share_of_limit": compiled["limit"] / compiled["guided"],
        "compiled_share_of_unguided": compiled["unguided"] / compiled["guided"],
        **{f"{name}_compiled_speedup_ratio": seconds[name] / compiled[name] for name in ways},
    }


@torch.inference_mode()
def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    base, lenvm = models_of(args)
    cases = [[prefix] * batch for batch in args.batch for prefix in args.prefix]
    mixed = sorted(args.mixed, reverse=True)
    if mixed:
        cases += [[round(statistics.mean(mixed))] * len(mixed), mixed]
    results = []
    print(f"{'batch':>5} {'prefix':>9} | tokens/s: unguided  guided     two  copied | share of the limit  two  | "
          "against padded  against two  against copied | share of unguided")  # fmt: skip
    for lengths in cases:
        seconds = measure(Bench(base, lenvm, lengths, args.compile, args.uneven), args.steps, seed=len(lengths))
        results.append(row := row_of(lengths, seconds))
        print(told(row), flush=True)
        if args.compile:
            row |= compiled_ratios(seconds)
            print(
                "             | " + ", ".join(f"{name} {row[name]:.2f}" for name in compiled_ratios(seconds)),
                flush=True,
            )
    if mixed:
        even, uneven = results[-2:]
        for name in ("unguided", "guided"):
            uneven[f"{name}_against_even"] = even[f"{name}_tokens_per_s"] / uneven[f"{name}_tokens_per_s"]
            times = uneven[f"{name}_against_even"]
            print(f"mixed lengths, {name}: {times:.2f} times as long as as many of the mean length")
    print(json.dumps({"benchmark": "decoding", "candidates": CANDIDATES, "device": args.device, "rows": results}))


def models_of(args: argparse.Namespace) -> tuple[AutoModelForCausalLM, LengthValueModel]:
    """A generator, and a value model beside it: of random weights, or a real one and its first layers."""
    dtype = getattr(torch, args.dtype)
    if args.generator:
        base = AutoModelForCausalLM.from_pretrained(args.generator, dtype=dtype).to(args.device).eval()
        lenvm = LengthValueModel.from_backbone(
            args.generator, LenVMConfig(gamma=0.997), keep_layers=args.layers, dtype=args.dtype
        )
        return base, lenvm.to(args.device).eval()
    with torch.device(args.device):
        base = AutoModelForCausalLM.from_config(config(args.base, args.vocabulary), dtype=dtype).eval()
        backbone = AutoModel.from_config(config(args.value, args.vocabulary), dtype=dtype).eval()
        lenvm = LengthValueModel(backbone, LenVMConfig(gamma=0.997)).eval()
    lenvm.v_head.reset(0.0)
    return base, lenvm


def row_of(lengths: list[int], seconds: dict[str, float]) -> dict[str, Any]:
    """Speeds and ratios of one case."""
    speed = {name: len(lengths) / value for name, value in seconds.items()}
    row = {
        "batch": len(lengths),
        "prefix_tokens": lengths[0] if len(set(lengths)) == 1 else lengths,
        **{f"{name}_tokens_per_s": speed[name] for name in speed},
        "share_of_limit": seconds["limit"] / seconds["guided"],
        "two_forwards_share_of_limit": seconds["limit"] / seconds["two"],
        "against_padded": seconds["padded"] / seconds["guided"],
        "against_two_forwards": seconds["two"] / seconds["guided"],
        "share_of_unguided": seconds["unguided"] / seconds["guided"],
    }
    if "copied" in seconds:
        row["against_copied"] = seconds["copied"] / seconds["guided"]
    return row


def told(row: dict[str, Any]) -> str:
    """A line of the table."""
    prefix = row["prefix_tokens"]
    called = str(prefix) if isinstance(prefix, int) else f"{prefix[-1]}-{prefix[0]}"
    copied = f"{row['copied_tokens_per_s']:7.1f}" if "against_copied" in row else " " * 7
    against = f"{row['against_copied']:14.2f}x" if "against_copied" in row else " " * 15
    return (
        f"{row['batch']:5} {called:>9} | {row['unguided_tokens_per_s']:18.1f} {row['guided_tokens_per_s']:7.1f} "
        f"{row['two_tokens_per_s']:7.1f} {copied} | {row['share_of_limit']:18.2f} "
        f"{row['two_forwards_share_of_limit']:5.2f} | {row['against_padded']:13.2f}x "
        f"{row['against_two_forwards']:11.2f}x {against} | "
        f"{row['share_of_unguided']:17.2f}"
    )


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prefix", type=int, nargs="+", default=[256, 1024], help="tokens of a prompt")
    parser.add_argument("--mixed", type=int, nargs="+", default=[], help="prompts of these lengths side by side, too")
    parser.add_argument("--generator", metavar="DIR", help="a real model; the value model is its first layers")
    parser.add_argument("--layers", type=int, default=8, help="so many of them")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--base", type=int, nargs=5, default=[512, 12, 8, 2, 1536], metavar="N", help=config.__doc__)
    parser.add_argument("--value", type=int, nargs=5, default=[384, 6, 6, 2, 1152], metavar="N", help="likewise")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--uneven", type=int, default=1, metavar="N", help="of N rows, all but one have two candidates")
    parser.add_argument("--compile", action="store_true", help="with compiled steps, too")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; the numbers mean nothing")
    args = parser.parse_args()
    if args.quick:
        args.batch, args.prefix, args.mixed, args.steps = [2], [40], [60, 9, 5], 4
        args.base, args.value, args.vocabulary = [64, 2, 4, 2, 128], [64, 1, 4, 2, 128], 512
    return args


if __name__ == "__main__":
    main()
