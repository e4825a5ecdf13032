"""A disk that fails once, at any call: a sentence, and after one resume what an undisturbed run leaves, byte for byte.

All calls with `pytest tests/faults -m slow`, some of them by default. `LENVM_FAULT_REPORT` names a file for the counts.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from faults import Faults, every_call
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


def inject(folder, run, step):
    """Let each call fail in turn, in an empty folder; yield after the run that came upon it."""
    numbers = every_call(lambda: run(folder / "count"), step)
    assert len(numbers) > 3
    failed = 0
    for number in numbers:
        here = folder / "one"
        shutil.rmtree(here, ignore_errors=True)
        with Faults(number).injected():
            try:
                run(here)
            except LenVMError:
                failed += 1
        yield here
    assert failed > len(numbers) / 3
    if "LENVM_FAULT_REPORT" in os.environ:
        with Path(os.environ["LENVM_FAULT_REPORT"]).open("a", encoding="utf-8") as report:
            report.write(json.dumps({"run": run.__qualname__, "faults": len(numbers), "told": failed}) + "\n")


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
    for here in inject(tmp_path, measure, 2):
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
    for here in inject(tmp_path, export, 2):
        if not (here / "out").exists():
            export(here)
        for file in (tmp_path / "whole" / "out").iterdir():
            assert (here / "out" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.slow
def test_training(tmp_path, monkeypatch):
    """Data, checkpoints, the model directory: after one more run, the weights of an undisturbed one."""
    monkeypatch.setenv("LENVM_CACHE", str(tmp_path / "cache"))
    words = [word for key, value in TRAINING.items() for word in (f"--fit.{key}", value)]

    def train(folder):
        if main(["run", "text_lenvm", "--runs", str(folder), "--name", "one", *words]):
            raise LenVMError("told on stderr")

    def digest(folder):
        files = sorted((folder / "one" / "model").glob("*.safetensors"))
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]

    train(tmp_path / "whole")
    for here in inject(tmp_path, train, 2):
        train(here)
        assert digest(here) == digest(tmp_path / "whole")
        assert not list((here / "one" / "checkpoints").glob("*.tmp"))


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
