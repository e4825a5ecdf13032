"""Processes that train together."""

import json
from pathlib import Path

import torch
from forks import script
from places import HELPERS

from lenvm_lightning.pipeline.run_folder import RunFolder

RANKS = range(2)


def drive(name: str, folder: Path, text: Path, vision: Path, names: list[str]) -> Path:
    """Let two ranks do everything that is named, as two_ranks.py or two_zero.py tell."""
    process = script(HELPERS / name, *map(str, (folder, text, vision)), *names)
    told = process.communicate(timeout=500)
    assert process.returncode == 0, told
    return folder


def load(file: Path):
    return torch.load(file, weights_only=True)


def same_after_a_kill(folder: Path) -> None:
    killed, undisturbed = (RunFolder(folder / name) for name in ("killed", "undisturbed"))
    results = [json.loads(run.results.read_text()) for run in (killed, undisturbed)]
    assert results[0] == results[1]
    for name in ("model.safetensors", "value_head.safetensors"):
        assert (killed.model / name).read_bytes() == (undisturbed.model / name).read_bytes()
    assert not list(killed.checkpoints.glob(".writing-*"))
    assert list(killed.path.glob("evaluate/*/results.json"))  # by the first process, when the others have gone


def fit_of(strategy, model="lenvm_lightning.TextLenVM", data="datamodules.TextRollouts") -> dict:
    name = "backbone" if model.endswith("LenVM") else "name"
    return {
        "model": {"class_path": model, "init_args": {name: "tiny-text"}},
        "data": {"class_path": data},
        "trainer": {"strategy": strategy, "accelerator": "cpu", "devices": 2},
    }
