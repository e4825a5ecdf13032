"""What is fuzzed: how each target is fed, and good input for it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sampled import sample, stopped

from lenvm_lightning.decoding.control_text import parse_control
from lenvm_lightning.evaluation.read_settings import read_settings
from lenvm_lightning.evaluation.samples import Sample, SampleFolder
from lenvm_lightning.evaluation.tasks.compare_runs import compare_errors, compare_scaling

Run = Callable[[str, bytes], Any]
"""(name of the good input, hostile bytes): returns, or raises an error of ours; anything else is a finding."""


@dataclass(frozen=True)
class Target:
    """Something that reads what others wrote.

    Attributes:
        prepare: given an empty folder, how to feed bytes, and good inputs by their names.
        share: of the inputs that a quick target gets.
    """

    prepare: Callable[[Path], tuple[Run, dict[str, bytes]]]
    share: float = 1.0


def _store(folder: Path) -> tuple[Run, dict[str, bytes]]:
    """Files of a folder of rollouts that was not finished."""
    stopped(folder / "store", 10)
    (folder / "store" / "failures.jsonl").write_text(
        json.dumps({"prompt_id": "p/7", "number": 2, "reason": "no", "final": True}) + "\n"
    )
    good = {
        name: (folder / "store" / name).read_bytes() for name in ("journal.jsonl", "settings.json", "failures.jsonl")
    }

    def run(name: str, data: bytes) -> None:
        for other, content in good.items():
            (folder / "store" / other).write_bytes(data if other == name else content)
        (folder / "store" / "rollouts.jsonl").unlink(missing_ok=True)
        assert sample(folder / "store").complete

    return run, good


def _samples(folder: Path) -> tuple[Run, dict[str, bytes]]:
    """Samples of an evaluation."""
    settings = {"task": "gsm8k", "n": 3}
    with SampleFolder(folder / "samples", settings) as samples:
        for number in range(3):
            samples.add(Sample("base", "p", number, 3, "stop", -1.25, {"right": True}, "é 漢\n{", [7, 9, 2]))
    good = {name: (folder / "samples" / name).read_bytes() for name in ("samples.jsonl", "settings.json")}

    def run(name: str, data: bytes) -> None:
        for other, content in good.items():
            (folder / "samples" / other).write_bytes(data if other == name else content)
        with SampleFolder(folder / "samples", settings) as samples:
            for one in samples.samples.values():
                json.dumps(one.as_line(), allow_nan=False)

    return run, good


def _controls(folder: Path) -> tuple[Run, dict[str, bytes]]:
    """Controls as text."""
    texts = ("equal-to:128:hard", "at-most:64", "at-least:200", "tilt:-5", "equal-to:96:soft")
    return lambda name, data: parse_control(data.decode(errors="replace")), {text: text.encode() for text in texts}


def _evaluation_settings(folder: Path) -> tuple[Run, dict[str, bytes]]:
    """A task as a recipe gives it."""
    good = {
        "lifebench": {
            "task": "lifebench",
            "lengths": [16, 32],
            "n": 2,
            "temperature": 0.7,
            "systems": ["base", "tilt:-5"],
        },
        "gsm8k": {"task": "gsm8k", "data": {"source": "gsm8k", "path": "here"}, "limit": 3, "options": {"rows": 4}},
    }

    def run(name: str, data: bytes) -> None:
        try:
            section = json.loads(data)
        except (ValueError, RecursionError):
            return
        read_settings(section, "this") if isinstance(section, dict) else None

    return run, {name: json.dumps(section).encode() for name, section in good.items()}


def _runs(folder: Path) -> tuple[Run, dict[str, bytes]]:
    """Results of finished runs."""
    good = {
        "gamma": 0.99, "target": "discounted", "objective": {"loss": "mse"}, "tiny_world": True, "held_out_digest": "a",
        "held_out_completions": 6, "held_out_prompts": 3, "train_prompts": 10, "train_completions": 20,
        "parameters": 1000, "metrics": {"loss": 0.1, "mre": 0.2, "mae_tokens/start": 3.0},
    }  # fmt: skip
    other = {**good, "train_prompts": 5, "train_completions": 10, "metrics": {"loss": 0.2}}
    for name, results in (("one", good), ("other", other)):
        (folder / name).mkdir()
        (folder / name / "results.json").write_text(json.dumps(results))

    def run(name: str, data: bytes) -> None:
        (folder / "one" / "results.json").write_bytes(data)
        folders = [str(folder / "one"), str(folder / "other")]
        compare_scaling(folders) if name == "scaling" else compare_errors(folders)

    return run, {"scaling": json.dumps(good).encode(), "ablation": json.dumps(good).encode()}


TARGETS = {
    "store of rollouts": Target(_store, 0.1),
    "samples of an evaluation": Target(_samples),
    "controls as text": Target(_controls),
    "settings of a task": Target(_evaluation_settings),
    "finished runs": Target(_runs),
}
