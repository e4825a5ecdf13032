"""The store of rollouts: killed, torn, full, busy, failed; in the end the file of an undisturbed run, byte for byte."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from full_disk import room_for
from PIL import Image
from places import HELPERS
from scripted import SAMPLING, Prompts, ScriptedGenerator, make_prompts
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.errors import GeneratorError, StoreError
from lenvm_lightning.rollouts.generators.interface import Answer, Failure, Prompt
from lenvm_lightning.rollouts.record import parse_record
from lenvm_lightning.rollouts.sample import SamplingOutcome, already_sampled, report, sample_rollouts
from lenvm_lightning.rollouts.store import RolloutStore, rollout_settings
from lenvm_lightning.utils.locked_folder import FolderLock
from lenvm_lightning.values import gamma_for_length

N = 3


def sample(folder: Path, generator: ScriptedGenerator | None = None, prompts: Prompts | None = None, n: int = N):
    return sample_rollouts(generator or ScriptedGenerator(), prompts or make_prompts(8), n, folder, SAMPLING)


def stopped(folder: Path, after: int, prompts: Prompts | None = None) -> None:
    """A run whose generator dies."""
    prompts = prompts or make_prompts(8)
    settings = rollout_settings(ScriptedGenerator().fingerprint(), prompts, N, SAMPLING)
    with RolloutStore(folder, prompts, settings, "scripted") as store:
        for _, answer in zip(range(after), ScriptedGenerator().sample(store.missing(), SAMPLING), strict=False):
            store.add_answer(answer)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """The final file of an undisturbed run."""
    return sample(tmp_path_factory.mktemp("whole")).rollouts.read_bytes()


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


def test_records_are_in_order_and_say_everything(whole):
    records = [json.loads(line) for line in whole.splitlines()]
    assert [(r["prompt_id"], r["number"]) for r in records] == [(f"p/{i}", k) for i in range(8) for k in range(N)]
    first = records[0]
    assert list(first) == [
        "prompt_id", "number", "messages", "completion", "token_ids", "finish_reason", "logprob", "sampling",
        "generator", "split", "meta",
    ]  # fmt: skip
    assert first["sampling"].keys() == {"temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"}
    assert len({r["sampling"]["seed"] for r in records}) == len(records)
    assert (first["split"], first["meta"], first["generator"]) == ("test", {"answer": "0"}, "scripted")
    for record in records:
        (rollout,), notes = parse_record(record, Path())
        assert notes == []
        assert rollout.censored == (rollout.token_ids[-1] != 2)


def test_a_complete_folder_asks_nobody(tmp_path, capsys):
    sample(tmp_path)
    generator = ScriptedGenerator()
    outcome = sample(tmp_path, generator)
    assert (outcome.complete, outcome.status, generator.asked) == (True, 0, [])
    assert "is complete for these settings" in capsys.readouterr().err


def test_only_what_is_missing_is_asked_for(tmp_path, whole):
    stopped(tmp_path, 10)
    there = {(r["prompt_id"], r["number"]) for r in map(json.loads, (tmp_path / "journal.jsonl").open())}
    generator = ScriptedGenerator()
    assert sample(tmp_path, generator).rollouts.read_bytes() == whole
    assert there.isdisjoint(generator.asked)
    assert len(there) + len(generator.asked) == 8 * N


def test_a_line_torn_at_any_byte_is_mended(tmp_path, whole):
    stopped(tmp_path, 4)
    journal = tmp_path / "journal.jsonl"
    content = journal.read_bytes()
    last = len(b"".join(content.splitlines(keepends=True)[:-1]))
    settings = rollout_settings(ScriptedGenerator().fingerprint(), make_prompts(8), N, SAMPLING)
    for end in [*range(last, len(content) - 3, 5), *range(len(content) - 3, len(content) + 1)]:
        journal.write_bytes(content[:end])
        with RolloutStore(tmp_path, make_prompts(8), settings, "scripted") as store:
            kept = end >= len(content) - 1  # a record that lacks nothing but its line end is whole
            assert store.done == len(store.counts.lengths) == 3 + kept
            assert bool(store.notes) == (last < end < len(content) - 1)
        assert journal.read_bytes() == (content if kept else content[:last])
    journal.write_bytes(content[:-30])
    assert sample(tmp_path).rollouts.read_bytes() == whole


@pytest.mark.parametrize(
    ("damage", "reported"),
    [
        (lambda lines: [lines[0], lines[1][:40] + b"\n", *lines[2:]], "journal.jsonl:2: not a whole record"),
        (lambda lines: [b"\0" * 50 + b"\n", *lines], "journal.jsonl:1: not a whole record"),
        (lambda lines: [*lines, lines[1]], "journal.jsonl:7: completion"),
        (lambda lines: [*lines, lines[1].replace(b'"p/', b'"q/')], "'q/"),
        (lambda lines: [b"{}\n", b"[]\n", *lines, lines[0][:30]], "its last line was torn"),
    ],
)
def test_broken_lines_are_set_aside_and_sampled_again(tmp_path, whole, capsys, damage, reported):
    stopped(tmp_path, 6)
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    damaged = damage(lines)
    journal.write_bytes(b"".join(damaged))
    assert sample(tmp_path).rollouts.read_bytes() == whole
    err = capsys.readouterr().err
    assert reported in err
    assert "set aside in broken.jsonl, sampled again" in err
    aside = (tmp_path / "broken.jsonl").read_bytes().splitlines(keepends=True)
    assert aside
    assert all(line in damaged for line in aside)


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


# -- one process at a time --------------------------------------------------------------------------------------------

HOLD = """
import os, sys, time
from pathlib import Path
from lenvm_lightning.utils.locked_folder import FolderLock
with FolderLock(Path(sys.argv[1])):
    child = os.fork() if sys.argv[2] == "fork" else 1
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(30)
"""


@contextlib.contextmanager
def holder(folder: Path, how: str = ""):
    command = [sys.executable, "-c", HOLD, str(folder), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        pids = [process.pid]
        try:
            pids = [int(process.stdout.readline()) for _ in range(2 if how == "fork" else 1)]
            yield process, pids
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_two_processes_never_share_a_folder(tmp_path, capsys):
    with holder(tmp_path) as (process, _):
        with pytest.raises(StoreError, match=f"{tmp_path} is in use by process {process.pid} on "):
            sample(tmp_path)
        process.kill()
        process.wait()
        assert sample(tmp_path).status == 0  # the lock of a killed process is nobody's
    assert not (tmp_path / ".lock").exists()


def test_a_worker_that_outlives_its_parent_holds_nothing(tmp_path):
    with holder(tmp_path, "fork") as (process, pids):
        process.kill()
        process.wait()
        (child,) = set(pids) - {process.pid}
        os.kill(child, 0)  # alive
        with FolderLock(tmp_path):
            pass


def test_waiting_for_the_other_process(tmp_path, whole, capsys):
    with holder(tmp_path) as (process, _):
        began = time.monotonic()
        os.kill(process.pid, signal.SIGSTOP)
        subprocess.Popen(["sh", "-c", f"sleep 0.7; kill -KILL {process.pid}"])
        outcome = sample_rollouts(ScriptedGenerator(), make_prompts(8), N, tmp_path, SAMPLING, wait=True)
    assert time.monotonic() - began > 0.6
    assert outcome.rollouts.read_bytes() == whole
    assert "waiting for it" in capsys.readouterr().err


# -- trouble ----------------------------------------------------------------------------------------------------------


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


def test_a_disk_that_fills_at_the_very_end(tmp_path, whole):
    stopped(tmp_path, 8 * N)
    (tmp_path / "tensorboard").mkdir()
    with room_for(len(whole) - 10), pytest.raises(StoreError, match=r"24 of 24 completions are there and stay"):
        sample(tmp_path)
    assert not (tmp_path / "rollouts.jsonl").exists()
    assert not (tmp_path / ".rollouts.jsonl").exists()
    assert len((tmp_path / "journal.jsonl").read_bytes()) == len(whole)
    assert sample(tmp_path).rollouts.read_bytes() == whole


def test_a_generator_that_dies_says_how_to_go_on(tmp_path, whole):
    # The last prompt: whatever the order of the answers, some were there before it was asked for.
    with pytest.raises(GeneratorError, match=r"the server is gone\n\d+ of 24 completions are in .* the same command"):
        sample(tmp_path, ScriptedGenerator(fails={("p/7", 1): GeneratorError("the server is gone")}))
    assert (tmp_path / "journal.jsonl").stat().st_size > 0
    assert sample(tmp_path).rollouts.read_bytes() == whole


def test_what_failed_is_listed_and_tried_again(tmp_path, whole, capsys):
    fails = {("p/1", 0): Failure("time-out", final=False), ("p/1", 2): Failure("time-out", final=False)}
    outcome = sample(tmp_path, ScriptedGenerator(fails=fails))
    assert (outcome.complete, outcome.status, outcome.summary) == (False, 3, None)
    listed = [json.loads(line) for line in (tmp_path / "failures.jsonl").open()]
    assert sorted((f["prompt_id"], f["number"], f["reason"], f["final"]) for f in listed) == [
        ("p/1", 0, "time-out", False), ("p/1", 2, "time-out", False),
    ]  # fmt: skip
    report(outcome)
    err = capsys.readouterr().err
    assert "2 completions failed, all listed in" in err
    assert "2 × time-out (tried again by the next run)" in err
    assert "journal.jsonl" in err
    generator = ScriptedGenerator()
    outcome = sample(tmp_path, generator)
    assert sorted(generator.asked) == [("p/1", 0), ("p/1", 2)]
    assert (outcome.status, outcome.rollouts.read_bytes()) == (0, whole)
    assert not (tmp_path / "failures.jsonl").exists()


def test_what_failed_for_good_is_not_asked_again(tmp_path, whole, capsys):
    lost = [("p/2", 0), ("p/2", 1), ("p/2", 2)]
    fails = {**dict.fromkeys(lost, Failure("the prompt is too long", True)), ("p/0", 0): Failure("odd", False)}
    assert not sample(tmp_path, ScriptedGenerator(fails=fails)).complete
    generator = ScriptedGenerator()
    outcome = sample(tmp_path, generator)
    assert generator.asked == [("p/0", 0)]
    assert (outcome.complete, outcome.status) == (True, 3)
    assert outcome.summary["failed"] == 3
    wanted = [line for line in whole.splitlines() if json.loads(line)["prompt_id"] != "p/2"]
    assert outcome.rollouts.read_bytes().splitlines() == wanted
    report(sample(tmp_path))  # said again by every run
    out, err = capsys.readouterr()
    assert "3 × the prompt is too long, such as completion 0 of prompt 'p/2'" in err
    assert "21 completions of 8 prompts by scripted" in out
    assert "; 3 failed" in out


def test_failures_that_were_being_written_are_tried_again(tmp_path, whole):
    sample(tmp_path, ScriptedGenerator(fails={("p/2", 0): Failure("too long", True), ("p/3", 0): Failure("x", False)}))
    file = tmp_path / "failures.jsonl"
    file.write_text("".join(line[:-9] for line in file.read_text().splitlines(keepends=True)))
    generator = ScriptedGenerator()
    assert sample(tmp_path, generator).rollouts.read_bytes() == whole
    assert sorted(generator.asked) == [("p/2", 0), ("p/3", 0)]


def test_nothing_at_all_is_no_success(tmp_path):
    fails = {(f"p/{i}", k): Failure("no pictures here", True) for i in range(8) for k in range(N)}
    for _ in range(2):
        with pytest.raises(
            StoreError, match=r"(?s)not one completion .* 24 × no pictures here.*failures\.jsonl to ask"
        ):
            sample(tmp_path, ScriptedGenerator(fails=fails))
    assert not (tmp_path / "rollouts.jsonl").exists()


class Confused(ScriptedGenerator):
    def __init__(self, answers: list[Answer]) -> None:
        super().__init__()
        self.answers = answers

    def sample(self, requests, sampling):
        yield from self.answers


def test_answers_to_questions_that_nobody_asked(tmp_path):
    (good,) = [ScriptedGenerator()._answer(("p/0", 0), SAMPLING)]
    for answers, words in (
        ([good, good], "completion 0 of prompt 'p/0' came a second time"),
        ([Answer("p/0", 3, good.result)], "completion 3 of prompt 'p/0' was not asked for"),
        ([Answer("nobody", 1, good.result)], "completion 1 of prompt 'nobody' was not asked for"),
        ([], "stopped 23 answers short"),
    ):
        with pytest.raises(GeneratorError, match=words):
            sample(tmp_path, Confused(answers))
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 1


# -- pictures and numbers ---------------------------------------------------------------------------------------------


def test_pictures_are_written_once_and_found_again(tmp_path):
    (tmp_path / "given").mkdir()
    path = tmp_path / "given" / "a.png"
    Image.new("RGB", (4, 4), (1, 2, 3)).save(path)
    see_through = Image.new("P", (5, 5), 0)
    see_through.info["transparency"] = 0
    pictures = (Image.new("RGB", (6, 6), (9, 8, 7)), str(path), see_through, Image.new("RGB", (6, 6), (9, 8, 7)))
    prompts = Prompts([Prompt("p", [{"role": "user", "content": "<image>" * 4}], pictures)])
    outcome = sample(tmp_path / "out", prompts=prompts)
    lines = outcome.rollouts.read_text().splitlines()
    rollouts = [parse_record(json.loads(line), outcome.folder)[0][0] for line in lines]
    assert len(list((tmp_path / "out" / "images").iterdir())) == 2
    for rollout in rollouts:
        assert rollout.images[0] == rollout.images[3]
        assert not os.path.isabs(json.loads(lines[0])["images"][1])
        modes = []
        for given, stored in zip(pictures, rollout.images, strict=True):
            expected = Image.open(given) if isinstance(given, str) else given
            with Image.open(stored) as found:
                modes.append(found.mode)
                assert np.array_equal(np.asarray(found.convert("RGBA")), np.asarray(expected.convert("RGBA")))
        assert modes == ["RGB", "RGB", "RGBA", "RGB"]


def test_summary(tmp_path, capsys):
    outcome: SamplingOutcome = sample(tmp_path, prompts=make_prompts(60))
    records = [json.loads(line) for line in outcome.rollouts.open()]
    lengths = np.array([len(r["token_ids"]) for r in records])
    cut = np.array([r["finish_reason"] == "length" for r in records])
    summary = outcome.summary
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert (summary["completions"], summary["tokens"], summary["prompts"]) == (180, lengths.sum(), 60)
    assert summary["length_tokens"]["p50"] == np.percentile(lengths, 50)
    assert summary["length_tokens"]["max"] == 40
    assert summary["truncated_share"] == cut.mean() > 0.2
    assert summary["gamma"] == pytest.approx(gamma_for_length(40), rel=1e-12)
    assert summary["gamma_is_low"]
    assert summary["logprob_per_token"] == pytest.approx(-1.5, rel=1e-12)
    assert summary["tokens_per_s"] > 0
    report(outcome)
    out = capsys.readouterr().out
    assert "p99 ≥ 40" in out
    assert "gamma suggested at least 0.89125" in out
    assert "only known to be at least the limit" in out
    assert "tiny world" not in out
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    histogram = events.Histograms("rollouts/length_tokens")[0].histogram_value
    assert (histogram.num, histogram.sum, histogram.max) == (180, lengths.sum(), 40)


def test_summary_without_cuts_and_logprobs(tmp_path, capsys):
    generator = ScriptedGenerator()
    generator.name = "some/where/tiny-text"
    answer = generator._answer

    def without(key, sampling):
        result = answer(key, sampling).result
        return Answer(*key, type(result)(**{**vars(result), "logprob": None, "reencoded": True}))

    generator._answer = without  # type: ignore[method-assign]
    outcome = sample_rollouts(generator, make_prompts(8), N, tmp_path, SamplingParams(max_tokens=100))
    assert outcome.summary["truncated_share"] == 0
    assert not outcome.summary["gamma_is_low"]
    assert outcome.summary["logprob_per_token"] is None
    report(outcome)
    out = capsys.readouterr().out
    assert "gamma suggested 0." in out
    assert "≥" not in out
    assert "re-encoded from text: 100.0%" in out
    assert "tiny world: a laboratory" in out
    assert all(json.loads(line)["reencoded"] is True for line in outcome.rollouts.open())
