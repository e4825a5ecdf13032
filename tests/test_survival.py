"""A run killed at any moment goes on with the same command and ends with the same weights, bit for bit."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lenvm_lightning.callbacks import latest_checkpoint

STEPS = 24


SMALL = {
    "model.pretrained": "false",
    "model.overrides": "{num_hidden_layers: 1, hidden_size: 32, intermediate_size: 32}",
}
QLORA = {"model.lora": "{rank: 4, dropout: 0.1}", "model.quantise": "nf4"}


def _command(runs: Path, model: dict[str, str]) -> list[str]:
    settings = {
        **model,
        "model.head_dropout": "0.2",  # draws random numbers: their state has to survive too
        "model.warmup_steps": "3",
        "data.files": "tinyworld",  # scripted rollouts, nothing to sample
        "data.batch_tokens": "512",
        "data.val_completions": "20",
        "data.train_prompts": "400",
        "data.train_completions": "3",
        "data.together": "2",
        "trainer.max_epochs": "3",
        "trainer.accumulate_grad_batches": "2",
        "trainer.limit_train_batches": "15",  # an odd number: the window at the end of each epoch is a short one
        "checkpoint.every_n_steps": "1",
    }
    overrides = [word for key, value in settings.items() for word in (f"--fit.{key}", value)]
    return [
        sys.executable,
        "-m",
        "lenvm_lightning",
        "run",
        "text_lenvm",
        "--runs",
        str(runs),
        "--name",
        "r",
        *overrides,
    ]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def _finish(runs: Path, model: dict[str, str]) -> subprocess.CompletedProcess:
    done = subprocess.run(_command(runs, model), env=_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def _kill_after_step(runs: Path, model: dict[str, str], step: int, how: signal.Signals, delay: float) -> int:
    process = subprocess.Popen(
        _command(runs, model), env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        newest = latest_checkpoint(runs / "r" / "checkpoints")
        if newest and int(newest.stem.split("-")[1]) >= step:
            break
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0, err
    return process.returncode


def _weights(runs: Path) -> dict[str, str]:
    files = sorted((runs / "r" / "model").glob("*.safetensors"))
    assert len(files) == 2
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.parametrize("model", [SMALL, pytest.param(QLORA, marks=pytest.mark.slow)], ids=["full", "qlora"])
def test_killed_run_ends_with_the_same_weights(tmp_path, model):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _finish(whole, model)
    moments = random.Random(7)
    assert _kill_after_step(broken, model, 3, signal.SIGTERM, 0.0) == 143
    for step in (7, 15):  # epochs of 15 batches, 8 steps each: one kill while an epoch ends
        assert _kill_after_step(broken, model, step, signal.SIGKILL, moments.uniform(0.0, 0.1)) == -signal.SIGKILL
    done = _finish(broken, model)
    assert "going on from step" in done.stderr
    assert _weights(whole) == _weights(broken)
    results = [json.loads((folder / "r" / "results.json").read_text()) for folder in (whole, broken)]
    assert results[0] == results[1]
    assert results[0]["optimizer_steps"] == STEPS
    assert (results[0]["train_prompts"], results[0]["train_completions"]) == (400, 1200)

    again = _finish(broken, model)  # complete: nothing is trained again
    assert "is complete for these settings" in again.stdout
    assert not list((broken / "r").glob(".*"))
