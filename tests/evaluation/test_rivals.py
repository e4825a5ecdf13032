"""Ways to a length without training: what they ask, what is counted, what is judged."""

import json

import pytest

from lenvm_lightning.cli.evaluate import main as evaluate
from lenvm_lightning.decoding.sampling_params import SamplingParams, completion_seed
from lenvm_lightning.errors import EvaluationError
from lenvm_lightning.evaluation.rivals import Rival, WithFeedback
from lenvm_lightning.evaluation.systems import budget_systems, constraint_systems
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.rollouts.generators.interface import Answer, Failure, GeneratedText, Prompt, PromptRequest
from lenvm_lightning.rollouts.generators.local import LocalGenerator

PROMPT = Prompt("q", [{"role": "user", "content": "Ann has 3 pens and buys 2. How many pens does she have?"}])
TOKENIZER = load_processor("tiny-text")


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_a_rival_by_its_name():
    assert Rival.parse("countdown:50") == Rival("countdown", 50)
    assert Rival.parse("tilt:-5") is None
    for name in ("countdown", "feedback:x", "feedback:0"):
        with pytest.raises(
            EvaluationError, match=r"known: base, base\+min-p, countdown:N.* takes a limit of at least 1"
        ):
            budget_systems([name])
    [system] = budget_systems(["feedback:40"])
    assert not system.guided
    with pytest.raises(EvaluationError, match=r"'countdown:5'"):  # LIFEBench says the length in its prompt
        constraint_systems(["countdown:5"])


def test_the_question_says_the_limit_and_the_text_is_read_without_numbers():
    asked = Rival("countdown", 12).prompt(PROMPT).messages[-1]["content"]
    assert asked.startswith(PROMPT.messages[-1]["content"])
    assert "<12>First <11>second" in asked
    written = GeneratedText("<3>The <2>answer <1>5 <0>", [1, 2, 3], "stop", -1.0, 7)
    assert Rival("countdown", 3).read(written) == GeneratedText("The answer 5", [1, 2, 3], "stop", -1.0, 7)


class Scripted:
    """Answers with the sentences it was given, and remembers what it had read."""

    name = "scripted"
    tokens_written = 0

    def __init__(self, *sentences):
        self.sentences = list(sentences)
        self.asked = []

    def sample(self, requests, sampling):
        for request in requests:
            self.asked.append((TOKENIZER.decode(list(request.prompt.begun)), sampling.stop))
            ids = self.sentences.pop(0)
            reason = "length" if len(ids) >= sampling.max_tokens else "stop"
            seed = completion_seed(sampling.seed, request.prompt.prompt_id, 0)
            yield Answer(request.prompt.prompt_id, 0, GeneratedText("", ids[: sampling.max_tokens], reason, None, seed))


END = TOKENIZER.eos_token_id


def test_after_each_sentence_the_model_reads_what_it_has_used():
    one, two = ids_of("She has 5 pens."), ids_of(" The answer is 5.")
    generator = Scripted([*one, *ids_of(" The")], [*two, END])
    [answer] = WithFeedback(generator, TOKENIZER).sample([PromptRequest(PROMPT, (4,))], SamplingParams(max_tokens=99))
    assert (answer.prompt_id, answer.number) == ("q", 4)
    assert answer.result.token_ids == [*one, *two, END]  # the word that had begun is written again; what is told is not
    assert answer.result.text == TOKENIZER.decode([*one, *two])
    assert answer.result.finish_reason == "stop"
    assert [read for read, _ in generator.asked] == [
        "",
        TOKENIZER.decode(ids_of(f"She has 5 pens.<used_tokens={len(one)}>")),
    ]
    assert all(". " in stop for _, stop in generator.asked)


def test_the_limit_on_tokens_counts_all_sentences():
    one = ids_of("She has 5 pens.\n")
    generator = Scripted(one, one, one)
    limit = 2 * len(one) - 1
    [answer] = WithFeedback(generator, TOKENIZER).sample(
        [PromptRequest(PROMPT, (0,))], SamplingParams(max_tokens=limit)
    )
    assert answer.result.token_ids == [*one, *one][:limit]
    assert answer.result.finish_reason == "length"


def test_a_failure_is_passed_on():
    class Failing(Scripted):
        def sample(self, requests, sampling):
            for request in requests:
                yield Answer(request.prompt.prompt_id, 0, Failure("too long", final=True))

    [answer] = WithFeedback(Failing(), TOKENIZER).sample([PromptRequest(PROMPT, (2,))], SamplingParams())
    assert answer == Answer("q", 2, Failure("too long", final=True))


def test_a_real_generator_goes_on_where_it_was_interrupted():
    generator = LocalGenerator.load("tiny-text")
    sampling = SamplingParams(max_tokens=60, temperature=0.0)
    [whole] = generator.sample([PromptRequest(PROMPT, (0,))], sampling)
    begun = tuple(whole.result.token_ids[:5])
    begun_prompt = Prompt("q", PROMPT.messages, begun=begun)
    [rest] = generator.sample([PromptRequest(begun_prompt, (0,))], sampling)
    assert [*begun, *rest.result.token_ids] == whole.result.token_ids


def test_both_are_measured_beside_the_others(tmp_path, capsys):
    words = "--task gsm8k --limit 3 --n 1 --max-tokens 80 --systems base countdown:20 feedback:60 --out"
    assert evaluate([*words.split(), str(tmp_path / "results")]) == 0
    report = capsys.readouterr().out
    assert "| countdown:20 |" in report
    assert "| feedback:60" in report
    lines = (tmp_path / "results" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    assert {sample["system"] for sample in samples} == {"base", "countdown:20", "feedback:60"}
    assert all(len(sample["token_ids"]) == sample["tokens"] <= 80 for sample in samples)


def test_a_server_cannot_be_told(capsys):
    words = "--task gsm8k --data tiny --generator http://localhost:9 --systems feedback:60"
    assert evaluate(words.split()) == 2
    assert "feedback:60: a server cannot be told something in the middle of an answer" in capsys.readouterr().err
