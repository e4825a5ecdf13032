r"""Does a length value model train as well in half precision? The paper's Figure 5c on the tiny world.

tiny-text with a fresh head learns scripted rollouts through the Trainer, once with each ``--precisions`` for each seed:
same weights, same rows in the same order, same steps. Returns and losses are computed in float32 under all of them.

How to read the table: what was reached on held-out completions after the last step, as a ratio to ``32-true`` of the
same seed, mean over the seeds ± half their range; above 1 is worse. *Chance* is how far ``32-true`` itself goes from
seed to seed, half its range over its mean. *Along the way* is the largest difference of the validation losses at the
``--checks``. Two questions, for the verdict is not the same:

    Does it compute the same curve?  The mean of the ratios of the losses is 1 within Student's t of the pairs.
    Does it matter beside chance?    Another seed would have changed the loss by more.

``bf16-true`` keeps the weights themselves in bfloat16, where an AdamW step far smaller than a weight would be rounded
away; `CompensatedAdamW` keeps what rounding takes. The last lines say how often there is something to keep: the share
of the backbone's weights that stay what they are when a step of AdamW's usual size, the learning rate, is subtracted;
at the peak of this benchmark, at the tenth of it that the cosine passes four fifths through the training, and at the
paper's 2e-5. ``--plain`` trains by torch's own AdamW, to show what that costs.

    python benchmarks/precision.py                             # six minutes of one core
    python benchmarks/precision.py --lr 2e-5

On a CPU, Lightning's flag ``16-mixed`` means bfloat16. Here it means float16 there, too, with a gradient scaler, by
way of the plugin that the flag stands for on a GPU.
"""

import argparse
import json
import logging
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision

from datamodules import TextRollouts
from lenvm_lightning.models.backbone import load_backbone
from lenvm_lightning.tinyworld.rollouts import write_rollouts
from lenvm_lightning.training import optimizers
from lenvm_lightning.training.module import TextLenVM
from lenvm_lightning.training.optimizers import OptimizerConfig

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
EXACT = "32-true"
PAPER_LR = 2e-5
T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # 95% of Student's t, by the number of seeds
FIGURES = {
    "loss": "validation loss",
    "mae_tokens/start": "MAE at the start",
    "mae_tokens/50": "MAE at 50%",
    "mre": "prompt-boundary MRE",
}


class Curve(L.Callback):
    """What every validation found."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the figures of the table."""
        self.found.append({name: float(trainer.callback_metrics[f"val/{name}"]) for name in FIGURES})


def computing(precision: str, device: str) -> dict[str, Any]:
    """Arguments of the Trainer for a precision."""
    if precision == "16-mixed" and device == "cpu":  # by its flag Lightning would take bfloat16
        return {"plugins": [MixedPrecision("16-mixed", device)]}
    return {"precision": precision}


