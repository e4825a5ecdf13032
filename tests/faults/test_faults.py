"""A disk that fails once, at any call: a sentence, and after one resume what an undisturbed run leaves, byte for byte.

All calls with `pytest tests/faults -m slow`, some of them by default.
"""

import json
import shutil

import pytest
from faults import Faults, every_call
from sampled import N, sample
from scripted import SAMPLING, ScriptedGenerator, make_prompts

from lenvm_lightning.cli.evaluate import main as evaluate
from lenvm_lightning.cli.main import main
from lenvm_lightning.errors import LenVMError
from lenvm_lightning.evaluation.samples import SampleFolder, System, collect

EVERY = [pytest.param(1, marks=pytest.mark.slow), 5]


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
