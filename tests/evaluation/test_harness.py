"""lm-evaluation-harness on the embedded pair: its tasks, its settings, its command."""

import json
import sys
from functools import partial

import pytest
import torch

pytest.importorskip("lm_eval.models.huggingface", reason="needs the extra `harness`")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.errors import GenerationError
from lenvm_lightning.evaluation.harness import LenVMHarness, main, read_settings
from lenvm_lightning.guidance import Tilt
from lenvm_lightning.rollouts.generators.interface import PromptRequest
from lenvm_lightning.tinyworld.prompt_sets import check, prompt_set

LIMIT = 300
STORIES = """
task: stories
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {folder}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["<|never|>"], max_gen_toks: {limit}, do_sample: false}}
filter_list:
  - name: boxed
    filter:
      - {{function: regex, regex_pattern: '\\\\boxed\\{{([^{{}}]*)\\}}', group_select: -1}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {folder}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{right}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc}}
"""


@pytest.fixture(scope="module")
def stories():
    return prompt_set("tiny-math", "test", 8)


@pytest.fixture(scope="module")
def tasks(stories, tmp_path_factory):
    """A folder of tasks: the stories, and solutions of which one ends in the right number."""
    folder = tmp_path_factory.mktemp("tasks")
    rows, choices = [], []
    for story in stories:
        answer = int(story.meta["answer"])
        rows.append({"question": story.messages[0]["content"], "answer": str(answer)})
        choices.append(rows[-1] | {"choices": [f"\\boxed{{{answer + k}}}" for k in (7, 0, 1)], "right": 1})
    for name, text, content in (("stories", STORIES, rows), ("choices", CHOICES, choices)):
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, content)), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(
            text.format(data=data, folder=folder / "cache", limit=LIMIT), encoding="utf-8"
        )
    return folder


@pytest.fixture(scope="module")
def plain():
    return LenVMHarness("tiny-text")


def evaluate(tasks, name, model, **settings):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(
        model, tasks=[name], task_manager=manager, apply_chat_template=True, bootstrap_iters=0, **settings
    )


def texts(results, name="stories"):
    return [sample["resps"][0][0] for sample in results["samples"][name]]


def ask(model, *contexts, **settings):
    requests = [Instance("generate_until", {}, (context, settings), 0) for context in contexts]
    return model.generate_until(requests, disable_tqdm=True)


def chat(model, story):
    return model.apply_chat_template(story.messages)


@pytest.fixture(scope="module")
def unguided(tasks, plain):
    return evaluate(tasks, "stories", plain)


def test_without_a_control_it_writes_what_the_generator_writes(unguided, stories, plain):
    requests = [PromptRequest(story, (0,)) for story in stories]
    answers = plain.generator.sample(requests, SamplingParams(temperature=0.0, max_tokens=LIMIT))
    ours = {answer.prompt_id: answer.result for answer in answers}
    assert texts(unguided) == [ours[story.prompt_id].text for story in stories]
    right = [check(story.meta, ours[story.prompt_id].text, 0) for story in stories]
    assert unguided["results"]["stories"]["exact_match,boxed"] == sum(right) / len(right) > 0.5
    lengths = [len(result.token_ids) for result in ours.values()]
    config = unguided["config"]
    assert (config["completions"], config["control"], config["gamma"]) == (len(stories), "None", None)
    assert config["mean_completion_tokens"] == pytest.approx(sum(lengths) / len(lengths))


def test_with_a_control_it_writes_less_and_stays_right(tasks, unguided):
    arguments = "generator=tiny-text,lenvm=tiny-text-lenvm,control=tilt:-10"
    guided = evaluate(tasks, "stories", "lenvm", model_args=arguments)
    assert guided["config"]["control"] == "Tilt(beta=-10.0)"
    assert guided["config"]["gamma"] == 0.99
    assert guided["config"]["mean_completion_tokens"] < 0.8 * unguided["config"]["mean_completion_tokens"]
    assert guided["results"]["stories"]["exact_match,boxed"] >= 0.75
    assert texts(guided) != texts(unguided)


def test_lengths_are_met(stories):
    model = LenVMHarness("tiny-text", control="equal-to:96")  # the embedded length value model is found
    ask(model, *(chat(model, story) for story in stories), max_gen_toks=200)
    assert all(abs(length - 96) <= 12 for length in model.written)
    with pytest.raises(GenerationError, match=r"EqualTo.*max_tokens=64 contradict each other"):
        ask(model, chat(model, stories[0]), max_gen_toks=64)


def test_requests_end_behind_their_own_strings_and_limits(plain, stories):
    first, second = (chat(plain, story) for story in stories[:2])
    whole = ask(plain, first, second, max_gen_toks=LIMIT)
    plain.written.clear()
    own = [(first, {"until": ["", ". "]}), (second, {"until": "never", "max_gen_toks": 5})]
    truncated_before = plain.truncated
    short = plain.generate_until([Instance("generate_until", {}, one, 0) for one in own], disable_tqdm=True)
    assert short[0] == whole[0].split(". ")[0] != whole[0]
    assert whole[1].startswith(short[1])
    assert 5 in plain.written
    assert max(plain.written) < len(plain.tok_encode(whole[0])) / 2
    assert plain.truncated == truncated_before + 1


