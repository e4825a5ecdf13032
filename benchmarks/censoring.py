r"""Which treatment of completions that hit their token limit is least biased?

The generator of the tiny world, tiny-text, solves stories and writes texts without any limit that matters (1,024
tokens), so here the truth is known. Training completions are then cut at ``--limit`` tokens and marked as censored; the
same model, from the same weights, sees the same completions in the same order under each treatment of
`lenvm_lightning.censoring`, through ``LenVMModule.loss_sum``. ``uncut`` trains on what was there before the cut: the
error that is left with it is the model's, not the treatment's. ``bootstrap_far`` is an experiment: bootstrap without
the states near the cut. All are judged at s_0 alone, which says nothing about predictions late in a completion.

How to read the table: held-out prompts, judged at the prompt boundary s_0 against L_GT of many uncut completions.

    bias  mean of predicted / true - 1; negative: too short. A treatment's own fault is its distance from uncut.
    MRE   mean of |predicted / true - 1|.

*often cut* are prompts of which more than half of the completions pass the limit, *rarely cut* those under a fifth: a
good treatment mends the first without hurting the second. Small numbers need several ``--seeds``; the spread between
them is the ±, half the range. All treatments share one gamma, that of the uncut lengths.

    python benchmarks/censoring.py                       # minutes
    python benchmarks/censoring.py --limit 120 --steps 1000 --treatments bootstrap drop uncut
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from datamodules.collate import Collator
from lenvm_lightning import checkpoint
from lenvm_lightning.batch import LengthBatch
from lenvm_lightning.censoring import CensoredKind
from lenvm_lightning.module import TextLenVM
from lenvm_lightning.rollouts.generation import Sampling
from lenvm_lightning.rollouts.prompting import encode_prompt
from lenvm_lightning.rollouts.prompts import load_prompts
from lenvm_lightning.rollouts.sample import open_generator, sample_rollouts
from lenvm_lightning.values import gamma_for_length, remaining_to_value, value_to_remaining

BACKBONE = "tiny-text"
UNCUT = "uncut"
ENDLESS = 1024  # tokens: tiny-text hardly ever writes more
RARELY, OFTEN = 0.2, 0.5


def draw(folder: Path, split: str, prompts: int, completions: int) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Sample uncut completions of tiny-text, or read those that an earlier run sampled.

    Returns:
        Token ids of each prompt, chat template applied, and of each completion of each prompt, EOS included.
    """
    # Few stories end before the limit for sure; among the texts there are enough of both kinds.
    asked = load_prompts(
        [{"source": name, "split": split, "limit": prompts // 2} for name in ("tiny-math", "tiny-write")]
    )
    folder = folder / f"{split}-{prompts}x{completions}"
    outcome = sample_rollouts(open_generator(BACKBONE), asked, completions, folder, Sampling(max_tokens=ENDLESS))
    processor = checkpoint.load_processor(BACKBONE)
    answers: dict[str, list[list[int]]] = {}
    for line in outcome.rollouts.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        answers.setdefault(record["prompt_id"], []).append(record["token_ids"])
    ids = [encode_prompt(processor, prompt.messages, [])[0] for prompt in asked]
    return ids, [answers[prompt.prompt_id] for prompt in asked]


class HeldOut:
    """Held-out prompts, the lengths of their uncut completions, and how far predictions are from them.

    Args:
        prompts: token ids of each prompt.
        lengths: tokens of each completion. Shape (prompts, completions).
        gamma: discount.
        limit: where training completions are cut.
    """

    def __init__(self, prompts: list[list[int]], lengths: np.ndarray, gamma: float, limit: int) -> None:
        counts = torch.as_tensor(lengths, dtype=torch.float64)
        self.prompts = prompts
        self.truth = value_to_remaining(remaining_to_value(counts, gamma).mean(dim=1), gamma)
        share = (counts > limit).double().mean(dim=1)
        self.groups = {"rarely_cut": share < RARELY, "often_cut": share > OFTEN}

    def score(self, module: TextLenVM) -> dict[str, float]:
        """Bias and MRE at the prompt boundary, in percent, for each group of prompts."""
        predicted = torch.cat([self._predict(module, part) for part in batched(self.prompts, 64)])
        ratio = predicted / self.truth - 1.0
        scores = {}
        for name, group in self.groups.items():
            scores[f"bias_{name}_percent"] = 100.0 * float(ratio[group].mean())
            scores[f"mre_{name}_percent"] = 100.0 * float(ratio[group].abs().mean())
        return scores

    @staticmethod
    def _predict(module: TextLenVM, prompts: list[list[int]]) -> Tensor:
        width = max(map(len, prompts))
        ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
        sizes = torch.tensor([len(prompt) for prompt in prompts])
        model = module.model
        assert model is not None
        model.eval()
        with torch.no_grad():
            logits = model(ids, (torch.arange(width) < sizes[:, None]).long())
        return model.remaining(logits)[torch.arange(len(prompts)), sizes - 1].double()


def batched(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Consecutive parts of a list."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def make_batches(
    prompts: list[list[int]], answers: list[list[list[int]]], limit: int, rows_a_step: int, steps: int, seed: int
) -> Iterator[LengthBatch]:
    """The training batches: the same completions in the same order whatever the limit."""
    pairs = [(number, prompt, answer) for number, prompt in enumerate(prompts) for answer in answers[number]]
    collate = Collator(pad_token_id=0)
    random = np.random.default_rng(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < rows_a_step:
            order += random.permutation(len(pairs)).tolist()
        rows, order = order[:rows_a_step], order[rows_a_step:]
        yield collate(
            [
                {
                    "input_ids": prompt + answer[:limit],
                    "prompt_length": len(prompt),
                    "length": len(answer),
                    "censored": len(answer) > limit,
                    "images": [],
                    "prompt_index": number,
                    "row": row,
                }
                for row in rows
                for number, prompt, answer in [pairs[row]]
            ]
        )


def far_from_cut(batch: LengthBatch, limit: int) -> LengthBatch:
    """Leave out the states of a censored row with less than half of the limit left to the cut.

    Bootstrapped, they are told little but what the model already says at the cut, and an error there feeds itself.
    The state at the cut stays: ``treat_censored`` reads the bootstrap from it and leaves it out itself.
    """
    remaining = batch["remaining"]
    near = batch["censored"][:, None] & (remaining > 0) & (remaining < limit // 2)
    return LengthBatch(**{**batch, "mask": batch["mask"] & ~near})


def early_states(batch: LengthBatch, limit: int) -> LengthBatch:
    """Keep the states up to half of the limit, of all rows alike, and those at a cut for their estimate.

    Every bootstrapped return then spans half of the limit or more, and no state is left to the short rows alone.
    """
    remaining = batch["remaining"]
    whole = torch.where(batch["mask"], remaining, 0).amax(dim=1, keepdim=True)
    written = whole - remaining
    at_cut = batch["censored"][:, None] & (remaining == 0)
    return LengthBatch(**{**batch, "mask": batch["mask"] & ((written <= limit // 2) | at_cut)})


# Changes of the batch that then goes through `bootstrap`.
EXTRA: dict[str, Callable[[LengthBatch, int], LengthBatch]] = {
    "bootstrap_far": far_from_cut,
    "bootstrap_early": early_states,
}


def train(
    treatment: str, batches: Iterator[LengthBatch], gamma: float, args: argparse.Namespace, seed: int
) -> TextLenVM:
    """Train one model as the recipe does: AdamW, linear warm-up, cosine to 0, token-mean loss."""
    torch.manual_seed(seed)
    module = TextLenVM(
        BACKBONE,
        gamma=gamma,
        censored=treatment if treatment in get_args(CensoredKind) else "bootstrap",
    )
    module.configure_model()
    assert module.model is not None
    module.model.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=args.lr, weight_decay=0.0)
    warmup = max(1, min(20, args.steps // 5))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1.0 + np.cos(np.pi * max(0, step - warmup) / args.steps))),
    )
    for batch in batches:
        if treatment in EXTRA:
            batch = EXTRA[treatment](batch, args.limit)
        total, tokens = module.loss_sum(module(batch), batch)
        optimizer.zero_grad()
        (total / tokens.clamp(min=1)).backward()
        optimizer.step()
        schedule.step()
    return module


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    held_prompts, held_answers = draw(args.folder, "test", args.held_out, args.held_out_completions)
    prompts, answers = draw(args.folder, "train", args.prompts, args.completions)
    lengths = np.array([[len(answer) for answer in answers] for answers in held_answers])
    gamma = args.gamma or gamma_for_length(float(np.percentile(lengths, 99)))
    held_out = HeldOut(held_prompts, lengths, gamma, args.limit)
    sizes = {name: int(group.sum()) for name, group in held_out.groups.items()}
    print(
        f"limit {args.limit} tokens: {np.mean(lengths > args.limit):.0%} of the completions are cut (median "
        f"{np.median(lengths):.0f}, 99% within {np.percentile(lengths, 99):.0f} tokens); gamma {gamma:.5f}\n"
        f"{len(held_prompts)} held-out prompts x {args.held_out_completions} completions: {sizes['rarely_cut']} rarely "
        f"cut, {sizes['often_cut']} often; training: {args.seeds} seeds x {args.steps} steps x {args.rows} completions",
        flush=True,
    )
    if not all(sizes.values()):
        sys.exit("no prompts in one of the groups: choose another --limit, or more --held-out prompts")
    scores: dict[str, list[dict[str, float]]] = {treatment: [] for treatment in args.treatments}
    began = time.perf_counter()
    for seed in range(args.seeds):
        for treatment in args.treatments:
            limit = ENDLESS if treatment == UNCUT else args.limit
            batches = make_batches(prompts, answers, limit, args.rows, args.steps, seed)
            score = held_out.score(train(treatment, batches, gamma, args, seed))
            scores[treatment].append(score)
            told = ", ".join(f"{key} {value:+.1f}" for key, value in score.items() if key.startswith("bias"))
            print(
                f"[{time.perf_counter() - began:4.0f} s] seed {seed} {treatment}: {told}", file=sys.stderr, flush=True
            )
    print_table(scores)
    result = {
        "benchmark": "censoring",
        "limit_tokens": args.limit,
        "gamma": gamma,
        "steps": args.steps,
        "seeds": args.seeds,
        "prompts_rarely_cut": sizes["rarely_cut"],
        "prompts_often_cut": sizes["often_cut"],
        "treatments": {
            treatment: {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
            for treatment, runs in scores.items()
        },
    }
    print(json.dumps(result))


def print_table(scores: dict[str, list[dict[str, float]]]) -> None:
    """Mean over the seeds ± half their range."""
    columns = [f"{what}_{group}_percent" for group in ("often_cut", "rarely_cut") for what in ("bias", "mre")]
    print(f"\n{'':14}{'often cut':^28}{'rarely cut':^28}\n{'treatment':14}" + f"{'bias':>14}{'MRE':>14}" * 2)
    for treatment, runs in scores.items():
        cells = []
        for key in columns:
            values = [run[key] for run in runs]
            sign = "+" if key.startswith("bias") else ""
            cells.append(f"{statistics.mean(values):{sign}.1f}% ±{(max(values) - min(values)) / 2:.1f}")
        print(f"{treatment:14}" + "".join(f"{cell:>14}" for cell in cells))


def parse() -> argparse.Namespace:
    """Read the command line."""
    kinds = [*get_args(CensoredKind), *EXTRA, UNCUT]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=80, help="tokens at which training completions are cut")
    parser.add_argument("--treatments", nargs="+", choices=kinds, default=kinds, help="which to compare")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each training")
    parser.add_argument("--rows", type=int, default=16, help="completions a step")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each treatment; weights and order differ")
    parser.add_argument("--prompts", type=int, default=1200, help="training prompts")
    parser.add_argument("--completions", type=int, default=4, help="completions of a training prompt")
    parser.add_argument("--held-out", type=int, default=200, help="held-out prompts")
    parser.add_argument("--held-out-completions", type=int, default=48, help="completions that make up their truth")
    parser.add_argument("--folder", type=Path, default=Path("runs/censoring"), help="where completions are kept")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--gamma", type=float, help="discount; by default from the uncut lengths")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; the numbers mean nothing")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.rows, args.seeds, args.prompts = 3, 4, 1, 12
        args.held_out, args.held_out_completions = 40, 4
    return args


if __name__ == "__main__":
    main()
