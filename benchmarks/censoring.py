r"""Which treatment of completions that hit their token limit is least biased?

The generator of the tiny world, tiny-text, solves stories and writes texts without any limit that matters (1,024
tokens), so here the truth is known. Training completions are then cut at ``--limit`` tokens and marked as censored; the
same model, from the same weights, sees the same completions in the same order under each treatment of
`lenvm_lightning.censoring`, through ``LenVMModule.loss_sum``. ``uncut`` trains on what was there before the cut: the
error that is left with it is the model's, not the treatment's. ``bins`` is the mean of a distributional head, whose
likelihood says of truncated completions that they are longer than what was seen, ``bins_uncut`` the same uncut.

How to read the table: held-out prompts, judged against L_GT of many uncut completions.

    bias    mean of predicted / true - 1 at the prompt boundary s_0; negative: too short. A treatment's own fault is
            its distance from uncut. The truth of bins is the mean length, that of the others the length of the mean
            value.
    MRE     mean of |predicted / true - 1| there.
    at cut  bias of the mean value at the cut, in tokens, over the held-out completions that pass it: what the
            bootstrapped targets are made of.

*often cut* are prompts of which more than half of the completions pass the limit, *rarely cut* those under a fifth: a
good treatment mends the first without hurting the second. One half of a prompt's completions puts it into a group, the
other half is its truth, so that no group is chosen by the noise of its truth. Small numbers need several ``--seeds``;
the ± is half their range. All treatments share one gamma, that of the uncut lengths.

    python benchmarks/censoring.py                       # an hour
    python benchmarks/censoring.py --limit 120 --seeds 1 --treatments anchored drop uncut
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from datamodules.collate import Collator
from lenvm_lightning.batch import LengthBatch
from lenvm_lightning.censoring import CensoredKind, tail_after_cut
from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.distributions.heads import HeadConfig, make_rule, rule_to_plain
from lenvm_lightning.models.lenvm_config import LenVMConfig
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.objectives import LossConfig
from lenvm_lightning.rollouts.prompting import encode_prompt
from lenvm_lightning.rollouts.prompts import load_prompts
from lenvm_lightning.rollouts.sample import open_generator, sample_rollouts
from lenvm_lightning.training.batch_layouts import row_outputs
from lenvm_lightning.training.build import build_model
from lenvm_lightning.training.module import TextLenVM
from lenvm_lightning.values import gamma_for_length, remaining_to_value, value_to_remaining

BACKBONE = "tiny-text"
UNCUT = "uncut"
BINS, BINS_UNCUT = "bins", "bins_uncut"
ENDLESS = 1024  # tokens: tiny-text hardly ever writes more
MICRO_BATCH = 4
RARELY, OFTEN = 0.2, 0.5


def draw(
    folder: Path, split: str, stories: int, texts: int, completions: int
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Sample uncut completions of tiny-text, or read those that an earlier run sampled.

    Returns:
        Token ids of each prompt, chat template applied, and of each completion of each prompt, EOS included.
    """
    asked = load_prompts(
        [{"source": name, "split": split, "limit": n} for name, n in (("tiny-math", stories), ("tiny-write", texts))]
    )
    folder = folder / f"{split}-{stories}+{texts}x{completions}"
    outcome = sample_rollouts(open_generator(BACKBONE), asked, completions, folder, SamplingParams(max_tokens=ENDLESS))
    processor = load_processor(BACKBONE)
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
        answers: token ids of each completion of each prompt.
        gamma: discount.
        limit: where training completions are cut.
    """

    def __init__(self, prompts: list[list[int]], answers: list[list[list[int]]], gamma: float, limit: int) -> None:
        counts = torch.tensor([[len(answer) for answer in many] for many in answers], dtype=torch.float64)
        self.gamma, self.prompts = gamma, prompts
        self.truth = value_to_remaining(remaining_to_value(counts[:, 1::2], gamma).mean(dim=1), gamma)
        self.mean_length = counts[:, 1::2].mean(dim=1)
        share = (counts[:, ::2] > limit).double().mean(dim=1)
        self.groups = {"rarely_cut": share < RARELY, "often_cut": share > OFTEN}
        pairs = [(prompt, answer) for prompt, many in zip(prompts, answers, strict=True) for answer in many]
        longer = [(prompt, answer) for prompt, answer in pairs if len(answer) > limit]
        longer = longer[:: max(1, len(longer) // 300)]
        self.cut = [prompt + answer[:limit] for prompt, answer in longer]
        self.after_cut = torch.tensor([len(answer) - limit for _, answer in longer], dtype=torch.float64)

    def _mean(self, remaining: Tensor) -> float:
        """The length whose value is the mean value of these."""
        return float(value_to_remaining(remaining_to_value(remaining, self.gamma).mean(), self.gamma))

    def score(self, module: TextLenVM) -> dict[str, float]:
        """Bias and MRE at the prompt boundary for each group of prompts, and bias at the cut, in percent."""
        has_bins = module.lenvm.length_rule is not None
        ratio = self._predict(module, self.prompts) / (self.mean_length if has_bins else self.truth) - 1.0
        scores = {}
        for name, group in self.groups.items():
            scores[f"bias_{name}_percent"] = 100.0 * float(ratio[group].mean())
            scores[f"mre_{name}_percent"] = 100.0 * float(ratio[group].abs().mean())
        mean = torch.mean if has_bins else self._mean
        at_cut = float(mean(self._predict(module, self.cut))) / float(mean(self.after_cut))
        scores["bias_at_cut_percent"] = 100.0 * (at_cut - 1.0)
        return scores

    @staticmethod
    def _predict(module: TextLenVM, rows: list[list[int]]) -> Tensor:
        """Remaining tokens predicted after each row: by the value, or the mean of the bins where there are any."""
        model = module.lenvm.eval()
        found = []
        for part in batched(rows, 64):
            width = max(map(len, part))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in part])
            sizes = torch.tensor([len(row) for row in part])
            with torch.no_grad():
                outputs = model(ids, (torch.arange(width) < sizes[:, None]).long(), all_heads=True)
            of_last = outputs[torch.arange(len(part)), sizes - 1]
            has_bins = model.length_rule is not None
            predicted = model.distribution(of_last).mean() if has_bins else model.remaining(of_last[:, 0])
            found.append(predicted.double())
        return torch.cat(found)


def batched(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Consecutive parts of a list."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def make_batches(
    prompts: list[list[int]], answers: list[list[list[int]]], limit: int, rows_a_step: int, steps: int, seed: int
) -> Iterator[list[LengthBatch]]:
    """The micro-batches of each step: the same completions in the same order whatever the limit, little padding."""
    pairs = [(number, prompt, answer) for number, prompt in enumerate(prompts) for answer in answers[number]]
    collate = Collator(pad_token_id=0)
    random = np.random.default_rng(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < rows_a_step:
            order += random.permutation(len(pairs)).tolist()
        rows, order = order[:rows_a_step], order[rows_a_step:]
        rows.sort(key=lambda row: len(pairs[row][1]) + len(pairs[row][2]))
        yield [collate([as_row(row, *pairs[row], limit) for row in part]) for part in batched(rows, MICRO_BATCH)]


def as_row(row: int, number: int, prompt: list[int], answer: list[int], limit: int) -> dict[str, Any]:
    """A completion as the DataModule would hand it over, cut at the limit."""
    return {
        "input_ids": prompt + answer[:limit],
        "prompt_length": len(prompt),
        "length": len(answer),
        "censored": len(answer) > limit,
        "images": [],
        "prompt_index": number,
        "row": row,
    }


def train(
    treatment: str,
    steps: Iterator[list[LengthBatch]],
    lengths: list[int],
    gamma: float,
    args: argparse.Namespace,
    seed: int,
) -> TextLenVM:
    """Train one model as the recipe does: AdamW, linear warm-up, cosine to 0, token-mean loss."""
    torch.manual_seed(seed)
    censored: Any = treatment if treatment in get_args(CensoredKind) else "anchored"
    head = HeadConfig("bins") if treatment in (BINS, BINS_UNCUT) else HeadConfig()
    module = TextLenVM(BACKBONE, gamma=gamma, loss=LossConfig(censored=censored), head=head)
    # What a DataModule tells the module: the median as seen, and how completions end shortly before the cut.
    limit = limit_of(treatment, args.limit)
    seen = [min(length, limit) for length in lengths]
    module.tail_after_cut = tail_after_cut(seen, [length > limit for length in lengths])
    rule = make_rule(head.kind, head.size, max(seen), module.tail_after_cut)
    config = LenVMConfig(gamma=gamma, backbone=BACKBONE, length_head=rule_to_plain(rule) if rule is not None else {})
    module.model = build_model(module.settings, config, float(np.median(seen)) / 2)
    module.model.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(30, args.steps // 5), args.steps)
    for batches in steps:
        optimizer.zero_grad()
        tokens = torch.zeros(())
        for batch in batches:
            total, count = module.loss_sum(row_outputs(module.lenvm, batch), batch)
            total.backward()
            tokens = tokens + count
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad /= tokens.clamp(min=1)
        optimizer.step()
        schedule.step()
    return module


def limit_of(treatment: str, limit: int) -> int:
    """Tokens at which the completions of a treatment are cut."""
    return ENDLESS if treatment in (UNCUT, BINS_UNCUT) else limit


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    stories, texts = args.held_out // 3, args.held_out - args.held_out // 3  # few stories are rarely cut
    held_prompts, held_answers = draw(args.folder, "test", stories, texts, args.held_out_completions)
    half = args.prompts // 2
    prompts, answers = draw(args.folder, "train", half, args.prompts - half, args.completions)
    train_lengths = [len(answer) for many in answers for answer in many]
    lengths = np.array([len(answer) for many in held_answers for answer in many])
    gamma = args.gamma or gamma_for_length(float(np.percentile(lengths, 99)))
    held_out = HeldOut(held_prompts, held_answers, gamma, args.limit)
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
            limit = limit_of(treatment, args.limit)
            steps = make_batches(prompts, answers, limit, args.rows, args.steps, seed)
            score = held_out.score(train(treatment, steps, train_lengths, gamma, args, seed))
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
    columns.append("bias_at_cut_percent")
    print(f"\n{'':14}{'often cut':^28}{'rarely cut':^28}{'at cut':^14}")
    print(f"{'treatment':14}" + f"{'bias':>14}{'MRE':>14}" * 2 + f"{'bias':>14}")
    for treatment, runs in scores.items():
        cells = []
        for key in columns:
            values = [run[key] for run in runs]
            sign = "+" if key.startswith("bias") else ""
            cells.append(f"{statistics.mean(values):{sign}.1f}% ±{(max(values) - min(values)) / 2:.1f}")
        print(f"{treatment:14}" + "".join(f"{cell:>14}" for cell in cells))


def parse() -> argparse.Namespace:
    """Read the command line."""
    kinds = [UNCUT, *get_args(CensoredKind), BINS_UNCUT, BINS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=80, help="tokens at which training completions are cut")
    parser.add_argument("--treatments", nargs="+", choices=kinds, default=kinds, help="which to compare")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of each training")
    parser.add_argument("--rows", type=int, default=16, help="completions a step")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each treatment; weights and order differ")
    parser.add_argument("--prompts", type=int, default=1600, help="training prompts")
    parser.add_argument("--completions", type=int, default=4, help="completions of a training prompt")
    parser.add_argument("--held-out", type=int, default=240, help="held-out prompts")
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
