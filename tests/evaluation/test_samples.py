"""Samples of an evaluation: what is in the folder after a crash, a full disk, a dead generator, another process."""

import json
from dataclasses import asdict, replace
from functools import partial

import pytest
from full_disk import room_for
from scripted import SAMPLING, ScriptedGenerator, make_prompts

from lenvm_lightning.errors import GeneratorError, StoreError
from lenvm_lightning.evaluation.samples import (
    Sample,
    SampleFolder,
    System,
    by_question,
    collect,
    logprob_per_token,
    repetition,
)
from lenvm_lightning.guidance import AtMost
from lenvm_lightning.rollouts.generators.interface import Failure

SETTINGS = {"task": "gsm8k", "n": 3, "sampling": {"temperature": 1.0}}
BASE = System("base")


def sample(prompt_id="p/1", number=0, system="base", **changed):
    given = Sample(system, prompt_id, number, 3, "stop", -1.25, {"right": True}, "é 漢\n{", [7, 9, 2])
    return replace(given, **changed)


def judge(meta, completion):
    return {"answer": meta["answer"], "even": len(completion.token_ids) % 2 == 0}


def measure(folder, generator=None, system=BASE, prompts=None, n=3, settings=SETTINGS):
    """Collect in a folder, and return what is in it."""
    with SampleFolder(folder, settings) as samples:
        collect(samples, generator or ScriptedGenerator(), system, prompts or make_prompts(5), n, SAMPLING, judge)
    return samples


def test_what_was_added_is_there_again(tmp_path):
    added = [sample(number=1, logprob=None, reencoded=True), sample(), sample(system="ours", finish_reason="length")]
    with SampleFolder(tmp_path, SETTINGS) as first:
        for one in added:
            first.add(one)
    with SampleFolder(tmp_path, SETTINGS) as again:
        assert again.samples == first.samples == {(s.system, s.prompt_id, s.number): s for s in added}
        assert again.notes == []
        assert again.of("base") == [added[1], added[0]]
        assert again.of("ours") == [added[2]]
        assert again.of("ours")[0].truncated
        assert not again.of("base")[0].truncated
    assert json.loads((tmp_path / "settings.json").read_text()) == SETTINGS
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("torn", [1, 20, 100])
def test_a_torn_last_line_is_cut_off(tmp_path, torn):
    with SampleFolder(tmp_path, SETTINGS) as samples:
        samples.add(sample())
    whole = (tmp_path / "samples.jsonl").read_bytes()
    with (tmp_path / "samples.jsonl").open("ab") as file:
        file.write(whole[:torn])
    with SampleFolder(tmp_path, SETTINGS) as samples:
        assert samples.notes == ["samples.jsonl: its last line was torn and is cut off"]
        samples.add(sample(number=1))
    with SampleFolder(tmp_path, SETTINGS) as samples:
        assert [s.number for s in samples.of("base")] == [0, 1]
        assert samples.notes == []


def test_a_last_line_without_its_end_is_kept(tmp_path):
    with SampleFolder(tmp_path, SETTINGS) as samples:
        samples.add(sample())
    file = tmp_path / "samples.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with SampleFolder(tmp_path, SETTINGS) as samples:
        assert samples.of("base") == [sample()]
    assert file.read_bytes() == whole


def test_broken_lines_are_set_aside_and_sampled_again(tmp_path):
    whole = measure(tmp_path).of("base")
    file = tmp_path / "samples.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    unknown = json.dumps({**json.loads(lines[7]), "colour": 3}).encode() + b"\n"
    file.write_bytes(b"".join([*lines[:2], b"\0\0{]\n", *lines[3:7], unknown, *lines[8:]]))
    with SampleFolder(tmp_path, SETTINGS) as samples:
        assert len(samples.samples) == 13
        assert "samples.jsonl:3: not a whole record" in samples.notes[0]
        assert "set aside in broken.jsonl, sampled again" in samples.notes[0]
        assert "samples.jsonl:8: not a whole record" in samples.notes[1]
        assert "colour" in samples.notes[1]
    assert (tmp_path / "broken.jsonl").read_bytes() == b"\0\0{]\n" + unknown
    generator = ScriptedGenerator()
    assert measure(tmp_path, generator).of("base") == whole
    assert len(generator.asked) == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens", "12"), ("logprob", float("nan")), ("logprob", float("inf")), ("text", None), ("found", []),
        ("token_ids", [1, "2"]), ("token_ids", [-5]), ("token_ids", [2**70]), ("logprob", 1e308),
        ("finish_reason", "error"), ("number", True), ("prompt_id", 3), ("more", 1),
    ],
)  # fmt: skip
def test_a_line_with_a_wrong_value_is_set_aside(tmp_path, key, value):
    with SampleFolder(tmp_path, SETTINGS) as folder:
        folder.add(sample("a"))
    line = {**sample("b").as_line(), key: value}
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    with SampleFolder(tmp_path, SETTINGS) as folder:
        assert [one.prompt_id for one in folder.samples.values()] == ["a"]
        told = [f"not a whole record (ValueError: {words}" in folder.notes[0] for words in (key, "it holds ")]
        assert any(told)


