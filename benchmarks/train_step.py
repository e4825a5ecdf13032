r"""What a training step saves: no vocabulary head, and batches of similar lengths.

Two comparisons, each interleaved A B A B in one process, medians of the rounds. Read the ratios: times belong to the
machine and to whatever else ran on it.

**Vocabulary head.** ``LengthValueModel`` (headless backbone, value head) against a CausalLM that computes its logits
over the vocabulary, throws them away and puts the value head on its last hidden state, as wrappers of CausalLMs do.
Both hold the same weights, and values and gradients are compared before anything is timed. Depth decides the ratio:
the vocabulary costs the same under 4 layers as under 28, so the default of few layers shows the most there is to gain,
``--layers 24`` what the whole 0.5B model gains. Step memory is the peak of a step beyond the weights: resident memory
of a process of its own on a CPU, torch's allocations on a GPU. A dense gradient of the embedding, as big as the logits
of ``hidden`` tokens, is part of both peaks, and the logits are gone when it comes: thrown away, they cost nothing below
about so many tokens a batch and all of themselves above, so use the ``--memory-tokens`` that you train with.

**Length buckets.** The same rows, every row once, in batches under the same token budget: random batches against
length-bucketed ones, over lengths with a long tail like a reasoning set's, or those of ``--rollouts FILE``. Padding is
the share of the padded tokens; real tokens/s counts no padding.

    python benchmarks/train_step.py                                  # about two minutes on one core
    python benchmarks/train_step.py --layers 24 --length 512         # Qwen2.5-0.5B, minutes
    python benchmarks/train_step.py --rollouts runs/text_lenvm/rollouts.jsonl --max-tokens 8192
"""

import argparse
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from datamodules.batch_planning import plan_batches
from datamodules.report import padding_share
from datamodules.tokenise import encode_completion, encode_prompt
from lenvm_lightning.models.lenvm_config import LenVMConfig
from lenvm_lightning.models.processors import load_processor, tokenizer_of
from lenvm_lightning.models.value_model import LengthValueModel, ValueHead
from lenvm_lightning.objectives import token_losses
from lenvm_lightning.rollouts.record import parse_record

GAMMA = 0.997
MIB = 2.0**20
PLANNED = 20_000  # rows of the paper-sized plan whose padding is printed beside the timed one


class ThrownAwayLogits(nn.Module):
    """A CausalLM with a value head on its last hidden state; nobody reads the logits.

    Args:
        causal: the whole model.
        v_head: the head of the `LengthValueModel` it is compared with.
    """

    def __init__(self, causal: Qwen2ForCausalLM, v_head: ValueHead) -> None:
        super().__init__()
        self.causal = causal
        self.v_head = v_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Value logits of every position. Shape (B, T)."""
        out = self.causal(input_ids, attention_mask, use_cache=False, output_hidden_states=True)
        assert out.logits.shape == (*input_ids.shape, self.causal.config.vocab_size)
        return self.v_head(out.hidden_states[-1])


def build(args: argparse.Namespace) -> tuple[LengthValueModel, ThrownAwayLogits]:
    """Both models around the same tensors."""
    config = Qwen2Config(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(args.device):
        causal = Qwen2ForCausalLM._from_config(config, dtype=getattr(torch, args.dtype))
        headless = LengthValueModel(causal.model, LenVMConfig(GAMMA))
    headless.v_head.reset(0.0)
    return headless.train(), ThrownAwayLogits(causal, headless.v_head).train()


def step(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, remaining: Tensor) -> Tensor:
    """Forward and backward of the default loss; gradients are left in place. Returns the value logits."""
    rule = LenVMConfig(GAMMA).rule
    model.zero_grad(set_to_none=True)
    logits = model(input_ids, attention_mask)
    losses = token_losses(logits, rule.of(remaining), remaining, "mse", rule)
    torch.where(attention_mask.bool(), losses, 0.0).sum().backward()
    return logits.detach()


def random_rows(sizes: list[int], vocabulary: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and remaining lengths of rows of the given sizes, padded on the right."""
    width, lengths = max(sizes), torch.tensor(sizes)[:, None]
    position = torch.arange(width)
    mask = (position < lengths).long()
    ids = torch.randint(vocabulary, (len(sizes), width)) * mask
    remaining = (lengths - 1 - position).clamp(min=0)
    return ids.to(device), mask.to(device), remaining.to(device)


def interleave(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, A B A B."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return seconds


# -- vocabulary head --------------------------------------------------------------------------------------------------


def check_parity(headless: LengthValueModel, thrown_away: ThrownAwayLogits, batch: tuple[Tensor, ...]) -> float:
    """Largest difference of the value logits.

    Raises:
        AssertionError: values or gradients differ.
    """
    logits, gradients = [], []
    for model in (headless, thrown_away):
        logits.append(step(model, *batch))
        gradients.append([parameter.grad.clone() for parameter in watched(headless)])
    close = {"rtol": 0.0, "atol": 1e-5} if logits[0].device.type == "cpu" else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(*logits, **close)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4 if ours.dtype == torch.float32 else 5e-2, atol=1e-4)
    assert logits[0].std() > 0, "constant values prove nothing"
    return float((logits[0] - logits[1]).abs().max())


