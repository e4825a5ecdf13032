"""The server as a generator of rollouts and evaluations: ids, log-probabilities and controls over HTTP."""

import json

import pytest

from lenvm_lightning.cli.evaluate import main as lenvm_eval
from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.errors import GenerationError
from lenvm_lightning.evaluation.results import Results
from lenvm_lightning.guidance import AtMost, EqualTo, Gated, Tilt
from lenvm_lightning.rollouts.generators.interface import Prompt, PromptRequest
from lenvm_lightning.rollouts.generators.server import ServerGenerator

SEA = Prompt("sea", [{"role": "user", "content": "Write a text about the sea."}])
SAMPLING = SamplingParams(max_tokens=80, top_k=15, seed=4)


def test_it_is_known_by_its_signature_and_gives_ids_and_log_probabilities(tiny_server):
    generator = ServerGenerator(tiny_server.url)
    requests = [PromptRequest(SEA, (0, 1), control) for control in (EqualTo(30), AtMost(20), None, Gated(Tilt(-5)))]
    answers = list(generator.sample(requests, SAMPLING))
    tokenizer = tiny_server.service.tokenizer
    assert len(answers) == 8
    for answer in answers:
        result = answer.result
        assert not result.reencoded
        assert tokenizer.decode(result.token_ids, skip_special_tokens=True) == result.text
        assert result.logprob < 0
    lengths = sorted(len(answer.result.token_ids) for answer in answers)
    assert sum(28 <= length <= 32 for length in lengths) >= 2
    assert sum(length <= 20 for length in lengths) >= 2
    with pytest.raises(GenerationError, match="has no text form"):
        list(generator.sample([PromptRequest(SEA, (0,), lambda probs, *_: probs)], SAMPLING))


def test_a_stop_text_stays_in_the_record(tiny_server):
    generator = ServerGenerator(tiny_server.url)
    [whole] = generator.sample([PromptRequest(SEA, (0,))], SAMPLING)
    stop = whole.result.text[8:12]
    sampling = SamplingParams(max_tokens=80, top_k=15, seed=4, stop=(stop,))
    [answer] = generator.sample([PromptRequest(SEA, (0,))], sampling)
    assert answer.result.text == whole.result.text.partition(stop)[0] + stop
    assert answer.result.finish_reason == "stop"
    assert answer.result.token_ids == whole.result.token_ids[: len(answer.result.token_ids)]


def test_lifebench_through_the_server(tiny_server, tmp_path):
    command = ["--task", "lifebench", "--generator", tiny_server.url, "--options", "{server: lenvm}", "--limit", "4"]
    command += ["--lengths", "32", "--data", "tiny", "--systems", "base", "ours", "--out", str(tmp_path / "r")]
    assert lenvm_eval(command) == 0
    results = Results.from_dict(json.loads((tmp_path / "r" / "results.json").read_text(encoding="utf-8")))
    assert results.failed == 0
    score = {(row.label["system"], row.label["N"]): row.measures for row in results.tables[0].rows}
    assert score["ours", "32"]["length_score"].value > 85 > 60 > score["base", "32"]["length_score"].value