def test_sampling_is_what_the_task_says_and_repeats_differ(plain, stories):
    context = chat(plain, stories[2])
    settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": LIMIT}
    drawn = ask(plain, context, context, context, context, **settings)
    assert len(set(drawn)) > 1
    assert drawn == ask(plain, context, context, context, context, **settings)
    assert len(set(ask(plain, context, context, **settings, top_k=1))) == 1
    assert ask(plain) == []


def test_long_prompts_lose_their_beginning(plain, stories):
    context = chat(plain, stories[0])
    room = plain.max_length - 32
    assert plain._prompt("one two " * room + context, 32) == plain.tok_encode("one two " * room + context)[-room:]
    with pytest.raises(GenerationError, match="leaves no room for a prompt"):
        plain._prompt(context, plain.max_length)


def test_given_texts_are_scored_by_the_base_model(tasks, plain):
    found = evaluate(tasks, "choices", LenVMHarness("tiny-text", control="tilt:-1000", batch_size=4))
    samples = found["samples"]["choices"]
    best = []
    for sample in samples:
        scores = []
        for request, [(scored, _)] in zip(sample["arguments"], sample["resps"], strict=True):
            context, ids = (plain.tok_encode(text) for text in (request[0], request[0] + request[1]))
            with torch.inference_mode():
                logprobs = plain.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            wanted = range(len(context), len(ids))
            scores.append(sum(float(logprobs[place - 1, ids[place]]) for place in wanted))
            assert scored == pytest.approx(scores[-1], abs=1e-3)
        best.append(max(range(3), key=scores.__getitem__) == 1)
    assert found["results"]["choices"]["acc,none"] == pytest.approx(sum(best) / len(best))


def test_whole_texts_are_scored(plain):
    text = "Olivia has 9 stickers."
    [scored] = plain.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    ids = [plain.prefix_token_id, *plain.tok_encode(text)]
    with torch.inference_mode():
        logprobs = plain.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert scored == pytest.approx(sum(float(logprobs[i, ids[i + 1]]) for i in range(len(ids) - 1)), abs=1e-3)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"until": [], "max_tokens": 256, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"until": "\n", "max_new_tokens": 9}, {"until": ["\n"], "max_tokens": 9}),
        ({"do_sample": True, "top_k": -1, "top_p": 0.9, "min_p": 0.01, "num_beams": 1}, {"top_k": 0, "top_p": 0.9}),
    ],
)
def test_settings_of_a_task(given, expected):
    assert read_settings(given, 256, None).items() >= expected.items()


def test_under_a_control_few_tokens_are_candidates():
    assert read_settings({}, 256, Tilt(-5)).items() >= {"top_k": 15, "top_p": 0.999}.items()
    assert read_settings({"top_k": 5, "top_p": 0.9}, 256, Tilt(-5)).items() >= {"top_k": 5, "top_p": 0.9}.items()


def test_settings_that_mean_nothing_here_are_refused():
    with pytest.raises(GenerationError, match=r"num_beams=4 has no meaning here \(known: do_sample"):
        read_settings({"num_beams": 4}, 256, None)
    with pytest.raises(GenerationError, match="temprature=1 has no meaning here; did you mean 'temperature'"):
        read_settings({"temprature": 1}, 256, None)


def test_a_control_without_a_length_value_model(tmp_path, plain):
    plain.model.save_pretrained(tmp_path)
    plain.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(GenerationError, match=r"a control needs lenvm=.*lenvm sample"):
        LenVMHarness(str(tmp_path), control="tilt:-5")


@pytest.fixture
def command(tasks, monkeypatch):
    """Runs lm-eval's command line, which looks for no tasks but ours: to read its own 10,000 takes seconds."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))

    def run(*arguments):
        words = ["run", "--model", "lenvm", "--tasks", str(tasks / "stories.yaml"), "--apply_chat_template"]
        monkeypatch.setattr(sys, "argv", ["lm-eval", *words, *arguments])
        return main()

    return run


def test_the_command(command, tmp_path, capsys):
    arguments = ["--model_args", "generator=tiny-text,control=at-most:64", "--gen_kwargs", "max_gen_toks=200"]
    assert command(*arguments, "--output_path", str(tmp_path)) == 0
    assert "lenvm ({'generator': 'tiny-text', 'control': 'at-most:64'})" in capsys.readouterr().out
    [written] = tmp_path.rglob("results_*.json")
    found = json.loads(written.read_text())
    assert found["config"]["control"].startswith("AtMost(n=64")
    assert found["config"]["mean_completion_tokens"] < 70
    assert found["results"]["stories"]["exact_match,boxed"] > 0.5


def test_mistakes_in_the_command_are_told_without_a_traceback(command, capsys):
    assert command("--model_args", "generator=tiny-text,control=tlt:-5") == 2
    assert "GenerationError: control 'tlt:-5' is none; did you mean 'tilt'?" in capsys.readouterr().err
    assert command("--model_args", "generator=no-such") == 2
    assert "GeneratorError: " in capsys.readouterr().err
