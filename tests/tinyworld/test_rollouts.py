import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lenvm_lightning.tinyworld import rollouts


@pytest.fixture(scope="module", params=["text", "vision"])
def written(request, tmp_path_factory) -> tuple[str, Path, list[dict]]:
    """Write the default number of rollouts of each kind once: kind, file, records."""
    file = rollouts.write_rollouts(request.param, tmp_path_factory.mktemp(request.param))
    return request.param, file, [json.loads(line) for line in file.read_text().splitlines()]


def test_records(written, tokenizer):
    kind, file, records = written
    assert len(records) == 2400
    assert len({record["prompt_id"] for record in records}) == 600
    eos = tokenizer.eos_token_id
    for record in records:
        ids, limit = record["token_ids"], record["sampling"]["max_tokens"]
        stopped = record["finish_reason"] == "stop"
        assert tokenizer.decode(ids[:-1] if stopped else ids) == record["completion"]
        assert ids.count(eos) == stopped
        assert (ids[-1] == eos and len(ids) <= limit) if stopped else len(ids) == limit
        content = record["messages"][0]["content"]
        assert content.count("<image>") == len(record.get("images", [])) == (kind == "vision")
    for record in records[:40]:
        if record["finish_reason"] == "stop":
            assert tokenizer(record["completion"]).input_ids == record["token_ids"][:-1]
        for image in record.get("images", []):
            assert Image.open(file.parent / image).size in {(84, 84), (112, 112)}


def test_splits_are_disjoint_by_prompt(written):
    _kind, file, records = written
    prompts: dict[str, set] = {"train": set(), "test": set()}
    for record in records:
        images = tuple((file.parent / image).read_bytes() for image in record.get("images", []))
        prompts[record["split"]].add((record["messages"][0]["content"], images))
    assert not prompts["train"] & prompts["test"]
    assert 0.05 < len(prompts["test"]) / 600 < 0.15


def test_lengths_are_wide(written):
    _, _, records = written
    lengths = np.array([len(record["token_ids"]) for record in records])
    median, high = np.percentile(lengths, [50, 99])
    assert 3.5 < high / median < 6
    cut = np.mean([record["finish_reason"] == "length" for record in records])
    assert 0 < cut < 0.05
    # Answers to one prompt differ, and yet the prompt says something about them.
    groups = lengths.reshape(600, 4)
    assert 0.3 < groups.var(axis=1, ddof=1).mean() / lengths.var() < 0.95


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_writing_is_deterministic_and_reused(kind, tmp_path):
    first = rollouts.write_rollouts(kind, tmp_path / "a", prompts=5, completions=2)
    again = rollouts.write_rollouts(kind, tmp_path / "b", prompts=5, completions=2)
    other = rollouts.write_rollouts(kind, tmp_path / "c", prompts=5, completions=2, seed=1)
    files = {file.relative_to(tmp_path / "a"): file.read_bytes() for file in (tmp_path / "a").rglob("*.*")}
    assert files == {file.relative_to(tmp_path / "b"): file.read_bytes() for file in (tmp_path / "b").rglob("*.*")}
    assert len(files) == (7 if kind == "vision" else 2)
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    stamp = first.stat().st_mtime_ns
    assert rollouts.write_rollouts(kind, tmp_path / "a", prompts=5, completions=2).stat().st_mtime_ns == stamp
    (tmp_path / "a" / "settings.json").unlink()  # as after a run that was stopped
    assert rollouts.write_rollouts(kind, tmp_path / "a", prompts=5, completions=2).stat().st_mtime_ns > stamp
    assert first.read_bytes() == again.read_bytes()
    rollouts.write_rollouts(kind, tmp_path / "a", prompts=5, completions=2, seed=1)
    assert first.read_bytes() == other.read_bytes()
