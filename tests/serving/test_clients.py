"""Clients that people have: lm-evaluation-harness, LangChain and curl, each as it is installed, against the server."""

import json
import shutil
import subprocess

import pytest
import torch

from lenvm_lightning.models.embedded import folder

QUESTION = "Ann has 3 pens and buys 4 more. How many pens does she have?"
CONTINUATIONS = [" She has 7 pens.", " Bob", " \\boxed{7}"]


def test_lm_evaluation_harness_gets_log_likelihoods_and_texts(tiny_server):
    pytest.importorskip("lm_eval", reason="needs the extra `harness`")
    pytest.importorskip("tenacity", reason="needs lm_eval[api]")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    client = LocalCompletionsAPI(
        base_url=f"{tiny_server.url}/v1/completions",
        model="tiny-text",
        tokenizer=str(folder("tiny-text")),
        tokenizer_backend="huggingface",
        num_concurrent=1,
        max_retries=1,
    )
    asked = [Instance("loglikelihood", {}, (QUESTION, text), k, ("t", k, 1)) for k, text in enumerate(CONTINUATIONS)]
    found = client.loglikelihood(asked, disable_tqdm=True)
    model, tokenizer = tiny_server.service.generator.model, tiny_server.service.tokenizer
    for (told, is_greedy), text in zip(found, CONTINUATIONS, strict=True):
        begun = tokenizer(QUESTION)["input_ids"]
        ids = tokenizer(QUESTION + text)["input_ids"]
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        own = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[len(begun) - 1 :]
        assert told == pytest.approx(float(own.sum()), abs=1e-3)
        assert is_greedy == bool((own[:, 0] == logprobs[len(begun) - 1 :].amax(-1)).all())
    settings = {"until": ["."], "max_gen_toks": 30, "temperature": 0}
    [text] = client.generate_until(
        [Instance("generate_until", {}, (QUESTION, settings), 0, ("t", 0, 1))], disable_tqdm=True
    )
    body = {"prompt": QUESTION, "max_tokens": 30, "temperature": 0, "stop": "."}
    assert text == tiny_server.ask("/v1/completions", body)[2]["choices"][0]["text"]


def test_langchain(tiny_server):
    openai = pytest.importorskip("langchain_openai", reason="pip install langchain-openai")
    model = openai.ChatOpenAI(
        model="tiny-text",
        base_url=f"{tiny_server.url}/v1",
        api_key="none",
        seed=5,
        extra_body={"lenvm": "equal-to:30"},
        stream_usage=True,
    )
    answer = model.invoke("Write a text about the sea.")
    assert 27 <= answer.usage_metadata["output_tokens"] <= 31
    pieces = list(model.stream("Write a text about the sea."))
    assert "".join(piece.content for piece in pieces) == answer.content
    assert len(model.batch(["Write a text about rain.", "Write a text about ships."])) == 2


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(tiny_server):
    body = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "lenvm": "at-most:20", "stream": True})
    command = ["curl", "-sN", f"{tiny_server.url}/v1/chat/completions", "-H", "content-type: application/json"]
    said = subprocess.run([*command, "-d", body], capture_output=True, text=True, check=True, timeout=60).stdout
    events = [line.removeprefix("data: ") for line in said.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert all(json.loads(event)["object"] == "chat.completion.chunk" for event in events[:-1])
