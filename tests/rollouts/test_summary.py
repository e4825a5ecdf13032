"""What is said of the completions that were sampled."""

import json

import numpy as np
import pytest
from sampled import N, sample
from scripted import ScriptedGenerator, make_prompts
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.rollouts.generators.interface import Answer
from lenvm_lightning.rollouts.sample import SamplingOutcome, report, sample_rollouts
from lenvm_lightning.values import gamma_for_length


def test_summary(tmp_path, capsys):
    outcome: SamplingOutcome = sample(tmp_path, prompts=make_prompts(60))
    records = [json.loads(line) for line in outcome.rollouts.open()]
    lengths = np.array([len(r["token_ids"]) for r in records])
    truncated = np.array([r["finish_reason"] == "length" for r in records])
    summary = outcome.summary
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert (summary["completions"], summary["tokens"], summary["prompts"]) == (180, lengths.sum(), 60)
    assert summary["length_tokens"]["p50"] == np.percentile(lengths, 50)
    assert summary["length_tokens"]["max"] == 40
    assert summary["truncated_share"] == truncated.mean() > 0.2
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


def test_summary_without_truncation_and_logprobs(tmp_path, capsys):
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
