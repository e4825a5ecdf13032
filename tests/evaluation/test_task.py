"""The example of a task of one's own runs as its head says."""

import json

from forks import finish, script
from places import ROOT


def test_the_example_runs(tmp_path):
    words = ["--places", "bridge", "sea", "--n", "1", "--max-tokens", "40", "--out", str(tmp_path / "out")]
    said = finish(script(ROOT / "examples" / "custom_task.py", *words))
    assert "places v1 · tiny-text + tiny-text-lenvm" in said
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert {one["prompt_id"] for one in samples} == {"places/bridge", "places/sea"}
    assert {one["system"] for one in samples} == {"base", "tilt:-5"}
