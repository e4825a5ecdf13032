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

Run = Callable[[str, bytes], Any]
"""(name of the good input, hostile bytes): returns, or raises an error of ours; anything else is a finding."""


@dataclass(frozen=True)
class Target:
    """Something that reads what others wrote.

    Attributes:
        prepare: given an empty folder, how to feed bytes, and good inputs by their names.
    """

    prepare: Callable[[Path], tuple[Run, dict[str, bytes]]]


def _store(folder: Path) -> tuple[Run, dict[str, bytes]]:
    """Files of a folder of rollouts that was not finished."""
    stopped(folder / "store", 10)
    (folder / "store" / "failures.jsonl").write_text(
        json.dumps({"prompt_id": "p/7", "number": 2, "reason": "no", "final": True}) + "\n"
    )
    good = {name: (folder / "store" / name).read_bytes() for name in ("journal.jsonl", "settings.json", "failures.jsonl")}

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
        "lifebench": {"task": "lifebench", "lengths": [16, 32], "n": 2, "temperature": 0.7, "systems": ["base", "tilt:-5"]},
        "gsm8k": {"task": "gsm8k", "data": {"source": "gsm8k", "path": "here"}, "limit": 3, "options": {"rows": 4}},
    }

    def run(name: str, data: bytes) -> None:
        try:
            section = json.loads(data)
        except (ValueError, RecursionError):
            return
        read_settings(section, "this") if isinstance(section, dict) else None

    return run, {name: json.dumps(section).encode() for name, section in good.items()}


TARGETS = {
    "store of rollouts": Target(_store),
    "samples of an evaluation": Target(_samples),
    "controls as text": Target(_controls),
    "settings of a task": Target(_evaluation_settings),
}
