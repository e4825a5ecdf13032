"""The store of rollouts: killed, full, busy; in the end the file of an undisturbed run, byte for byte."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from full_disk import room_for
from holder import holder
from places import HELPERS
from sampled import N, open_store, sample, stopped
from scripted import SAMPLING, ScriptedGenerator, make_prompts

from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.errors import GeneratorError, StoreError
from lenvm_lightning.rollouts import store as store_module
from lenvm_lightning.rollouts.record import parse_record
from lenvm_lightning.rollouts.sample import already_sampled, report, sample_rollouts


def test_fifty_kills_change_nothing(tmp_path):
    driver = HELPERS / "scripted.py"
    done = subprocess.run(
        [sys.executable, driver, tmp_path / "killed", "50", "7"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert 0 < len((tmp_path / "killed" / "journal.jsonl").read_bytes().splitlines()) < 1200
    prompts = make_prompts(300, with_images=True)
    for name in ("killed", "undisturbed"):
        assert sample(tmp_path / name, prompts=prompts, n=4).status == 0
    files = [(tmp_path / name / "rollouts.jsonl").read_bytes() for name in ("killed", "undisturbed")]
    assert files[0] == files[1]
    assert len(files[0].splitlines()) == 1200
    for name in ("killed", "undisturbed"):
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
            "images", "rollouts.jsonl", "settings.json", "summary.json", "tensorboard",
        ]  # fmt: skip
        assert len(list((tmp_path / name / "images").glob("*.png"))) == 300
    summaries = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("killed", "undisturbed")]
    assert {k: v for k, v in summaries[0].items() if k != "tokens_per_s"} == {
        k: v for k, v in summaries[1].items() if k != "tokens_per_s"
    }


@pytest.mark.parametrize("moment", ["rollouts half written", "journal not yet gone"])
def test_killed_while_finishing(tmp_path, whole, moment):
    if moment == "rollouts half written":
        stopped(tmp_path, 8 * N)
        (tmp_path / ".rollouts.jsonl").write_bytes(whole[:100])
        (tmp_path / "summary.json").write_text("{}")
    else:
        sample(tmp_path)
        (tmp_path / "journal.jsonl").write_bytes(whole)
    outcome = sample(tmp_path)
    assert outcome.rollouts.read_bytes() == whole
    assert outcome.summary["completions"] == 8 * N
    assert not (tmp_path / "journal.jsonl").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("content", ["{half", "[]", "\u00e9"])
def test_files_that_somebody_broke(tmp_path, content):
    """Neither is read in vain: the summary is left out, and without settings nobody knows what the completions are."""
    sample(tmp_path)
    whole = (tmp_path / "settings.json").read_bytes()
    (tmp_path / "summary.json").write_text(content, encoding="latin-1")
    outcome = sample(tmp_path)
    assert outcome.complete
    assert outcome.summary is None
    (tmp_path / "settings.json").write_text(content, encoding="latin-1")
    assert already_sampled("scripted", make_prompts(8), N, tmp_path, SAMPLING) is None
    with pytest.raises(StoreError, match=r"settings\.json cannot be read"):
        sample(tmp_path)
    (tmp_path / "settings.json").write_bytes(whole)
    assert sample(tmp_path).complete


def test_other_settings_are_refused_one_by_one(tmp_path):
    stopped(tmp_path, 2)
    generator = ScriptedGenerator()
    generator.version = 2
    other = SamplingParams(max_tokens=40, seed=4, top_p=0.9)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(StoreError) as caught:
        sample_rollouts(generator, make_prompts(9), 5, tmp_path, other)
    for words in ("generator.version: 1 -> 2", "n: 3 -> 5", "prompts.ids: [", "sampling.seed: 3 -> 4",
                  "sampling.top_p: 1.0 -> 0.9", "Choose another folder"):  # fmt: skip
        assert words in str(caught.value)
    assert "max_tokens" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    sample(tmp_path)
    with pytest.raises(StoreError, match=r"n: 3 -> 5"):  # complete ones no less
        sample(tmp_path, n=5)


def test_settings_of_a_run_that_got_nothing_are_replaced(tmp_path):
    with pytest.raises(GeneratorError):
        sample(tmp_path, ScriptedGenerator(fails=dict.fromkeys([(f"p/{i}", k) for i in range(8) for k in range(5)],
                                                               GeneratorError("no"))), n=5)  # fmt: skip
    assert json.loads((tmp_path / "settings.json").read_text())["n"] == 5
    assert sample(tmp_path).status == 0


def test_somebody_elses_folder_is_left_alone(tmp_path):
    (tmp_path / "rollouts.jsonl").write_text("{}\n")
    with pytest.raises(StoreError, match=r"settings\.json is missing"):
        sample(tmp_path)
    assert (tmp_path / "rollouts.jsonl").read_text() == "{}\n"


def test_a_full_disk_keeps_what_is_done(tmp_path, whole):
    size = len(whole) // 2
    with (
        room_for(size),
        pytest.raises(StoreError, match=r"cannot be written: File too large\. (\d+) of 24 comple") as e,
    ):
        sample(tmp_path)
    assert "Make room, then type the same command again" in str(e.value)
    journal = (tmp_path / "journal.jsonl").read_bytes()
    assert size / 2 < len(journal) <= size
    assert journal.endswith(b"}\n")
    assert f" {len(journal.splitlines())} of 24" in str(e.value)
    assert sample(tmp_path).rollouts.read_bytes() == whole


def test_another_process_may_look_while_this_one_finishes(tmp_path, whole, monkeypatch):
    """It finds `rollouts.jsonl` and takes the journal for a leftover, before this one has taken it away."""
    sync = store_module.sync_folder

    def looked_at(folder):
        sync(folder)
        with open_store(folder) as other:
            assert other.complete

    monkeypatch.setattr(store_module, "sync_folder", looked_at)
    outcome = sample(tmp_path)
    assert outcome.complete
    assert outcome.rollouts.read_bytes() == whole


@pytest.mark.parametrize(
    "line", [b"\xff\xfe\n", b"[" * 50_000 + b"\n", b"[]\n", b'{"prompt_id": [1], "number": 0, "final": 1}\n']
)
def test_broken_failures_are_tried_again(tmp_path, whole, line):
    stopped(tmp_path, 5)
    (tmp_path / "failures.jsonl").write_bytes(line)
    assert sample(tmp_path).rollouts.read_bytes() == whole


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("token_ids", [-5]), ("token_ids", [2**70]), ("token_ids", ["5"]), ("token_ids", 5), ("token_ids", None),
        ("logprob", 1e308), ("logprob", -(10**400)), ("logprob", float("nan")), ("logprob", "x"), ("logprob", [1]),
        ("completion", "half \ud800"), ("completion", None), ("finish_reason", "abort"), ("finish_reason", []),
    ],
)  # fmt: skip
def test_nonsense_that_an_older_version_kept_is_set_aside_and_sampled_again(tmp_path, whole, key, value):
    stopped(tmp_path, 5)
    journal = tmp_path / "journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    lines[3][key] = value
    journal.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with open_store(tmp_path) as store:
        (note,) = store.notes
        assert note.startswith(
            tuple(f"journal.jsonl:4: not a whole record (ValueError: {told}" for told in (key, "it holds "))
        )
        assert note.endswith("set aside in broken.jsonl, sampled again")
        assert store.done == 4
    assert sample(tmp_path).rollouts.read_bytes() == whole


def test_reasons_of_earlier_runs_are_shown_without_their_escapes(tmp_path, capsys):
    stopped(tmp_path, 5)
    reasons = ["\x1b]0;owned\x07" + "x" * 10_000, ["\x1b[31m"], {"a": "\x1b[31m"}]
    with open_store(tmp_path) as store:
        keys = [(one.prompt.prompt_id, one.numbers[0]) for one in store.missing()][:3]
    entries = [
        {"prompt_id": key[0], "number": key[1], "reason": reason, "final": True}
        for key, reason in zip(keys, reasons, strict=True)
    ]
    (tmp_path / "failures.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    report(sample(tmp_path))
    told = capsys.readouterr()
    assert "owned" in told.err
    assert "\x1b" not in told.err + told.out
    assert len(told.err) < 20_000


def test_a_completion_without_a_seed_says_so_and_is_read_again(tmp_path):
    class Seedless(ScriptedGenerator):
        def _answer(self, key, sampling):
            answer = super()._answer(key, sampling)
            return replace(answer, result=replace(answer.result, seed=None))

    outcome = sample(tmp_path, Seedless())
    lines = outcome.rollouts.read_text().splitlines()
    assert {json.loads(line)["sampling"]["seed"] for line in lines} == {None}
    assert parse_record(json.loads(lines[0]), tmp_path)[0][0].sampling["temperature"] == SAMPLING.temperature


def test_a_disk_that_fills_at_the_very_end(tmp_path, whole):
    stopped(tmp_path, 8 * N)
    (tmp_path / "tensorboard").mkdir()
    with room_for(len(whole) - 10), pytest.raises(StoreError, match=r"24 of 24 completions are there and stay"):
        sample(tmp_path)
    assert not (tmp_path / "rollouts.jsonl").exists()
    assert not (tmp_path / ".rollouts.jsonl").exists()
    assert len((tmp_path / "journal.jsonl").read_bytes()) == len(whole)
    assert sample(tmp_path).rollouts.read_bytes() == whole


def test_waiting_for_the_other_process(tmp_path, whole, capsys):
    with holder(tmp_path) as (process, _):
        began = time.monotonic()
        os.kill(process.pid, signal.SIGSTOP)
        subprocess.Popen(["sh", "-c", f"sleep 0.7; kill -KILL {process.pid}"])
        outcome = sample_rollouts(ScriptedGenerator(), make_prompts(8), N, tmp_path, SAMPLING, wait=True)
    assert time.monotonic() - began > 0.6
    assert outcome.rollouts.read_bytes() == whole
    assert "waiting for it" in capsys.readouterr().err
