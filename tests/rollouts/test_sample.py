"""Sampling: what is asked for, what failed, generators that die or answer what nobody asked."""

import json
from pathlib import Path

import pytest
from sampled import N, sample, stopped
from scripted import SAMPLING, ScriptedGenerator, make_prompts

from lenvm_lightning.errors import GeneratorError, StoreError
from lenvm_lightning.rollouts.generators.interface import Answer, Failure
from lenvm_lightning.rollouts.record import parse_record
from lenvm_lightning.rollouts.sample import already_sampled, open_generator, report


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
    fails = {(f"p/{i}", k): Failure("no images here", True) for i in range(8) for k in range(N)}
    for _ in range(2):
        with pytest.raises(StoreError, match=r"(?s)not one completion .* 24 × no images here.*failures\.jsonl to ask"):
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


@pytest.mark.parametrize("option", ["source", "url", "prompts", "folder", "colour"])
def test_options_that_no_generator_has_are_named(tmp_path, option):
    """Whatever the functions call what they are given themselves."""
    sample(tmp_path)
    for source in ("http://me:hunter2@127.0.0.1:9", "tiny-text"):
        assert already_sampled(source, make_prompts(8), N, tmp_path, SAMPLING, **{option: 3}) is None
        with pytest.raises(GeneratorError, match=f"takes no '{option}'") as error:
            open_generator(source, **{option: 3})
        assert "hunter2" not in str(error.value)
