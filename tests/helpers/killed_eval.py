"""A driver of killed evaluations: `python tests/helpers/killed_eval.py FOLDER KILLS SEED WORDS...`."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import lenvm_lightning.evaluation.evaluate
import lenvm_lightning.models.value_model  # noqa: F401  (what every process would import again)
from lenvm_lightning.cli.evaluate import main


def drive(folder: Path, kills: int, seed: int, words: list[str]) -> None:
    """Begin the same evaluation again and again in a process of its own, and kill it as soon as it has added samples.

    Every kill comes at another number of samples and at a random moment after the last of them; one more comes before
    there are any, and the last run is left to its end.
    """
    torch.set_num_threads(1)  # so that there are no threads when it forks
    moments = random.Random(seed)
    file = folder / "samples.jsonl"
    for kill in range(kills + 1):
        before = _lines(file)
        child = os.fork()
        if child == 0:
            os._exit(main([*words, "--out", str(folder)]))
        if kill == kills:
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            break
        wanted = before + (moments.randrange(1, 25) if kill else 0)
        while _lines(file) < wanted:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the evaluation ended before it was killed"
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the evaluation ended before it was killed"
        print(f"killed at {_lines(file)}", file=sys.stderr)


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


if __name__ == "__main__":
    drive(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
