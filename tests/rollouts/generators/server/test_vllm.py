"""A real vLLM, in an environment of its own: ``LENVM_VLLM=PYTHON LENVM_REAL_MODELS=DIR pytest -m vllm``.

PYTHON is the interpreter of that environment, DIR holds ``smollm2-135m``.
"""

import json
import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lenvm_lightning.cli.main import main

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def model():
    folder = Path(os.environ.get("LENVM_REAL_MODELS", "")) / "smollm2-135m"
    if not os.environ.get("LENVM_VLLM") or not (folder / "config.json").is_file():
        pytest.skip("$LENVM_VLLM names no interpreter, or $LENVM_REAL_MODELS no folder with smollm2-135m")
    return folder


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    """A server that takes seeds; with chunked prefill, its CPU build dies of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log"
    command = [os.environ["LENVM_VLLM"], "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--max-model-len", "2048", "--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        for _ in range(300):
            if process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                    yield f"http://127.0.0.1:{port}"
                    return
            except OSError:
                time.sleep(1)
        pytest.fail(f"vLLM did not start:\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}")
    finally:
        process.terminate()
        process.wait(30)


def sampled(address, folder, *options):
    prompts = folder.parent / "prompts.jsonl"
    rows = [{"prompt_id": str(n), "messages": [{"role": "user", "content": f"What is {n} plus 2?"}]} for n in range(3)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["sample", "--generator", address, "--prompts", str(prompts), "-n", "2", "--max-tokens", "24"]
    assert main([*words, "--out", str(folder), *options]) == 0
    lines = (folder / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    return {(row["prompt_id"], row["number"]): row for row in map(json.loads, lines)}


@torch.inference_mode()
def test_ids_and_log_probabilities_are_those_of_the_model(address, model, tmp_path):
    rows = sampled(address, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(model)
    ours = AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16").eval()
    assert len(rows) == 6
    for row in rows.values():
        ids = row["token_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["completion"]
        assert (row["finish_reason"] == "stop") == (ids[-1] == tokenizer.eos_token_id)
        prompt = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_tensors="pt")
        whole = ours(input_ids=_appended(prompt["input_ids"], ids)).logits[0].float().log_softmax(-1)
        start = prompt["input_ids"].shape[1] - 1
        expected = sum(float(whole[start + place, token]) for place, token in enumerate(ids))
        assert row["logprob"] == pytest.approx(expected, abs=0.05 * len(ids))


def _appended(prompt, ids):
    return prompt.new_tensor([[*prompt[0].tolist(), *ids]])


def test_seeds_are_sent_and_the_rest_goes_without(address, tmp_path):
    with_seeds = sampled(address, tmp_path / "seeds")
    assert all(isinstance(row["sampling"]["seed"], int) for row in with_seeds.values())
    without = sampled(address, tmp_path / "none", "--options", "{seeds: false}")
    assert all(row["sampling"]["seed"] is None for row in without.values())