def test_deep_nesting_in_a_line_is_set_aside(tmp_path):
    with SampleFolder(tmp_path, SETTINGS) as folder:
        folder.add(sample("a"))
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write("[" * 100_000 + "]" * 100_000 + "\n" + "9" * 5_000 + "\n")
    with SampleFolder(tmp_path, SETTINGS) as folder:
        assert len(folder.samples) == 1
        assert len(folder.notes) == 2


def test_other_settings_are_refused_with_the_difference(tmp_path):
    measure(tmp_path)
    changed = {**SETTINGS, "n": 4, "sampling": {"temperature": 0.5}}
    before = (tmp_path / "samples.jsonl").read_bytes()
    with (
        pytest.raises(StoreError, match=r"holds completions sampled with other settings:") as error,
        SampleFolder(tmp_path, changed),
    ):
        pass
    assert "\n  n: 3 -> 4\n  sampling.temperature: 1.0 -> 0.5\nChoose another folder (--out)" in str(error.value)
    assert (tmp_path / "samples.jsonl").read_bytes() == before
    assert measure(tmp_path).of("base")  # and the folder is free again
    for broken, words in ((None, "settings.json is missing"), ("[1", "settings.json cannot be read")):
        (tmp_path / "settings.json").unlink(missing_ok=True)
        if broken:
            (tmp_path / "settings.json").write_text(broken)
        with pytest.raises(StoreError, match=words), SampleFolder(tmp_path, SETTINGS):
            pass


def test_settings_of_a_folder_without_samples_may_change(tmp_path):
    with SampleFolder(tmp_path, {**SETTINGS, "n": 4}):
        pass
    assert len(measure(tmp_path).of("base")) == 15
    assert json.loads((tmp_path / "settings.json").read_text())["n"] == 3


def test_a_full_disk_keeps_what_is_there(tmp_path):
    whole = measure(tmp_path / "whole").of("base")
    size = (tmp_path / "whole" / "samples.jsonl").stat().st_size // 2
    with (
        room_for(size),
        pytest.raises(StoreError, match=r"cannot be written: File too large\. (\d+) completions") as e,
    ):
        measure(tmp_path / "full")
    assert "are there and stay. Make room, then type the same command again" in str(e.value)
    lines = (tmp_path / "full" / "samples.jsonl").read_bytes()
    assert size / 2 < len(lines) <= size
    assert lines.endswith(b"}\n")
    assert f" {len(lines.splitlines())} completions" in str(e.value)
    assert measure(tmp_path / "full").of("base") == whole


def test_a_second_process_is_kept_out(tmp_path):
    with SampleFolder(tmp_path, SETTINGS):
        with pytest.raises(StoreError, match=r"is in use by process \d+ on .*Wait until it ends"):
            measure(tmp_path)
        assert not (tmp_path / "samples.jsonl").exists()
    assert measure(tmp_path).of("base")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written: Not a directory"):
        measure(tmp_path / "file" / "results")


def test_order_does_not_depend_on_arrival(tmp_path):
    prompts = make_prompts(5)
    runs = [measure(tmp_path / str(k), prompts=prompts) for k in range(3)]
    arrivals = {(tmp_path / str(k) / "samples.jsonl").read_bytes() for k in range(3)}
    assert len(arrivals) > 1  # they did come in different orders
    assert runs[0].of("base") == runs[1].of("base") == runs[2].of("base")
    keys = [(s.prompt_id, s.number) for s in runs[0].of("base")]
    assert keys == [(f"p/{i}", k) for i in range(5) for k in range(3)]


def test_samples_hold_what_was_answered_and_judged(tmp_path):
    samples = measure(tmp_path).of("base")
    for one in samples:
        assert one.tokens == len(one.token_ids)
        assert one.found == {"answer": one.prompt_id.removeprefix("p/"), "even": one.tokens % 2 == 0}
        assert one.truncated == (one.token_ids[-1] != 2)
        assert one.text == " ".join(map(str, one.token_ids)) + " é\n漢"
    assert {one.truncated for one in samples} == {True, False}
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted(lines) == sorted(json.dumps(asdict(one)) for one in samples)


