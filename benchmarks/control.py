r"""How well lengths are controlled on the tiny world, beside the base model and the paper's controls.

**Constraints** ("equal to", "at most", "at least" N tokens): texts on topics that neither generator nor length value
model has ever seen ("the green bridge"), and on which nothing was tuned; N from 16 to 256 and, for "equal to", lengths
between those, on which nothing was tuned either. LS is the Length Score and LD the deviation of LIFEBench, EOS counted;
beside them stand the log-probability per token that the base model gives the texts and length / N, for a score of 100
by three tokens, or by gibberish, is no success. Sampling: temperature 1, top-k 15, top-p .999.

**Trade-off** (tilt): held-out stories and images, Pass@1 against mean tokens. The hard budget is what truncation at B
would make of the very samples of the base model: wrong if longer than B, length min(length, B). Sampling: temperature
1, min-p .01 under guidance and, stricter than the paper, for the base model too.

Every point is the same number of samples of each of ``--seeds``, which have prompts of their own; ± is the standard
error by prompt. Points that are in ``--out`` already, with the same settings, are not sampled again; after a change of
the code, use another folder.

    python benchmarks/control.py                          # about 40 minutes on two cores
    python benchmarks/control.py --parts stories images #   the trade-off only
    python benchmarks/control.py --samples 48             # a look
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from lenvm_lightning import tinyworld
from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.errors import DataError
from lenvm_lightning.evaluation.statistics import at_length, hard_budget, mean_and_error
from lenvm_lightning.evaluation.tasks.lifebench import length_deviation, length_score
from lenvm_lightning.guidance import AtLeast, AtMost, Control, EqualTo, Tilt
from lenvm_lightning.models.value_model import LengthValueModel
from lenvm_lightning.rollouts.constraint import Constraint
from lenvm_lightning.rollouts.generators.interface import GeneratedText, Prompt, PromptRequest
from lenvm_lightning.rollouts.generators.local import LocalGenerator
from lenvm_lightning.tinyworld import writing
from lenvm_lightning.tinyworld.prompt_sets import check, prompt_set

GRID, BETWEEN = (16, 32, 64, 128, 256), (24, 48, 96, 192)
BETAS = (-2.0, -5.0, -10.0, -20.0)
SETS = {"stories": ("tiny-text", "tiny-math"), "images": ("tiny-vl", "tiny-vqa")}
COMPLETIONS = 5  # of a prompt
SEED_OF_PROMPTS = 1000  # far from those that anything was tuned on


def load(name: str) -> tuple[LocalGenerator, LengthValueModel]:
    """A tiny generator and the length value model that is shipped with it."""
    value_model = next(key for key, generator in tinyworld.VALUE_MODELS.items() if generator == name)
    return LocalGenerator.load(name), LengthValueModel.from_pretrained(value_model, dtype="float32")


def prompts_with(constraint: Constraint, n: int, count: int, seed: int) -> list[Prompt]:
    """Prompts with a length constraint."""
    try:
        topics = writing.unseen_topics(count, seed)
    except DataError as error:
        raise SystemExit(f"{error} (use fewer --samples)") from error
    problems = [writing.WritingProblem(topic, constraint, n) for topic in topics]
    return [
        Prompt(f"{seed}/{number}", [{"role": "user", "content": problem.prompt}])
        for number, problem in enumerate(problems)
    ]


class Sampler:
    """Samples points, each once.

    Args:
        out: folder of the points.
        samples: of each point, all seeds together.
        seeds: how many.
    """

    def __init__(self, out: Path, samples: int, seeds: int) -> None:
        self.out, self.seeds = out, seeds
        self.prompts = math.ceil(samples / seeds / COMPLETIONS)
        self._models: dict[str, tuple[LocalGenerator, LengthValueModel]] = {}

    def point(
        self,
        key: str,
        model: str,
        prompts: Callable[[int, int], Iterable[Prompt]],
        control: Control | None,
        sampling: dict[str, Any],
    ) -> list[dict[str, Any]]:
        """One row a completion: prompt, tokens, logprob, and the verdict of its check."""
        file = self.out / f"{key}.json"
        settings = {"control": repr(control), "sampling": sampling, "prompts": self.prompts, "seeds": self.seeds}
        stored = json.loads(file.read_text()) if file.exists() else {}
        if stored.get("settings") == settings:
            return stored["rows"]
        if model not in self._models:
            self._models[model] = load(model)
        generator, lenvm = self._models[model]
        generator.lenvm = lenvm if control is not None else None
        rows = []
        for seed in range(self.seeds):
            asked = {prompt.prompt_id: prompt for prompt in prompts(self.prompts, seed)}
            requests = [PromptRequest(prompt, tuple(range(COMPLETIONS)), control) for prompt in asked.values()]
            for answer in generator.sample(requests, SamplingParams(max_tokens=768, seed=seed, **sampling)):
                assert isinstance(answer.result, GeneratedText), answer.result
                tokens, meta = len(answer.result.token_ids), asked[answer.prompt_id].meta
                right = check(meta, answer.result.text, tokens) if meta else None
                row = {"prompt": f"{seed}:{answer.prompt_id}", "tokens": tokens, "right": right}
                truncated = answer.result.finish_reason == "length"
                rows.append({**row, "logprob": answer.result.logprob, "truncated": truncated})
        file.write_text(json.dumps({"settings": settings, "rows": rows}))
        print(f"{key}: {len(rows)} completions", flush=True)
        return rows


def mean(rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> tuple[float, float]:
    """Mean over completions, and its standard error with prompts as the unit."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row["prompt"], []).append(value(row))
    return mean_and_error(groups)


