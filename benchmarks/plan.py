r"""How well ``lenvm plan`` foretells memory: its peak beside that of a real training run by Lightning's Trainer.

Each case is planned for a CPU, and then trained for two optimizer steps in a process of its own, whose most resident
memory beyond what it had before there was a model is measured. A ratio of 1 is a right plan. What a plan leaves out is
in the ratio: workspaces of the kernels, what Lightning and Python hold. Freed memory goes back to the system at once
here; ``--keep`` lets the C library hold on to it, as it does by default, and the difference is fragmentation.

    python benchmarks/plan.py                    # some minutes on one core, 6 GB
    python benchmarks/plan.py --cases text vision
"""

import argparse
import ctypes
import json
import logging
import multiprocessing
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from lenvm_lightning import BackboneConfig, TextLenVM, VisionLenVM
from lenvm_lightning.planning.dry_run import DryRun
from lenvm_lightning.planning.memory_kinds import GRADIENTS, STATES, WEIGHTS
from lenvm_lightning.planning.plan import plan
from lenvm_lightning.planning.planned_model import build
from lenvm_lightning.planning.settings import BatchShape, PlanSettings
from lenvm_lightning.training.module import LenVMModule

MIB = 2.0**20
_M_MMAP_THRESHOLD = -3  # of mallopt
_TEXT = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 4, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151_936,
}  # fmt: skip
_VISION = {
    "text_config": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 16,
                    "vocab_size": 16_384},
    "vision_config": {"depth": 4, "hidden_size": 512, "intermediate_size": 1024, "num_heads": 8,
                      "out_hidden_size": 512},
}  # fmt: skip
_GRID = (1, 24, 24)
_ROWS, _IMAGES = BatchShape("text", 4, 512), BatchShape("vision", 4, 384, _GRID, 144)
_FEW = {**_TEXT, "vocab_size": 16_384}
# Backbone, what is changed of it, batch, settings of the Trainer, settings of the module. With the vocabulary of a real
# model the optimizer step takes the most; in the others it is what the forward pass keeps, or the backward pass makes.
CASES: dict[str, tuple[str, dict[str, Any], BatchShape, dict[str, Any], dict[str, Any]]] = {
    "real vocabulary": ("tiny-text", _TEXT, BatchShape("text", 2, 128), {}, {}),
    "text": ("tiny-text", _FEW, _ROWS, {}, {}),
    "text, 2 accumulated": ("tiny-text", _FEW, _ROWS, {"accumulate": 2}, {}),
    "text, checkpointing": ("tiny-text", _FEW, _ROWS, {}, {"gradient_checkpointing": True}),
    "text, bf16-mixed": ("tiny-text", _FEW, _ROWS, {"precision": "bf16-mixed"}, {}),
    "text, bf16-true": ("tiny-text", _FEW, _ROWS, {"precision": "bf16-true"}, {}),
    "vision": ("tiny-vl", _VISION, _IMAGES, {}, {}),
    "vision, tower trained": ("tiny-vl", _VISION, _IMAGES, {}, {"freeze_vision": False}),
}
QUICK = {
    "text": ("tiny-text", {"vocab_size": 50_000, "hidden_size": 256}, BatchShape("text", 4, 256), {}, {}),
    "vision": ("tiny-vl", {"text_config": {"vocab_size": 50_000}}, BatchShape("vision", 4, 256, _GRID, 144), {}, {}),
}


def module_of(case: tuple[Any, ...]) -> LenVMModule:
    backbone, overrides, shape, _, options = case
    kind = VisionLenVM if shape.grid else TextLenVM
    return kind(BackboneConfig(backbone, pretrained=False, overrides=overrides, **options), gamma=0.99)


def train(case: tuple[Any, ...], steps: int, give_back: bool, results: Any) -> None:
    """Train for some steps; sends the most memory there was beyond the start."""
    backbone, _, shape, options, _ = case
    if give_back:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**18)
    # Libraries and the Trainer are loaded by the first step of any model.
    fit((backbone, {}, BatchShape("", 2, shape.image_tokens + 8, shape.grid, shape.image_tokens), options, {}), 1)
    before = status("VmRSS")
    fit(case, steps)
    results.send(status("VmHWM") - before)


def fit(case: tuple[Any, ...], steps: int) -> None:
    """Train by Lightning's Trainer on one batch again and again."""
    shape, settings = case[2], settings_of(case)
    sample = module_of(("tiny-vl" if shape.grid else "tiny-text", {}, shape, {}, {}))
    build(sample, None, settings)
    batch = DryRun(sample, settings, None).batch(shape, shape.rows)
    del sample
    text = batch["input_ids"] == 0
    batch["input_ids"] += text * torch.randint(2, 1000, batch["input_ids"].shape)
    trainer = L.Trainer(
        max_steps=steps, accumulate_grad_batches=settings.accumulate, precision=settings.precision, accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module_of(case), DataLoader([batch] * (steps * settings.accumulate), batch_size=None))


def settings_of(case: tuple[Any, ...]) -> PlanSettings:
    return PlanSettings(**{"gpu": False, **case[3]})


def status(key: str) -> float:
    """Bytes of resident memory of this process, now (VmRSS) or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def measure(case: tuple[Any, ...], steps: int, give_back: bool) -> float:
    """Peak in bytes, from a fork: it starts its own peak and imports nothing anew."""
    receive, send = multiprocessing.Pipe(duplex=False)
    context: Any = multiprocessing.get_context("fork")
    process = context.Process(target=train, args=(case, steps, give_back, send))
    process.start()
    send.close()
    peak = receive.recv()
    process.join()
    return peak


def compare(name: str, case: tuple[Any, ...], peak: float) -> dict[str, Any]:
    """Print a plan beside what was measured."""
    shape = case[2]
    [step] = plan(module_of(case), [shape], settings_of(case)).steps
    parts = step.memory[step.fullest]
    fixed = sum(parts.get(kind, 0.0) for kind in (WEIGHTS, GRADIENTS, STATES))
    print(
        f"{name:24}{f'{shape.rows} x {shape.length}':>12}{fixed / MIB:>14,.0f}{step.peak / MIB:>12,.0f}"
        f"{peak / MIB:>12,.0f}{step.peak / peak:>8.3f}   {step.fullest}",
        flush=True,
    )
    return {
        "case": name,
        "planned_mib": step.peak / MIB,
        "measured_mib": peak / MIB,
        "planned_over_measured_ratio": step.peak / peak,
        "fullest": step.fullest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of the real training")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--keep", action="store_true", help="let the C library keep what is freed, as it usually does")
    parser.add_argument("--quick", action="store_true", help="seconds; small shapes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cases = QUICK if args.quick else {name: CASES[name] for name in args.cases}
    torch.manual_seed(0)
    # All are measured first: a process that has run a backward pass, as planning does, cannot fork one that will.
    measured = {name: measure(case, args.steps, not args.keep) for name, case in cases.items()}
    header = ("batch", 12), ("fixed parts", 14), ("planned", 12), ("measured", 12), ("ratio", 8)
    print(f"{'memory, MiB':24}" + "".join(f"{text:>{width}}" for text, width in header) + "   fullest in")
    rows = [compare(name, case, measured[name]) for name, case in cases.items()]
    print("\n" + json.dumps({"benchmark": "plan", "rows": rows}))


if __name__ == "__main__":
    main()
