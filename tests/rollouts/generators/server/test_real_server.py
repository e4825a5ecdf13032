"""A real server, ``transformers serve`` on loopback, killed in the middle: no completion is lost, none is doubled."""

import importlib.util
import json
import threading
import time

import pytest
from transformers_served import Served

from lenvm_lightning import tinyworld
from lenvm_lightning.cli.evaluate import main as lenvm_eval
from lenvm_lightning.decoding.sampling_params import SamplingParams, completion_seed
from lenvm_lightning.errors import GeneratorError
from lenvm_lightning.evaluation.results import Results
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.rollouts.generators.interface import Prompt, PromptRequest
from lenvm_lightning.rollouts.generators.server import ServerGenerator
from lenvm_lightning.rollouts.prompts import load_prompts
from lenvm_lightning.rollouts.sample import sample_rollouts

MISSING = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"transformers[serving] is not installed: no {', '.join(MISSING)}"
)


@pytest.fixture(scope="module")
def model():
    return str(tinyworld.path("tiny-text"))


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    server = Served(model, tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


def written(folder):
    """Number of completions in the journal."""
    journal = folder / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def kill_at(served, folder, count, *, again):
    """Kill the server as soon as there are so many completions; start it again, or not."""

    def work():
        while written(folder) < count:
            time.sleep(0.002)
        served.kill()
        if again:
            served.start()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def check(outcome, prompts, n, sampling):
    """Exactly ``n`` completions of each prompt, in order, each as it was asked for."""
    assert outcome.complete
    assert not outcome.failures
    records = [json.loads(line) for line in outcome.rollouts.read_text(encoding="utf-8").splitlines()]
    assert [(r["prompt_id"], r["number"]) for r in records] == [(i, k) for i in prompts.ids for k in range(n)]
    assert all(r["sampling"]["seed"] == completion_seed(sampling.seed, r["prompt_id"], r["number"]) for r in records)
    assert all(r["reencoded"] and r["token_ids"] for r in records)
    assert {r["finish_reason"] for r in records} <= {"stop", "length"}
    return records


def test_it_is_told_what_it_needs_to_know(served, model):
    with pytest.raises(GeneratorError, match=r"which model\?.*does not say which one it serves"):
        ServerGenerator(served.url)
    wrong = ServerGenerator(served.url, "another", processor=model)
    requests = [PromptRequest(prompt, (0,)) for prompt in load_prompts("tiny-math", limit=20)]
    with pytest.raises(GeneratorError, match=r"refuses every request.*Server is pinned to .*requested 'another'"):
        list(wrong.sample(requests, SamplingParams(max_tokens=4)))


def test_stop_texts_end_completions(served, model):
    generator = ServerGenerator(served.url, model, retries=0)
    requests = [PromptRequest(prompt, (0,)) for prompt in load_prompts("tiny-math", limit=12)]
    answers = list(generator.sample(requests, SamplingParams(max_tokens=60, seed=1, stop=("the ",))))
    eos = load_processor(model).eos_token_id
    stopped = [answer.result for answer in answers if "the " in answer.result.text]
    assert 0 < len(stopped) < 12
    for answer in answers:
        result = answer.result
        assert result.text.count("the ") == (result in stopped)
        ended_by_token = result.finish_reason == "stop" and result not in stopped
        assert (result.token_ids[-1] == eos) == ended_by_token


@pytest.mark.slow
def test_a_dead_server_ends_the_run_and_the_next_one_goes_on(served, model, tmp_path):
    prompts, sampling = load_prompts("tiny-math", limit=20), SamplingParams(max_tokens=8, seed=1)
    generator = ServerGenerator(served.url, model, concurrency=4, unreachable_timeout=0.5)
    killer = kill_at(served, tmp_path, 10, again=False)
    with pytest.raises(GeneratorError, match=r"(?s)has not answered.*of 40 completions are in"):
        sample_rollouts(generator, prompts, 2, tmp_path, sampling)
    killer.join()
    before = (tmp_path / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    assert 10 <= len(before) < 40
    served.start()
    records = check(sample_rollouts(generator, prompts, 2, tmp_path, sampling), prompts, 2, sampling)
    kept = {json.dumps(record) for record in records}
    assert all(json.dumps(json.loads(line)) in kept for line in before)
    # The server is greedy unless told otherwise: then both completions of every prompt would be the same.
    pairs = zip(records[::2], records[1::2], strict=True)
    assert sum(first["completion"] != second["completion"] for first, second in pairs) >= 3


@pytest.mark.slow
def test_a_restart_in_the_middle_loses_and_doubles_nothing(served, model, tmp_path):
    prompts, sampling = load_prompts("tiny-math", limit=200), SamplingParams(max_tokens=8, seed=2)
    generator = ServerGenerator(served.url, model, concurrency=8, unreachable_timeout=120)
    starts = served.starts
    killer = kill_at(served, tmp_path, 300, again=True)
    outcome = sample_rollouts(generator, prompts, 4, tmp_path, sampling)
    killer.join()
    assert served.starts == starts + 1
    assert len(check(outcome, prompts, 4, sampling)) == 800


@pytest.mark.slow
def test_the_server_sees_the_images(tmp_path):
    """Greedy, so that only the image can make a difference."""
    model = str(tinyworld.path("tiny-vl"))
    server = Served(model, tmp_path)
    server.start()
    try:
        images = [prompt.images for prompt in load_prompts("tiny-vqa", limit=6)]
        ask = [{"role": "user", "content": "<image>How many shapes are there?"}]
        asked = [Prompt(f"p{i}", ask, image) for i, image in enumerate([*images, images[0]])]
        requests, sampling = (
            [PromptRequest(prompt, (0,)) for prompt in asked],
            SamplingParams(temperature=0.0, max_tokens=32),
        )
        answers = {a.prompt_id: a.result for a in ServerGenerator(server.url, model).sample(requests, sampling)}
    finally:
        server.kill()
    assert answers["p0"].token_ids == answers["p6"].token_ids
    assert len({answer.text for answer in answers.values()}) > 1


def evaluate(served, model, folder, *words):
    """``lenvm-eval`` on the server, two completions of each of two questions."""
    command = ["--task", "gsm8k", "--generator", served.url, "--model", model, "--data", "tiny", "--limit", "2"]
    command += ["--n", "2", "--max-tokens", "12", "--options", "{processor: tiny-text}", "--out", str(folder)]
    return lenvm_eval([*command, *words])


def test_an_evaluation_of_it(served, model, tmp_path, capsys):
    assert evaluate(served, model, tmp_path) == 0
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(samples) == 4
    assert all(one["system"] == "base" and one["reencoded"] and one["logprob"] is None for one in samples)
    assert len({one["prompt_id"] for one in samples}) == 2
    results = Results.from_dict(json.loads((tmp_path / "results.json").read_text(encoding="utf-8")))
    [row] = results.tables[0].rows
    assert row.measures["tokens"].value == sum(one["tokens"] for one in samples) / 4
    assert row.measures["logprob_per_token"].value is None
    assert "log p a token" not in (tmp_path / "report.md").read_text(encoding="utf-8").partition("Pass@1:")[0]
    assert results.provenance["generator"]["kind"] == "server"
    assert evaluate(served, model, tmp_path) == 0
    assert "is complete for these settings" in capsys.readouterr().err


def test_predicted_lengths_of_what_it_writes(served, model, tmp_path):
    command = ["--task", "length", "--lenvm", "tiny-text-lenvm", "--max-tokens", "200"]
    assert evaluate(served, model, tmp_path, *command) == 0
    results = Results.from_dict(json.loads((tmp_path / "results.json").read_text(encoding="utf-8")))
    assert results.provenance["gamma"] == 0.99
    assert results.tables[1].rows[0].measures["mae_tokens"].value > 0


@pytest.mark.parametrize("words", [["--systems", "base", "tilt:-5"], ["--lenvm", "tiny-text-lenvm"]])
def test_a_guided_evaluation_of_it_is_refused_before_sampling(served, model, tmp_path, capsys, words):
    assert evaluate(served, model, tmp_path / "out", *words) == 2
    assert "tilt:-5: a server decodes by itself, without --lenvm" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