def logprob(rows: list[dict[str, Any]]) -> float:
    """Nats a token."""
    return sum(row["logprob"] for row in rows) / sum(row["tokens"] for row in rows)


def score_constraints(sampler: Sampler) -> list[str]:
    """The table of constraints."""
    kinds: list[tuple[Constraint, str, Callable[[int], Control | None], tuple[int, ...]]] = [
        ("equal to", "base model", lambda n: None, GRID),
        ("equal to", "EqualTo(n)", EqualTo, GRID),
        ("equal to", "EqualTo(n), other N", EqualTo, BETWEEN),
        ("equal to", "base model, other N", lambda n: None, BETWEEN),
        ("equal to", "hard (paper)", lambda n: EqualTo(n, mode="hard"), GRID),
        ("at most", "base model", lambda n: None, GRID),
        ("at most", "AtMost(n)", AtMost, GRID),
        ("at most", "hard (paper)", lambda n: AtMost(n, mode="hard"), GRID),
        ("at least", "base model", lambda n: None, GRID),
        ("at least", "AtLeast(n)", AtLeast, GRID),
    ]
    lines = [
        "| constraint | system | N | n | LS ↑ | LD ↓ | log p a token | length / N | truncated |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for constraint, system, control, lengths in kinds:
        columns = [score_constraint(sampler, constraint, system, n, control(n)) for n in lengths]
        lines += [_line(constraint, system, str(n), column) for n, column in zip(lengths, columns, strict=True)]
        count, *means = (statistics.fmean(figures) for figures in zip(*columns, strict=True))
        means[1] = math.sqrt(sum(column[2] ** 2 for column in columns)) / len(columns)
        lines.append(_line(f"**{constraint}**", f"**{system}**", "mean", [count * len(columns), *means]))
    return lines


def score_constraint(
    sampler: Sampler, constraint: Constraint, system: str, n: int, control: Control | None
) -> list[float]:
    """Samples, LS and its error, LD, nats a token, length / N, share truncated."""
    key = re.sub(r"[^a-z0-9]+", "-", f"{constraint} {system} {n}".lower())
    sampling = {"top_k": 15, "top_p": 0.999}
    rows = sampler.point(
        key, "tiny-text", lambda count, seed: prompts_with(constraint, n, count, seed), control, sampling
    )
    ls, error = mean(rows, lambda row: length_score(row["tokens"], n, constraint))
    ld, _ = mean(rows, lambda row: abs(length_deviation(row["tokens"], n)))
    share, _ = mean(rows, lambda row: row["tokens"] / n)
    return [len(rows), ls, error, ld, logprob(rows), share, statistics.fmean(row["truncated"] for row in rows)]


def _line(constraint: str, system: str, n: str, figures: list[float]) -> str:
    count, ls, error, ld, nats, share, truncated = figures
    return (
        f"| {constraint} | {system} | {n} | {count:,.0f} | {ls:.1f} ± {error:.1f} | {ld:.1%} | {nats:.2f} "
        f"| {share:.2f} | {truncated:.1%} |"
    )


def score_trade(sampler: Sampler, parts: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The table and the curves of the trade-off."""
    lines = [
        "| problems | system | n | tokens ↓ | share of the base's | Pass@1 ↑ | hard budget of that length | gain |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    curves: dict[str, Any] = {}
    for part in parts:
        model, name = SETS[part]

        def prompts(count: int, seed: int, name: str = name) -> Iterable[Prompt]:
            return prompt_set(name, "test", count, seed=SEED_OF_PROMPTS + seed)

        systems: dict[str, tuple[Control | None, float]] = {
            "base model": (None, 0.01),
            "base model, min-p 0": (None, 0.0),
            **{f"Tilt({beta:g})": (Tilt(beta), 0.01) for beta in BETAS},
        }
        runs = {
            system: sampler.point(f"{part}-{system}".replace(" ", "-"), model, prompts, control, {"min_p": min_p})
            for system, (control, min_p) in systems.items()
        }
        budgets = hard_budget(*([row[key] for row in runs["base model"]] for key in ("tokens", "right", "prompt")))
        points = []
        for system, rows in runs.items():
            tokens, _ = mean(rows, lambda row: row["tokens"])
            right, error = mean(rows, lambda row: float(bool(row["right"])))
            share = tokens / budgets.lengths[-1]
            cells = [
                part,
                system,
                f"{len(rows):,}",
                f"{tokens:.1f}",
                f"{share:.2f}",
                f"{right:.3f} ± {error:.3f}",
                "",
                "",
            ]
            if system.startswith("Tilt"):
                budget = at_length(budgets, tokens)
                cells[-2:] = [f"{budget:.3f}", f"{100 * (right - budget):+.0f} points"]
                points.append((tokens, right, error))
            lines.append(f"| {' | '.join(cells)} |")
        curves[part] = {"budget": (budgets.lengths, budgets.passes), "tilt": points}
    return lines, curves


def plot(curves: dict[str, Any], file: Path) -> None:
    """Pass@1 against mean tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(4.6 * len(curves), 3.4), squeeze=False, sharey=True)
    for axis, (part, curve) in zip(axes[0], curves.items(), strict=True):
        lengths, passes = curve["budget"]
        tokens, right, errors = zip((lengths[-1], passes[-1], 0.0), *curve["tilt"], strict=True)
        axis.plot(lengths, passes, color="0.55", label="hard budget")
        axis.errorbar(tokens, right, errors, marker="o", color="tab:blue", label="tilt, β = 0 … -20", capsize=2)
        axis.set(title=f"tiny world: {part}", xlabel="mean tokens", ylim=(0, 1.03))
        axis.set_xlim(0, 1.15 * lengths[-1])
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("Pass@1")
    axes[0][0].legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    sampler = Sampler(args.out, args.samples, args.seeds)
    print(f"{tinyworld.NOTICE}\n{args.seeds} seeds x {sampler.prompts} prompts x {COMPLETIONS} completions a point")
    report: list[str] = []
    if "constraints" in args.parts:
        report += score_constraints(sampler)
    trade = [part for part in args.parts if part in SETS]
    if trade:
        lines, curves = score_trade(sampler, trade)
        report += ["", *lines]
        plot(curves, args.out / "frontier.png")
    (args.out / "report.md").write_text("\n".join(report) + "\n", encoding="utf-8")
    print("\n".join(report))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["constraints", *SETS], default=["constraints", *SETS])
    parser.add_argument("--samples", type=int, default=1005, help="of each point, all seeds together")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/control"), help="folder of points, report and plot")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    return parser.parse_args()


if __name__ == "__main__":
    main()
