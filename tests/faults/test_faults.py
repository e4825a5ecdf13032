"""A disk that fails once, at any call: a sentence, and after one resume what an undisturbed run leaves, byte for byte.

All calls with `pytest tests/faults -m slow`, some of them by default. `LENVM_FAULT_REPORT` names a file for the counts.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
from faults import BROKEN, FULL, Faults, every_call
from sampled import N, sample
from scripted import SAMPLING, ScriptedGenerator, make_prompts

from datamodules.table import build_table
from datamodules.tokenise import Limits
from lenvm_lightning.cli.evaluate import main as evaluate
from lenvm_lightning.cli.main import main
from lenvm_lightning.errors import LenVMError
from lenvm_lightning.evaluation.samples import SampleFolder, System, collect
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.utils.own_folder import kind_of

EVERY = [pytest.param(1, marks=pytest.mark.slow), 5]
TRAINING = {
    "model.backbone.pretrained": "false",
    "model.backbone.overrides": "{num_hidden_layers: 1, hidden_size: 32, intermediate_size: 32}",
    "model.head_dropout": "0.2",
    "data.files": "tinyworld",
    "data.batch_tokens": "512",
    "data.val_completions": "8",
    "data.train_prompts": "20",
    "data.train_completions": "2",
    "trainer.max_steps": "4",
    "trainer.max_epochs": "1",
    "checkpoint.every_n_steps": "1",
}


def inject(folder, run, step, begin=lambda folder: None):
    """Let each call fail in turn, in a folder as `begin` leaves it; yield after the run that came upon it.

    The disk is full, or broken: with step 1 both, one after the other.
    """
    begin(folder / "count")
    numbers = every_call(lambda: run(folder / "count"), step)
    assert len(numbers) > 3
    codes = {number: (FULL, BROKEN) if step == 1 else ((FULL, BROKEN)[number % 2],) for number in numbers}
    faults = [(number, code) for number in numbers for code in codes[number]]
    failed = 0
    for number, code in faults:
        here = folder / "one"
        shutil.rmtree(here, ignore_errors=True)
        begin(here)
        with Faults(number, code).injected():
            try:
                run(here)
            except LenVMError:
                failed += 1
        yield here
    assert failed > len(faults) / 3
    if "LENVM_FAULT_REPORT" in os.environ:
        with Path(os.environ["LENVM_FAULT_REPORT"]).open("a", encoding="utf-8") as report:
            report.write(json.dumps({"run": run.__qualname__, "faults": len(faults), "told": failed}) + "\n")


@pytest.mark.parametrize("step", EVERY)
def test_sampling(tmp_path, whole, step):
    for here in inject(tmp_path, sample, step):
        outcome = sample(here)
        assert outcome.rollouts.read_bytes() == whole
        assert outcome.summary["completions"] == 8 * N
        assert not list(here.glob(".rollouts*"))


@pytest.mark.parametrize("step", EVERY)
def test_samples_of_an_evaluation(tmp_path, step):
    def measure(folder):
        with SampleFolder(folder, {"task": "gsm8k"}) as samples:
            collect(samples, ScriptedGenerator(), System("base"), make_prompts(5), 3, SAMPLING, lambda meta, found: {})
        return samples.samples

    whole = measure(tmp_path / "whole")
    assert len(whole) == 15
    for here in inject(tmp_path, measure, step):
        assert measure(here) == whole
        lines = (here / "samples.jsonl").read_text().splitlines()
        assert len({(line["prompt_id"], line["number"]) for line in map(json.loads, lines)}) == len(lines) == 15


@pytest.mark.slow
def test_a_whole_evaluation(tmp_path):
    command = ["--task", "lifebench", "--limit", "1", "--n", "1", "--lengths", "16", "--systems", "base", "--out"]

    def measure(folder):
        if evaluate([*command, str(folder)]):
            raise LenVMError("told on stderr")

    measure(tmp_path / "whole")
    for here in inject(tmp_path, measure, 1):
        measure(here)
        for name in ("results.json", "constraints.png"):
            assert (here / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        assert len((here / "samples.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_an_export(tmp_path):
    """What is not whole is not there, or the command says to delete it."""

    def export(folder):
        if main(["export", "tiny-text-lenvm", str(folder / "out")]):
            shutil.rmtree(folder / "out", ignore_errors=True)
            raise LenVMError("told on stderr")

    export(tmp_path / "whole")
    for here in inject(tmp_path, export, 1):
        if not (here / "out").exists():
            export(here)
        for file in (tmp_path / "whole" / "out").iterdir():
            assert (here / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def train(folder):
    """A short training, or what is left of it."""
    words = [word for key, value in TRAINING.items() for word in (f"--fit.{key}", value)]
    if main(["run", "text_lenvm", "--runs", str(folder), "--name", "one", *words]):
        raise LenVMError("told on stderr")


def require_trained(folder, whole):
    """The weights of an undisturbed training, and nothing half written beside them."""
    names = [file.name for file in sorted((whole / "one" / "model").glob("*.safetensors"))]
    assert names
    for name in names:
        assert (folder / "one" / "model" / name).read_bytes() == (whole / "one" / "model" / name).read_bytes()
    assert not list((folder / "one" / "checkpoints").glob("*.tmp"))


@pytest.mark.slow
def test_training(tmp_path, monkeypatch):
    """Data, checkpoints, the model directory: after one more run, the weights of an undisturbed one."""
    monkeypatch.setenv("LENVM_CACHE", str(tmp_path / "cache"))
    train(tmp_path / "whole")
    for here in inject(tmp_path, train, 2):
        train(here)
        require_trained(here, tmp_path / "whole")


def stopped_at(folder, number):
    """A training that came upon a full disk."""
    with Faults(number).injected(), contextlib.suppress(LenVMError):
        train(folder)
    return folder


def is_in_the_middle(folder):
    """Whether a training has begun and not ended."""
    run = folder / "one"
    return any((run / "checkpoints").glob("*.ckpt")) and not (run / "model").exists()


@pytest.mark.slow
def test_training_that_goes_on(tmp_path, monkeypatch):
    """The same where a run stopped in the middle is continued."""
    monkeypatch.setenv("LENVM_CACHE", str(tmp_path / "cache"))
    train(tmp_path / "whole")
    calls = len(every_call(lambda: train(tmp_path / "all")))
    stopped = next(filter(is_in_the_middle, (stopped_at(tmp_path / str(n), n) for n in range(calls, 0, -calls // 40))))
    for here in inject(tmp_path, train, 3, begin=lambda folder: shutil.copytree(stopped, folder)):
        train(here)
        require_trained(here, tmp_path / "whole")


@pytest.mark.parametrize("step", EVERY)
def test_tokenised_rollouts(tmp_path, whole, step):
    """The cache of a table: never half of one under its name."""
    file = tmp_path / "rollouts.jsonl"
    file.write_bytes(whole)
    processor = load_processor("tiny-text")

    def build(folder):
        return build_table(processor, Limits(), files=[str(file)], cache_dir=folder)[0].to_list()

    rows = build(tmp_path / "whole")
    assert len(rows) == 8 * N
    for here in inject(tmp_path, build, step):
        assert build(here) == rows
        # What could not be removed carries our mark, by which a later run removes it.
        assert all(kind_of(left) == "tokenised rollouts" for left in here.glob("building-*"))
