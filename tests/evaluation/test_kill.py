"""An evaluation that is killed at random moments finds what an undisturbed one finds, byte for byte."""

import json
import os
import subprocess
import sys

import pytest
from places import HELPERS, ROOT

from lenvm_lightning import LengthValueModel
from lenvm_lightning.cli.evaluate import main
from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.guidance import Tilt
from lenvm_lightning.rollouts.generators.interface import PromptRequest
from lenvm_lightning.rollouts.generators.local import LocalGenerator
from lenvm_lightning.rollouts.prompts import load_prompts

WORDS = ["--task", "lifebench", "--limit", "4", "--n", "2", "--lengths", "16", "32"]
WORDS += ["--systems", "base", "ours", "--seed", "5"]


def drive(folder, kills, seed):
    """Run it in processes of their own; what the driver has seen."""
    root = ROOT
    found = subprocess.run(
        [sys.executable, str(HELPERS / "killed_eval.py"), str(folder), str(kills), str(seed), *WORDS],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    return found


def lines(folder):
    """Samples by what they are of."""
    found = map(json.loads, (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines())
    return {(one["system"], one["prompt_id"], one["number"]): one for one in found}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "results"
    assert main([*WORDS, "--out", str(folder)]) == 0
    return folder


def test_killed_at_random_moments(undisturbed, tmp_path):
    told = drive(tmp_path, 3, 1)
    assert told.stderr.count("killed at") == 3
    assert "going on from" in told.stderr
    # Every sample is there once, whatever was torn, and each is what it would have been.
    assert (tmp_path / "samples.jsonl").read_bytes().count(b"\n") == len(lines(tmp_path)) == 96
    assert lines(tmp_path) == lines(undisturbed)
    assert (tmp_path / "results.json").read_bytes() == (undisturbed / "results.json").read_bytes()
    assert (tmp_path / "constraints.png").read_bytes() == (undisturbed / "constraints.png").read_bytes()
    assert len({one["system"] for one in lines(tmp_path).values() if one["token_ids"]}) == 2


def test_killed_after_the_last_sample(undisturbed, tmp_path, capsys):
    """What is killed between samples and report: the next call only makes the report."""
    for file in undisturbed.iterdir():
        if file.name in ("samples.jsonl", "settings.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / ".results.json").write_text('{"format": 1, "ta')
    assert main([*WORDS, "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "going on from 96 samples" in err
    assert "Tokens/s" not in out
    assert (tmp_path / "samples.jsonl").read_bytes() == (undisturbed / "samples.jsonl").read_bytes()
    assert (tmp_path / "results.json").read_bytes() == (undisturbed / "results.json").read_bytes()


def test_guided_completions_do_not_depend_on_those_beside_them():
    """What makes a killed run the same: after a kill other completions are written side by side."""
    requests = [PromptRequest(prompt, (0,), Tilt(-5)) for prompt in load_prompts("tiny-math", limit=3)]

    def write(rows):
        generator = LocalGenerator.load("tiny-text", rows=rows)
        generator.lenvm = LengthValueModel.from_pretrained("tiny-text-lenvm", dtype="float32")
        answers = generator.sample(requests, SamplingParams(max_tokens=24, seed=1))
        return {answer.prompt_id: (answer.result.token_ids, answer.result.logprob) for answer in answers}

    assert write(1) == write(3)