def watched(model: LengthValueModel) -> list[nn.Parameter]:
    """The parameters whose gradients are compared: all but the embedding, which is most of the memory."""
    embedding = model.backbone.get_input_embeddings().weight
    return [parameter for parameter in model.parameters() if parameter is not embedding]


def compare_heads(args: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of the two models."""
    memory = {name: measure_memory(name, args) for name in ("headless", "causal_lm")}
    headless, thrown_away = build(args)
    batch = random_rows([args.length] * args.batch, args.vocabulary, args.device)
    difference = check_parity(headless, thrown_away, batch)
    seconds = interleave(
        {"headless": lambda: step(headless, *batch), "causal_lm": lambda: step(thrown_away, *batch)}, args.rounds
    )
    times = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        f"\nvocabulary head: {args.layers} layers of width {args.hidden}, {args.vocabulary:,} tokens of vocabulary, "
        f"{args.dtype}, batch {args.batch} x {args.length}, {args.device}; same values (largest difference "
        f"{difference:.0e})"
    )
    print_table(
        ("", "s / step", "step memory, MiB", "with weights, MiB"),
        [
            (name, f"{times[name]:.3f}", f"{memory[name]['step']:,.0f}", f"{memory[name]['total']:,.0f}")
            for name in ("headless", "causal_lm")
        ]
        + [
            (
                "ratio",
                f"{times['causal_lm'] / times['headless']:.2f}x faster",
                *(f"{memory['causal_lm'][part] / memory['headless'][part]:.2f}x less" for part in ("step", "total")),
            )
        ],
    )
    saved = memory["causal_lm"]["step"] - memory["headless"]["step"]
    logits = args.memory_tokens * args.vocabulary * getattr(torch, args.dtype).itemsize / MIB
    print(f"saved: {saved:,.0f} MiB a step; the logits of {args.memory_tokens:,} tokens are {logits:,.0f} MiB")
    return {
        "head_parity_max_difference": difference,
        "head_speedup_ratio": times["causal_lm"] / times["headless"],
        "head_step_memory_ratio": memory["causal_lm"]["step"] / memory["headless"]["step"],
        "head_step_memory_saved_mib": saved,
        "logits_memory_mib": logits,
        **{f"{name}_step_s": value for name, value in times.items()},
        **{f"{name}_step_memory_mib": parts["step"] for name, parts in memory.items()},
        **{f"{name}_total_memory_mib": parts["total"] for name, parts in memory.items()},
    }


def measure_memory(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Memory of one model in MiB: ``step``, beyond what was held before the first step, and ``total``, with weights."""
    if args.device == "cuda":
        return _use_memory(name, args)
    # A fork starts its own peak and imports nothing anew; the models exist in it alone.
    receive, send = multiprocessing.Pipe(duplex=False)
    context: Any = multiprocessing.get_context("fork")
    process = context.Process(target=lambda: send.send(_use_memory(name, args)))
    process.start()
    send.close()
    memory = receive.recv()
    process.join()
    return memory


def _use_memory(name: str, args: argparse.Namespace) -> dict[str, float]:
    start = memory_now(args.device)
    headless, thrown_away = build(args)
    model = headless if name == "headless" else thrown_away
    batch = random_rows([args.length] * (args.memory_tokens // args.length), args.vocabulary, args.device)
    before = memory_now(args.device)
    step(model, *batch)
    peak = memory_peak(args.device)
    return {"step": (peak - before) / MIB, "total": (peak - start) / MIB}


def memory_now(device: str) -> float:
    """Bytes held now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return _status("VmRSS")


def memory_peak(device: str) -> float:
    """Most bytes held so far."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(key: str) -> float:
    # Not getrusage: a child's maximum begins at that of its parent. Where there is no /proc, memory is left out.
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), math.nan)


# -- length buckets ---------------------------------------------------------------------------------------------------


def long_tailed(rows: int, longest: int, seed: int) -> list[int]:
    """Lengths like those of a reasoning set: log-normal, the 99th percentile at ten times the median."""
    median = longest / 16
    sizes = np.random.default_rng(seed).lognormal(np.log(median), 1.0, rows)
    return np.clip(sizes, 4, longest).astype(int).tolist()


def lengths_of(file: Path, processor: str, longest: int) -> list[int]:
    """Tokens of each row of a rollout file, prompt and completion; image tokens are not counted."""
    tokenizer = tokenizer_of(load_processor(processor))
    sizes = []
    for line in file.read_text(encoding="utf-8").splitlines():
        for rollout in parse_record(json.loads(line), file.parent)[0] if line.strip() else ():
            completion = rollout.token_ids or encode_completion(tokenizer, rollout)
            sizes.append(min(longest, len(encode_prompt(tokenizer, rollout, [])) + len(completion)))
    return sizes


def compare_batches(args: argparse.Namespace) -> dict[str, Any]:
    """Padding and speed of random and of length-bucketed batches."""
    if args.rollouts:
        every = lengths_of(args.rollouts, args.processor, args.longest)
        sizes = np.random.default_rng(0).permutation(every)[: args.rows].tolist()
    else:
        every = long_tailed(PLANNED, args.longest, seed=0)
        sizes = long_tailed(args.rows, args.longest, seed=1)
    overrides = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 192}
    model = LengthValueModel.from_backbone("tiny-text", LenVMConfig(GAMMA), pretrained=False, overrides=overrides)
    model = model.to(args.device).train()

    def plan(lengths: list[int], bucket: bool) -> list[list[int]]:
        batches = plan_batches(lengths, args.max_tokens, seed=0, bucket=bucket)
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths))), "every row once"
        return batches

    def epoch(batches: list[list[int]]) -> Callable[[], None]:
        def run() -> None:
            for batch in batches:
                step(model, *random_rows([sizes[row] for row in batch], 2048, args.device))

        return run

    plans = {"random": plan(sizes, bucket=False), "bucketed": plan(sizes, bucket=True)}
    epoch([max(plans["random"], key=len)])()  # warm-up
    seconds = interleave({name: epoch(batches) for name, batches in plans.items()}, args.epochs)
    rates = {name: sum(sizes) / statistics.median(values) for name, values in seconds.items()}
    padding = {name: 100.0 * padding_share(sizes, batches) for name, batches in plans.items()}
    planned = {name: 100.0 * padding_share(every, plan(every, name == "bucketed")) for name in plans}
    source = args.rollouts or "log-normal lengths"
    print(
        f"\nlength buckets: {len(sizes):,} rows of {source}, median {np.median(sizes):.0f} and longest {max(sizes):,} "
        f"tokens, batches of at most {args.max_tokens:,} padded tokens"
    )
    print_table(
        ("", "real tokens/s", "padding", f"padding, {len(every):,} rows"),
        [(name, f"{rates[name]:,.0f}", f"{padding[name]:.1f}%", f"{planned[name]:.1f}%") for name in plans]
        + [("ratio", f"{rates['bucketed'] / rates['random']:.2f}x faster", "", "")],
    )
    return {
        "bucketing_speedup_ratio": rates["bucketed"] / rates["random"],
        **{f"{name}_padding_percent": value for name, value in padding.items()},
        **{f"{name}_padding_all_rows_percent": value for name, value in planned.items()},
        **{f"{name}_real_tokens_per_s": value for name, value in rates.items()},
    }


