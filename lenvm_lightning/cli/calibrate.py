"""``lenvm calibrate``: how sure a length value model may be, from completions that it was not trained on."""

import argparse
import math
from pathlib import Path

from ..errors import DataError
from .models import add_models, open_lenvm

EXAMPLES = """examples:
  lenvm calibrate rollouts/held_out --lenvm runs/mine/model
  lenvm calibrate rollouts/held_out --lenvm published-lenvm --gamma 0.997

The end of a training calibrates by itself, on the prompts that it held out. This is for models of others, and for other
prompts than those trained on. Of a file that names splits only held-out ones (test, val, dev, eval) are read. The
calibration goes into lenvm_config.json in the folder of the length value model; nothing else there changes.
"""
_LEVELS = (0.05, 0.5, 0.95)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``lenvm calibrate``."""
    parser.add_argument("rollouts", metavar="ROLLOUTS", help="a folder of `lenvm sample`, or a rollouts.jsonl")
    add_models(parser, "whose completions they are (default: the one the length value model was trained for)")


def execute(arguments: argparse.Namespace) -> int:
    """Calibrate; exit status."""
    if arguments.lenvm is None:
        raise DataError("--lenvm is missing: the folder of a length value model")
    folder = Path(arguments.lenvm)
    if not folder.is_dir():
        raise DataError(f"--lenvm: {folder} is no folder here. Write it into one first: lenvm export")
    from ..evaluation.calibration import calibrate_on, write_calibration
    from ..models.processors import load_processor
    from ..rollouts.held_out import role_of
    from ..rollouts.read import read_rollouts, rollouts_file

    file = rollouts_file(Path(arguments.rollouts))
    rollouts = list(read_rollouts(file))
    if any(rollout.split is not None for rollout in rollouts):
        rollouts = [rollout for rollout in rollouts if role_of(rollout.split) == "test"]
        if not rollouts:
            raise DataError(f"{file} names splits, and none that is held out (test, val, dev, eval)")
    lenvm = open_lenvm(arguments, str(folder))
    found = calibrate_on(lenvm, load_processor(arguments.generator or folder), rollouts)
    write_calibration(lenvm, folder, found)
    print(f"{folder}: calibrated on {len(rollouts):,} completions of {found.prompts[0]:,} prompts")
    for band, row in zip(found.bands, found.asked, strict=True):
        asked = dict(zip(found.levels, row, strict=True))
        told = ", ".join(f"{level:.0%} {_place(asked[level])}" for level in _LEVELS)
        print(f"  from {band:,} tokens written on, of true lengths: {told}")
    print(f"next: lenvm predict PROMPTS --lenvm {folder} --quantiles {','.join(map(str, _LEVELS))}")
    return 0


def _place(level: float) -> str:
    """Where a share of true lengths lies among those predicted."""
    if math.isinf(level):
        return "at an unknown place, for too many were truncated"
    return f"within the predicted {level:.1%}"
