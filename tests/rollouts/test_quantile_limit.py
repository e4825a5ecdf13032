"""A batch that ends when a share of its completions has: the limit, and what is recorded of those it truncates."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from asked import text_prompts
from scripted import SAMPLING, Prompts, ScriptedGenerator, make_prompts
from tiny_generators import build

from datamodules.tokenise import Limits, encode_rollout
from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.errors import GenerationError, StoreError
from lenvm_lightning.rollouts.generators.interface import Answer, PromptRequest
from lenvm_lightning.rollouts.generators.local import LocalGenerator
from lenvm_lightning.rollouts.generators.local import generator as generator_module
from lenvm_lightning.rollouts.quantile_limit import QuantileLimit, ended_in, truncated_at
from lenvm_lightning.rollouts.record import parse_record
from lenvm_lightning.rollouts.sample import report, sample_rollouts

LONG = SamplingParams(max_tokens=120, seed=7)
N = 3
SHARE = 0.6

# -- the limit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [0.05, 0.5, 0.77, 0.99])
def test_it_falls_to_the_smallest_length_by_which_the_share_has_ended(quantile):
    draw = random.Random(0)
    for wanted in (1, 2, 7, 40):
        lengths = [draw.randrange(1, 60) for _ in range(wanted)]
        limit = QuantileLimit(quantile, wanted, 50)
        seen = [limit()]
        for length in lengths:
            if length < 50:
                limit.ended(length)
            seen.append(limit())
        assert seen == sorted(seen, reverse=True)
        expected = min(n for n in range(1, 61) if sum(length <= n for length in lengths) >= quantile * wanted)
        assert limit() == min(50, expected)


def test_without_enough_ends_it_is_the_largest_length():
    limit = QuantileLimit(0.5, 4, 100)
    limit.ended(3)
    assert limit() == 100
    limit.ended(8)
    assert limit() == 8
    limit.forget()
    assert limit() == 100


def test_shares_are_those_that_are_typed():
    assert [ended_in(share, 100) for share in (0.55, 0.07, 0.9, 0.001, 1e-5)] == [55, 7, 90, 1, 1]
    assert ended_in(0.9, 11) == 10


def test_what_is_made_of_a_record():
    def text_of(ids: list[int]) -> str:
        return f"text of {ids}"

    line = {"completion": "abc", "token_ids": [5, 6, 7], "finish_reason": "stop", "logprob": -3.0, "number": 1}
    assert truncated_at(line, 3, text_of) == line
    cut = truncated_at(line, 2, text_of)
    assert cut == {
        "completion": "text of [5, 6]", "token_ids": [5, 6], "finish_reason": "length", "logprob": None, "number": 1,
    }  # fmt: skip
    assert line["token_ids"] == [5, 6, 7]
    # One that was stopped just there is the same as one that was stopped later.
    there = {**line, "token_ids": [5, 6], "finish_reason": "length"}
    assert truncated_at(there, 2, text_of) == cut


# -- a real generator -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return build("tiny-text", sharpness=2.0, eos_bias=3.5)


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts(text_prompts(10))


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.open()]


def backwards(prompts: Iterator) -> list[str]:
    return [prompt.prompt_id for prompt in prompts][::-1]


@pytest.fixture(scope="module")
def whole(model, tiny_text, prompts, tmp_path_factory) -> list[dict]:
    """Nothing is aborted."""
    folder = tmp_path_factory.mktemp("whole")
    return lines(sample_rollouts(LocalGenerator(model, tiny_text, "text"), prompts, N, folder, LONG).rollouts)


@pytest.fixture(scope="module")
def aborted(model, tiny_text, prompts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("aborted")
    generator = LocalGenerator(model, tiny_text, "text", rows=64)
    return sample_rollouts(generator, prompts, N, folder, LONG, abort_at_quantile=SHARE).folder


def test_the_batch_is_the_one_that_the_limit_would_have_given(model, tiny_text, prompts, whole, aborted, tmp_path):
    lengths = sorted(len(line["token_ids"]) for line in whole)
    limit = lengths[ended_in(SHARE, len(lengths)) - 1]
    assert 10 < limit < 120
    short = SamplingParams(max_tokens=limit, seed=7)
    outcome = sample_rollouts(LocalGenerator(model, tiny_text, "text"), prompts, N, tmp_path, short)
    found, expected = lines(aborted / "rollouts.jsonl"), lines(outcome.rollouts)
    told = ("prompt_id", "number", "completion", "token_ids", "finish_reason", "messages")
    assert [[one[name] for name in told] for one in found] == [[one[name] for name in told] for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["sampling"] == {**other["sampling"], "max_tokens": 120, "abort_at_quantile": SHARE}
        assert one["logprob"] == (other["logprob"] if one["finish_reason"] == "stop" else None)
    ended = sum(one["finish_reason"] == "stop" for one in found)
    assert SHARE <= ended / len(found) < SHARE + 0.15
    summary = json.loads((aborted / "summary.json").read_text())
    assert (summary["limit_tokens"], summary["aborted"]) == (limit, True)
    assert summary["truncated_share"] == pytest.approx(1 - ended / len(found))


@pytest.mark.parametrize("rows", [1, 16, 24])
@pytest.mark.parametrize("order", [None, backwards])
def test_neither_rows_nor_order_matter(model, tiny_text, prompts, aborted, tmp_path, rows, order):
    generator = LocalGenerator(model, tiny_text, "text", rows=rows)
    outcome = sample_rollouts(generator, prompts, N, tmp_path, LONG, abort_at_quantile=SHARE, order=order)
    assert outcome.rollouts.read_bytes() == (aborted / "rollouts.jsonl").read_bytes()


def test_engines_side_by_side_share_the_limit(model, tiny_text, prompts, aborted, tmp_path, monkeypatch):
    monkeypatch.setattr(generator_module, "_engines_for", lambda model, rows: 2)
    generator = LocalGenerator(model, tiny_text, "text", rows=32)
    outcome = sample_rollouts(generator, prompts, N, tmp_path, LONG, abort_at_quantile=SHARE)
    assert outcome.rollouts.read_bytes() == (aborted / "rollouts.jsonl").read_bytes()


@pytest.mark.parametrize("after", [1, 9, 20, 29])
def test_interrupted_it_ends_with_the_same_file(model, tiny_text, prompts, aborted, tmp_path, after):
    class Interrupted(LocalGenerator):
        def sample(self, requests, sampling):
            for number, answer in enumerate(super().sample(requests, sampling)):
                if number == after:
                    raise KeyboardInterrupt
                yield answer

    with pytest.raises(KeyboardInterrupt):
        sample_rollouts(
            Interrupted(model, tiny_text, "text", rows=16), prompts, N, tmp_path, LONG, abort_at_quantile=SHARE
        )
    assert len(lines(tmp_path / "journal.jsonl")) == after
    rest = LocalGenerator(model, tiny_text, "text", rows=8)
    outcome = sample_rollouts(rest, prompts, N, tmp_path, LONG, abort_at_quantile=SHARE)
    assert outcome.rollouts.read_bytes() == (aborted / "rollouts.jsonl").read_bytes()


def test_what_is_aborted_is_not_written(model, tiny_text, prompts, whole, aborted, tmp_path):
    """Side by side, nothing is written beyond the limit but one more token of each that still runs."""
    generator = LocalGenerator(model, tiny_text, "text", rows=64)
    sample_rollouts(generator, prompts, N, tmp_path, LONG, abort_at_quantile=SHARE)
    kept = sum(len(line["token_ids"]) for line in lines(aborted / "rollouts.jsonl"))
    truncated = sum(line["finish_reason"] == "length" for line in lines(aborted / "rollouts.jsonl"))
    assert kept <= generator.tokens_written <= kept + truncated
    assert generator.tokens_written < 0.8 * sum(len(line["token_ids"]) for line in whole)


def test_training_takes_them_for_right_censored(aborted, tiny_text):
    found = [(line, parse_record(line, aborted)) for line in lines(aborted / "rollouts.jsonl")]
    limit = json.loads((aborted / "summary.json").read_text())["limit_tokens"]
    for line, ([rollout], notes) in found:
        assert notes == []
        assert rollout.censored == (line["finish_reason"] == "length")
        row, _ = encode_rollout(tiny_text, rollout, Limits(), {})
        assert row["censored"] == rollout.censored
        assert not rollout.censored or row["length"] == limit


# -- the folder -------------------------------------------------------------------------------------------------------


class Late(ScriptedGenerator):
    """Stops nothing on its way, as one that looks at the limit too late."""

    def text_of(self, token_ids: list[int]) -> str:
        return " ".join(map(str, token_ids))


def test_what_ended_beyond_the_limit_is_cut_back(tmp_path):
    files = []
    for name in ("a", "b"):  # in another order each time
        outcome = sample_rollouts(Late(), make_prompts(8), N, tmp_path / name, SAMPLING, abort_at_quantile=0.5)
        files.append(outcome.rollouts.read_bytes())
    assert files[0] == files[1]
    found = lines(outcome.rollouts)
    truncated = [line for line in found if line["finish_reason"] == "length"]
    limit = outcome.summary["limit_tokens"]
    assert len(truncated) == outcome.summary["truncated_share"] * len(found) > 8
    assert all(line["completion"] == " ".join(map(str, line["token_ids"])) for line in truncated)
    assert {len(line["token_ids"]) for line in truncated} == {limit}
    assert all(len(line["token_ids"]) <= limit for line in found)


def test_a_share_is_a_setting_of_the_folder(tmp_path):
    sample_rollouts(Late(), make_prompts(8), N, tmp_path, SAMPLING, abort_at_quantile=0.5)
    for share, told in ((None, "sampling.abort_at_quantile: 0.5 -> None"), (0.6, "abort_at_quantile: 0.5 -> 0.6")):
        with pytest.raises(StoreError, match=told):
            sample_rollouts(Late(), make_prompts(8), N, tmp_path, SAMPLING, abort_at_quantile=share)


def test_a_share_that_nothing_reaches_changes_nothing(tmp_path, capsys):
    """More than .99 of these hit max_tokens or end just there."""
    plain = lines(sample_rollouts(Late(), make_prompts(8), N, tmp_path / "plain", SAMPLING).rollouts)
    outcome = sample_rollouts(Late(), make_prompts(8), N, tmp_path / "share", SAMPLING, abort_at_quantile=0.99)
    for line in lines(outcome.rollouts):
        del line["sampling"]["abort_at_quantile"]
        assert line == plain.pop(0)
    report(outcome)
    assert "truncated at 40:" in capsys.readouterr().out


def test_generators_whose_completions_come_whole_are_refused(tmp_path):
    with pytest.raises(GenerationError, match="abort_at_quantile: completions of scripted come whole"):
        sample_rollouts(ScriptedGenerator(), make_prompts(8), N, tmp_path / "out", SAMPLING, abort_at_quantile=0.5)
    assert not (tmp_path / "out").exists()


# -- the order --------------------------------------------------------------------------------------------------------


class Listening(ScriptedGenerator):
    """Remembers which prompts it was asked, in order."""

    def sample(self, requests, sampling) -> Iterator[Answer]:
        self.heard: list[PromptRequest] = []

        def hear() -> Iterator[PromptRequest]:
            for request in requests:
                self.heard.append(request)
                yield request

        return super().sample(hear(), sampling)


def test_prompts_are_started_in_the_order_given(tmp_path):
    generator = Listening()
    prompts = make_prompts(8)
    outcome = sample_rollouts(generator, prompts, N, tmp_path / "a", SAMPLING, order=backwards)
    assert [request.prompt.prompt_id for request in generator.heard] == [f"p/{i}" for i in reversed(range(8))]
    plain = sample_rollouts(ScriptedGenerator(), prompts, N, tmp_path / "b", SAMPLING)
    assert outcome.rollouts.read_bytes() == plain.rollouts.read_bytes()
