"""A driver of killed trainings: `python tests/helpers/killed_run.py FOLDER KILLS SEED`.

One training is left alone. Then others, with the same settings, are begun again and again in processes of their own and
killed at random moments, until so many kills are done; each must end with the weights of the first, bit for bit.
"""

import hashlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import peft  # noqa: F401  (what every process would import again)
import torch

import lenvm_lightning.pipeline.run_recipe  # noqa: F401
from lenvm_lightning.cli.main import main

SETTINGS = {
    "model.backbone.pretrained": "false",
    "model.backbone.overrides": "{num_hidden_layers: 1, hidden_size: 32, intermediate_size: 32}",
    "model.head_dropout": "0.2",  # draws random numbers: their state has to survive too
    "data.files": "tinyworld",
    "data.batch_tokens": "512",
    "data.val_completions": "20",
    "data.train_prompts": "400",
    "data.train_completions": "3",
    "trainer.max_epochs": "2",
    "trainer.limit_train_batches": "20",
    "checkpoint.every_n_steps": "1",
}


def begin(runs: Path, name: str) -> int:
    """The training in a process of its own; its number."""
    child = os.fork()
    if child == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        words = [word for key, value in SETTINGS.items() for word in (f"--fit.{key}", value)]
        os._exit(main(["run", "text_lenvm", "--runs", str(runs), "--name", name, *words]))
    return child


def digest(run: Path) -> str:
    """Of the weights that a run left."""
    seen = hashlib.sha256()
    for file in sorted((run / "model").glob("*.safetensors")):
        seen.update(file.read_bytes())
    return seen.hexdigest()


def drive(runs: Path, kills: int, seed: int) -> None:
    """See the head of this module."""
    torch.set_num_threads(1)  # so that there are no threads when it forks
    moments = random.Random(seed)
    began = time.monotonic()
    assert os.waitpid(begin(runs, "whole"), 0)[1] == 0
    seconds = time.monotonic() - began
    expected = digest(runs / "whole")
    done = number = 0
    while done < kills:
        name, number = f"killed{number}", number + 1
        for _ in range(moments.randrange(1, 8)):
            child = begin(runs, name)
            time.sleep(moments.uniform(0.2, 1.0) * seconds)
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            if os.WIFSIGNALED(status):
                done += 1
            else:
                assert status == 0, name
        assert os.waitpid(begin(runs, name), 0)[1] == 0, name
        assert digest(runs / name) == expected, name
        print(f"{done} kills, {number} trainings with the same weights", flush=True)


if __name__ == "__main__":
    drive(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
