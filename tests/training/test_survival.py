"""A run killed at any moment goes on with the same command and ends with the same weights, bit for bit."""

import hashlib
import json
import random
import signal
import time
from pathlib import Path

import pytest
from forks import Fork, command, wait_until

from lenvm_lightning.training.callbacks import latest_checkpoint

STEPS = 16  # two epochs of 15 batches, 8 steps each
MOMENTS = ((3, signal.SIGTERM, 143), (7, signal.SIGKILL, -signal.SIGKILL))  # the second while the first epoch ends

SMALL = {
    "model.backbone.pretrained": "false",
    "model.backbone.overrides": "{num_hidden_layers: 1, hidden_size: 32, intermediate_size: 32}",
}
QLORA = {"model.lora": "{rank: 4, dropout: 0.1}", "model.backbone.quantise": "nf4"}


def _start(runs: Path, model: dict[str, str]) -> Fork:
    settings = {
        **model,
        "model.head_dropout": "0.2",  # draws random numbers: their state has to survive too
        "model.optimizer.warmup_steps": "3",
        "data.files": "tinyworld",  # scripted rollouts, nothing to sample
        "data.batch_tokens": "512",
        "data.val_completions": "20",
        "data.train_prompts": "400",
        "data.train_completions": "3",
        "data.completions_per_batch": "2",
        "trainer.max_epochs": "2",
        "trainer.accumulate_grad_batches": "2",
        "trainer.limit_train_batches": "15",  # an odd number: the window at the end of each epoch is a short one
        "checkpoint.every_n_steps": "1",
    }
    overrides = [word for key, value in settings.items() for word in (f"--fit.{key}", value)]
    return command(["run", "text_lenvm", "--runs", str(runs), "--name", "r", *overrides])


def _finish(runs: Path, model: dict[str, str]) -> tuple[str, str]:
    process = _start(runs, model)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def _kill_after_step(runs: Path, model: dict[str, str], step: int, how: signal.Signals, delay: float) -> int | None:
    def saved() -> bool:
        newest = latest_checkpoint(runs / "r" / "checkpoints")
        return newest is not None and int(newest.stem.split("-")[1]) >= step

    process = _start(runs, model)
    wait_until(saved, process)
    time.sleep(delay)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0, err
    return process.returncode


def _weights(runs: Path) -> dict[str, str]:
    files = sorted((runs / "r" / "model").glob("*.safetensors"))
    assert len(files) == 2
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.parametrize(
    ("model", "moments"),
    [
        pytest.param(SMALL, MOMENTS[1:], id="full"),
        pytest.param(SMALL, MOMENTS, id="full, twice", marks=pytest.mark.slow),
        pytest.param(QLORA, MOMENTS, id="qlora, twice", marks=pytest.mark.slow),
    ],
)
def test_killed_run_ends_with_the_same_weights(tmp_path, model, moments):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _finish(whole, model)
    delays = random.Random(7)
    for step, how, status in moments:
        assert _kill_after_step(broken, model, step, how, delays.uniform(0.0, 0.1)) == status
    assert "going on from step" in _finish(broken, model)[1]
    assert _weights(whole) == _weights(broken)
    results = [json.loads((folder / "r" / "results.json").read_text()) for folder in (whole, broken)]
    assert results[0] == results[1]
    assert results[0]["optimizer_steps"] == STEPS
    assert (results[0]["train_prompts"], results[0]["train_completions"]) == (400, 1200)

    assert "is complete for these settings" in _finish(broken, model)[0]  # nothing is trained again
    assert not list((broken / "r").glob(".*"))