def train(precision: str, seed: int, rollouts: Path, args: argparse.Namespace) -> list[dict[str, float]]:
    """Figures after each part of a training."""
    L.seed_everything(seed, workers=True, verbose=False)
    optimizer = OptimizerConfig(lr=args.lr, betas=(0.9, 0.98), weight_decay=0.1, warmup_steps=min(20, args.steps // 4))
    module = TextLenVM("tiny-text", gamma=0.98, optimizer=optimizer)
    data = TextRollouts(
        str(rollouts), batch_tokens=args.batch_tokens, seed=seed, cache_dir=str(args.folder), num_proc=1
    )
    curve = Curve()
    trainer = L.Trainer(
        max_steps=args.steps,
        max_epochs=-1,
        val_check_interval=max(1, args.steps // args.checks),
        check_val_every_n_epoch=None,
        **computing(precision, args.device),
        accelerator=args.device,
        devices=1,
        gradient_clip_val=1.0,
        callbacks=[curve],
        logger=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)
    return curve.found


def lost_steps(lr: float) -> float:
    """Percent of tiny-text's weights that a step of size ``lr`` does not change in bfloat16."""
    weights = torch.cat([p.detach().flatten() for p in load_backbone("tiny-text").parameters() if p.ndim >= 2])
    stored = weights.bfloat16()
    return 100.0 * float(((stored.float() - lr).bfloat16() == stored).double().mean())


def compare(runs: dict[str, list[list[dict[str, float]]]]) -> dict[str, dict[str, Any]]:
    """Ratios to float32 by precision, each run beside that of its seed, and the verdicts."""
    exact = runs[EXACT]
    chance = {}
    for name in FIGURES:
        ends = [curve[-1][name] for curve in exact]
        chance[name] = (max(ends) - min(ends)) / 2 / statistics.mean(ends)
    table: dict[str, dict[str, Any]] = {}
    for precision, curves in runs.items():
        row: dict[str, Any] = {"seeds": len(curves)}
        for name in FIGURES:
            ratios = [curve[-1][name] / beside[-1][name] for curve, beside in zip(curves, exact, strict=False)]
            row[name] = {
                "final": statistics.mean(curve[-1][name] for curve in curves),
                "ratio": statistics.mean(ratios),
                "half_range": (max(ratios) - min(ratios)) / 2,
                "chance": chance[name],
            }
        row["along_the_way"] = max(
            abs(a["loss"] / b["loss"] - 1.0)
            for curve, beside in zip(curves, exact, strict=False)
            for a, b in zip(curve, beside, strict=True)
        )
        gaps = [curve[-1]["loss"] / beside[-1]["loss"] - 1.0 for curve, beside in zip(curves, exact, strict=False)]
        if precision != EXACT and len(gaps) > 1:
            spread = T.get(len(gaps), 2.26) * statistics.stdev(gaps) / len(gaps) ** 0.5
            row["same_curve"] = abs(statistics.mean(gaps)) <= spread
            row["less_than_chance"] = abs(statistics.mean(gaps)) <= chance["loss"]
        table[precision] = row
    return table


def print_table(table: dict[str, dict[str, Any]]) -> None:
    """Ratios, chance, verdicts."""
    columns = "".join(f"{told:>22}" for told in FIGURES.values())
    print(f"\n{'ratio to ' + EXACT:24}{columns}{'along the way':>16}")
    for precision, row in table.items():
        if precision == EXACT:
            continue
        cells = [f"{row[name]['ratio']:.4f} ±{row[name]['half_range']:.4f}" for name in FIGURES]
        print(f"{precision:24}" + "".join(f"{cell:>22}" for cell in cells) + f"{100 * row['along_the_way']:>15.1f}%")
    exact = table[EXACT]
    print(f"{'chance (seeds)':24}" + "".join(f"{'±' + format(exact[name]['chance'], '.4f'):>22}" for name in FIGURES))
    print(f"{EXACT + ' itself':24}" + "".join(f"{exact[name]['final']:>22.4g}" for name in FIGURES) + "\n")
    for precision, row in table.items():
        if precision == EXACT:
            continue
        if "same_curve" not in row:
            print(f"{precision}: one seed says nothing about noise")
        else:
            verdict = "the same curve within noise" if row["same_curve"] else "NOT the same curve"
            size = "less" if row["less_than_chance"] else "MORE"
            gap, noise = 100.0 * (row["loss"]["ratio"] - 1.0), 100.0 * exact["loss"]["chance"]
            print(f"{precision}: {verdict}; validation loss {gap:+.2f}%, {size} than another seed does (±{noise:.2f}%)")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="to compare")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each training")
    parser.add_argument("--seeds", type=int, default=3, help="trainings with each precision; head and order differ")
    parser.add_argument("--checks", type=int, default=4, help="validations on the way, the last one included")
    parser.add_argument("--prompts", type=int, default=400, help="prompts, held-out ones included")
    parser.add_argument("--completions", type=int, default=4, help="completions of a prompt")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="padded tokens of a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--plain", action="store_true", help="bf16-true without compensation")
    parser.add_argument("--folder", type=Path, default=Path("runs/precision"), help="where rollouts are kept")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; the numbers mean nothing")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seeds, args.checks, args.prompts, args.completions, args.batch_tokens = 4, 2, 1, 30, 2, 512
    if EXACT not in args.precisions:
        args.precisions.insert(0, EXACT)
    args.precisions.sort(key=PRECISIONS.index)
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger(f"{name}.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    if args.plain:
        optimizers.CompensatedAdamW = torch.optim.AdamW  # type: ignore[misc]
    rollouts = write_rollouts("text", args.folder / "rollouts", args.prompts, args.completions)
    runs: dict[str, list[list[dict[str, float]]]] = {precision: [] for precision in args.precisions}
    began = time.perf_counter()
    for seed in range(args.seeds):
        for precision in args.precisions:
            runs[precision].append(train(precision, seed, rollouts, args))
            told = ", ".join(f"{told} {runs[precision][-1][-1][name]:.4g}" for name, told in FIGURES.items())
            print(
                f"[{time.perf_counter() - began:4.0f} s] seed {seed} {precision}: {told}", file=sys.stderr, flush=True
            )
    table = compare(runs)
    print_table(table)
    lost = {f"{lr:g}": lost_steps(lr) for lr in sorted({args.lr, args.lr / 10, PAPER_LR}, reverse=True)}
    for lr, share in lost.items():
        print(f"bf16-true: a step of {lr}, by itself, leaves {share:.0f}% of the weights in matrices as they are")
    result = {
        "benchmark": "precision",
        "device": args.device,
        "steps": args.steps,
        "seeds": args.seeds,
        "lr": args.lr,
        "compensated": not args.plain,
        "precisions": table,
        "steps_lost_percent": lost,
    }
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
