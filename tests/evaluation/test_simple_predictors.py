"""Predictors that are easy to have: what they learn, and that they stand beside the value model in a report."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lenvm_lightning.cli.evaluate import main as evaluate
from lenvm_lightning.cli.main import main as lenvm
from lenvm_lightning.errors import DataError, EvaluationError
from lenvm_lightning.evaluation.results import Results
from lenvm_lightning.evaluation.simple_predictors import LogLinear, Probe, Regression, known_completions
from lenvm_lightning.evaluation.tasks.length import refuse_asked
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.rollouts.generators.interface import Prompt


def test_a_law_that_is_linear_in_the_logarithm_is_found():
    random = np.random.default_rng(0)
    features = random.normal(size=(200, 2))
    remaining = np.expm1(3 + 0.5 * features[:, 0] - 0.25 * features[:, 1])
    model = LogLinear(features, remaining, np.arange(200))
    assert np.allclose(model.predict(features), remaining, rtol=0.02)  # the least ridge is not none
    assert (model.predict(np.array([[-99.0, 0.0]])) == 0).all()  # never below nothing


def test_the_ridge_is_the_one_that_does_best_on_prompts_that_were_held_out():
    # Forty features of noise for forty prompts: without a ridge they explain everything, and predict nothing.
    random = np.random.default_rng(1)
    features, remaining = random.normal(size=(40, 40)), random.uniform(50, 150, size=40)
    predicted = LogLinear(features, remaining, np.arange(40)).predict(random.normal(size=(1000, 40)))
    assert 75 < float(predicted.median()) < 125
    assert float(predicted.std()) < 60


def prompts_of(count):
    return [Prompt(str(i), [{"role": "user", "content": "word " * (1 + i % 10)}]) for i in range(count)]


def test_the_regression_learns_that_long_questions_get_long_answers():
    processor = load_processor("tiny-text")
    completions = [(prompt, [5] * (20 * (1 + i % 10))) for i, prompt in enumerate(prompts_of(40))]
    regression = Regression(processor, completions)
    short, long = (regression.predict(prompt, 10)[0] for prompt in (prompts_of(40)[0], prompts_of(40)[9]))
    assert short < 60 < 120 < long
    assert regression.predict(prompts_of(1)[0], 10).shape == (11,)
    with pytest.raises(DataError, match="19 completions are too few to learn from: take 20"):
        Regression(processor, completions[:19])


def test_the_probe_reads_what_is_written():
    # Token 7 stands where the text is about to end, token 5 everywhere else: nothing but the state can tell.
    processor = load_processor("tiny-text")
    completions = [(p, [5] * (10 + 3 * i) + [7] * 10) for i, p in enumerate(prompts_of(30))]
    probe = Probe("tiny-text", processor, "float32", torch.device("cpu"), completions)
    predicted = dict(probe.predict(completions[-2:]))
    assert sorted(predicted) == [0, 1]
    for number, (_, ids) in enumerate(completions[-2:]):
        assert predicted[number].shape == (len(ids) + 1,)
        assert predicted[number][-8:-1].max() < 12 < 20 < predicted[number][8]


def test_rollouts_that_are_none(tmp_path):
    file = tmp_path / "rollouts.jsonl"
    file.write_text('{"prompt_id": 3}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"rollouts.jsonl, line 1: it cannot be read as rollouts"):
        known_completions(file)


@pytest.fixture
def rollouts(tmp_path):
    words = "sample --generator tiny-text --prompts tiny-math --split train --limit 15 -n 2 --max-tokens 200 --out"
    assert lenvm([*words.split(), str(tmp_path / "rollouts")]) == 0
    return tmp_path / "rollouts" / "rollouts.jsonl"


def test_they_stand_beside_the_value_model(rollouts, tmp_path, capsys):
    known = known_completions(rollouts)
    kept = [json.loads(line) for line in rollouts.read_text(encoding="utf-8").splitlines()]
    assert len(known) == len(kept) == 30
    words = f"--task length --data tiny-math --limit 6 --n 2 --max-tokens 200 --learn-from {rollouts} --probe"
    assert evaluate([*words.split(), "--out", str(tmp_path / "results")]) == 0
    report = capsys.readouterr().out
    assert "| regression |" in report
    assert "| probe" in report
    results = Results.from_dict(json.loads((tmp_path / "results" / "results.json").read_text(encoding="utf-8")))
    before, by_position, by_written, distributions, _ = results.tables
    assert {row.label["predictor"] for row in distributions.rows} == {"LenVM", "constant", "quantile regression"}
    assert [row.label["predictor"] for row in before.rows] == ["LenVM", "regression", "probe"]
    assert len({row.measures["mre"].value for row in before.rows}) == 3
    assert [row.label["written"] for row in by_written.rows][:3] == ["0", "16", "64"]
    for table in (by_position, by_written):
        assert all({"mae_tokens", "regression", "probe"} <= set(row.measures) for row in table.rows)
    # Every completion is there before its first token, whether it ended or not; only those that did have a position.
    assert by_written.rows[0].samples == 12 >= by_position.rows[0].samples
    assert -1 <= by_written.rows[0].measures["spearman"].value <= 1
    assert "spearman" not in by_position.rows[0].measures


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--learn-from nowhere.jsonl", "--learn-from: there is no file nowhere.jsonl"),
        ("--probe", "--probe has nothing to learn from: name rollouts of other prompts by --learn-from"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_sampled(words, message, capsys):
    assert evaluate(["--task", "length", "--limit", "1", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_prompts_that_are_asked_are_not_learned_from(tmp_path, capsys):
    words = "sample --generator tiny-text --prompts tiny-math --split test --limit 15 -n 2 --max-tokens 200 --out"
    assert lenvm([*words.split(), str(tmp_path / "rollouts")]) == 0
    file = tmp_path / "rollouts" / "rollouts.jsonl"
    prompts = tmp_path / "prompts.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    asked = {row["prompt_id"]: row["messages"] for row in rows}
    lines = [json.dumps({"prompt_id": key, "messages": messages}) for key, messages in asked.items()]
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = f"--task length --lenvm tiny-text-lenvm --data {prompts} --limit 2 --n 2 --max-tokens 200"
    assert evaluate([*words.split(), "--learn-from", str(file), "--out", str(tmp_path / "results")]) == 2
    assert "--learn-from: 2 of its prompts are asked here" in capsys.readouterr().err
    assert not (tmp_path / "results" / "samples.jsonl").exists()  # refused before anything was sampled
    words = f"--task length --generator tiny-text --lenvm tiny-text-lenvm --rollouts {file} --learn-from {file}"
    assert evaluate([*words.split(), "--out", str(tmp_path / "recorded")]) == 2
    assert "--learn-from: 15 of its prompts are asked here" in capsys.readouterr().err


def test_the_same_question_about_other_images_is_another_prompt():
    question = [{"role": "user", "content": "<image>How many?"}]
    red, blue = Image.new("RGB", (28, 28), "red"), Image.new("RGB", (28, 28), "blue")
    asked = [Prompt("a", question, (red,))]
    refuse_asked([(Prompt("b", question, (blue,)), [1, 2])], asked)
    with pytest.raises(EvaluationError, match="1 of its prompts are asked here, such as 'a'"):
        refuse_asked([(Prompt("b", question, (red.copy(),)), [1, 2])], asked)