def test_only_what_is_missing_is_asked_for(tmp_path):
    generator = ScriptedGenerator()
    measure(tmp_path, generator, prompts=make_prompts(2), n=2)
    assert len(generator.asked) == 4
    measure(tmp_path, generator)  # more of both
    assert len(generator.asked) == len(set(generator.asked)) == 15
    with SampleFolder(tmp_path, SETTINGS) as samples:
        told = collect(samples, None, BASE, make_prompts(5), 3, SAMPLING, judge)  # nobody is needed
        assert told is None
        told = collect(samples, generator, System("ours"), make_prompts(5), 3, SAMPLING, judge)
        assert told > 0
    assert len(generator.asked) == 30


def test_a_system_decides_control_and_sampling(tmp_path):
    class Asked(ScriptedGenerator):
        def sample(self, requests, sampling):
            requests = list(requests)
            self.requests, self.sampling = requests, sampling
            return super().sample(requests, sampling)

    generator = Asked()
    system = System("ours", lambda meta: AtMost(10 + int(meta["answer"])), {"min_p": 0.25})
    assert system.guided
    assert not BASE.guided
    measure(tmp_path, generator, system)
    assert [request.control for request in generator.requests] == [AtMost(10 + i) for i in range(5)]
    assert generator.sampling == replace(SAMPLING, min_p=0.25)
    measure(tmp_path, generator)
    assert [request.control for request in generator.requests] == [None] * 5
    assert generator.sampling == SAMPLING


def test_what_failed_is_remembered_and_tried_again(tmp_path):
    fails = {("p/1", 0): Failure("time-out", final=False), ("p/3", 2): Failure("too long", final=True)}
    found = measure(tmp_path, ScriptedGenerator(fails=fails))
    assert found.failures == {("base", *key): failure for key, failure in fails.items()}
    assert len(found.of("base")) == 13
    generator = ScriptedGenerator()
    found = measure(tmp_path, generator)
    assert sorted(generator.asked) == sorted(fails)
    assert (len(found.of("base")), found.failures) == (15, {})


def test_what_failed_is_tried_again_by_the_same_process_too(tmp_path):
    fails = {("p/1", 0): Failure("time-out", final=False)}
    with SampleFolder(tmp_path, SETTINGS) as samples:
        for generator in (ScriptedGenerator(fails=fails), ScriptedGenerator(fails=fails), ScriptedGenerator()):
            collect(samples, generator, BASE, make_prompts(5), 3, SAMPLING, judge)
            assert (len(samples.samples) == 15) is (not samples.failures) is (not generator.fails)


def test_a_generator_that_dies_says_how_to_go_on(tmp_path):
    dead = ScriptedGenerator(fails={("p/4", 1): GeneratorError("the server is gone")})
    with pytest.raises(
        GeneratorError, match=r"the server is gone\n(\d+) completions are in .* the same command goes on"
    ) as e:
        measure(tmp_path, dead)
    there = (tmp_path / "samples.jsonl").read_bytes().count(b"\n")
    assert f"\n{there} completions" in str(e.value)
    assert 0 < there < 15
    generator = ScriptedGenerator()
    assert len(measure(tmp_path, generator).of("base")) == 15
    assert len(generator.asked) == 15 - there


def test_a_generator_that_stops_short_is_not_taken_for_done(tmp_path):
    class Short(ScriptedGenerator):
        def sample(self, requests, sampling):
            yield from list(super().sample(requests, sampling))[:-2]

    with pytest.raises(GeneratorError, match=r"stopped 2 answers short.*\n13 completions are in .* and stay"):
        measure(tmp_path, Short())
    assert len(measure(tmp_path).samples) == 15


def test_logprobs_are_rounded(tmp_path):
    class Exact(ScriptedGenerator):
        def _answer(self, key, sampling):
            answer = super()._answer(key, sampling)
            return replace(answer, result=replace(answer.result, logprob=-1.23456789))

    assert {s.logprob for s in measure(tmp_path, Exact()).of("base")} == {-1.235}


def test_values_by_question():
    samples = [sample("b", 0, tokens=4), sample("a", 0, tokens=5), sample("b", 1, tokens=6)]
    assert by_question(samples, lambda s: s.tokens / 2) == {"b": [2.0, 3.0], "a": [2.5]}
    assert by_question([], lambda s: s.tokens) == {}


def test_logprob_per_token_by_hand():
    make = partial(sample, "a")
    assert logprob_per_token([make(0, tokens=4, logprob=-2.0), make(1, tokens=6, logprob=-1.0)]) == -0.3
    assert logprob_per_token([make(0, tokens=4, logprob=-2.0), make(1, tokens=6, logprob=None)]) is None
    assert logprob_per_token([make(0, tokens=0, logprob=0.0)]) is None
    assert logprob_per_token([]) is None


def test_repetition_by_hand():
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4], size=2) == pytest.approx(3 / 7)  # 12, 23, 34 come twice, 41 once
    assert repetition([1, 2, 3, 4, 5]) == 0.0
    assert repetition([7] * 3) == 0.0  # too short for a run of four