# -- command line -----------------------------------------------------------------------------------------------------


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    for cells in (header, *rows):
        print(f"{cells[0]:12}" + "".join(f"{cell:>22}" for cell in cells[1:]))


def parse() -> argparse.Namespace:
    """Read the command line; the default shape is Qwen2.5-0.5B's with 4 of its 24 layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    head = parser.add_argument_group("vocabulary head")
    head.add_argument("--vocabulary", type=int, default=151_936, help="tokens of the vocabulary")
    head.add_argument("--hidden", type=int, default=896, help="width of the backbone")
    head.add_argument("--intermediate", type=int, default=4864, help="width of its MLPs")
    head.add_argument("--layers", type=int, default=4, help="its layers")
    head.add_argument("--heads", type=int, default=14, help="attention heads")
    head.add_argument("--kv-heads", type=int, default=2, help="key-value heads")
    head.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    head.add_argument("--batch", type=int, default=2, help="rows of a batch")
    head.add_argument("--length", type=int, default=128, help="tokens of a row")
    head.add_argument("--memory-tokens", type=int, default=2048, help="tokens of the step whose memory is measured")
    head.add_argument("--rounds", type=int, default=7, help="timed steps of each model")
    buckets = parser.add_argument_group("length buckets")
    buckets.add_argument("--rollouts", type=Path, help="JSONL file whose lengths to use")
    buckets.add_argument("--processor", default="tiny-text", help="tokenizer for --rollouts, where it stores no ids")
    buckets.add_argument("--rows", type=int, default=400, help="rows to time")
    buckets.add_argument("--longest", type=int, default=1024, help="tokens a row is truncated to")
    buckets.add_argument("--max-tokens", type=int, default=2048, help="padded tokens of a batch")
    buckets.add_argument("--epochs", type=int, default=5, help="timed passes over the rows in each order")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--quick", action="store_true", help="seconds; tiny shapes, whose ratios mean nothing")
    args = parser.parse_args()
    if args.quick:
        args.vocabulary, args.hidden, args.intermediate, args.layers, args.heads = 4096, 64, 128, 1, 2
        args.rounds, args.rows, args.epochs, args.longest, args.max_tokens = 2, 60, 1, 256, 512
        args.memory_tokens = 256
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    result = {"benchmark": "train_step", "device": args.device, "layers": args.layers, "vocabulary": args.vocabulary}
    result |= compare_heads(args)
    result |= compare_batches(args)
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
