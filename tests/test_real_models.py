"""The method on pretrained weights that nobody here made: ``LENVM_REAL_MODELS=DIR pytest -m real``.

DIR holds model directories by the names below, each as ``save_pretrained`` writes it.
"""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from pairs import GAMMA, largest_difference
from transformers import AutoModelForCausalLM, AutoTokenizer

from lenvm_lightning.cli.main import main
from lenvm_lightning.decoding.generate import generate
from lenvm_lightning.guidance import EqualTo
from lenvm_lightning.models.lenvm_config import LenVMConfig
from lenvm_lightning.models.value_model import LengthValueModel
from lenvm_lightning.pipeline.recipe import recipes_folder

pytestmark = pytest.mark.real

NAMES = ("smollm2-135m", "qwen-coder-0.5b")
RECIPES = {
    "smollm2-135m": "smollm2-135m",
    "qwen2.5-coder-0.5b": "qwen-coder-0.5b",
    "qwen2.5-coder-1.5b": "qwen-coder-1.5b",
}
QUESTIONS = [
    "Say hello.",
    "Tell me in one sentence why the sea is salty, and in another one why rivers are not.",
    "What is 7 times 8?",
]


def folder_of(name: str) -> Path:
    root = os.environ.get("LENVM_REAL_MODELS")
    folder = Path(root or ".") / name
    if not root or not (folder / "config.json").is_file():
        pytest.skip(f"$LENVM_REAL_MODELS names no folder that holds {name}")
    return folder


@pytest.fixture(scope="module", params=NAMES)
def folder(request):
    return folder_of(request.param)


@pytest.fixture(scope="module")
def prompts(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]


def pair(folder, dtype, apart=30.0):
    """The model, and a value model of its first layers with a random head whose predictions lie far apart."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    torch.manual_seed(0)
    config = LenVMConfig(gamma=GAMMA)
    lenvm = LengthValueModel.from_backbone(folder, config, keep_layers=4, dtype=dtype, expected_length=60.0).eval()
    lenvm.v_head.summary.weight.data.mul_(apart)
    return model, lenvm


@pytest.mark.parametrize(
    ("dtype", "apart", "tolerance"),
    # What bfloat16 rounds in the hidden states, a random head makes as large as itself.
    [(torch.float32, 30.0, 1e-5), (torch.bfloat16, 3.0, 0.05)],
)
def test_guided_values_are_those_of_full_recomputation(folder, prompts, dtype, apart, tolerance):
    model, lenvm = pair(folder, dtype, apart)
    written = generate(model, lenvm, prompts, control=EqualTo(12), top_k=15, max_tokens=16, seed=1, trace=True)
    assert sum(len(step.candidates) > 1 for completion in written for step in completion.trace) > 10
    end = model.generation_config.eos_token_id
    assert largest_difference(lenvm, prompts, written, end=end) < tolerance


def test_batched_is_alone_in_single_precision(folder, prompts):
    model, lenvm = pair(folder, torch.float32)
    settings = {"control": EqualTo(12), "top_k": 15, "max_tokens": 16}
    together = generate(model, lenvm, prompts, seed=[1, 2, 3], **settings)
    for number, prompt in enumerate(prompts):
        [alone] = generate(model, lenvm, [prompt], seed=number + 1, **settings)
        assert alone.token_ids == together[number].token_ids
        assert alone.logprob == pytest.approx(together[number].logprob, abs=1e-3)


def test_batched_is_alone_in_bfloat16_but_for_rounding(folder, prompts):
    """The first token is chosen by the same logits, but for what bfloat16 rounds."""
    model, _ = pair(folder, torch.bfloat16)
    together = generate(model, None, prompts, temperature=0.0, max_tokens=1)
    for number, prompt in enumerate(prompts):
        [alone] = generate(model, None, [prompt], temperature=0.0, max_tokens=1)
        assert alone.logprob == pytest.approx(together[number].logprob, abs=0.1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_goes_through(recipe, tmp_path, monkeypatch):
    """Every stage of a recipe that names a hub id, on its directory; as little as there can be of each."""
    folder = folder_of(RECIPES[recipe])
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt_id": f"{split}{number}", "messages": [{"role": "user", "content": question}], "split": split}
        for split in ("train", "test")
        for number, question in enumerate(QUESTIONS)
    ]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = yaml.safe_load((recipes_folder() / f"{recipe}.yaml").read_text(encoding="utf-8"))
    settings["evaluate"] = [{"task": "length", "data": "prompts.jsonl", "n": 2, "max_tokens": 160}]  # no hub here
    Path(f"{recipe}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    words = [f"{recipe}.yaml", "--generator", str(folder), "--sample.prompts", "prompts.jsonl", "--sample.n", "2"]
    words += ["--sample.max_tokens", "160", "--fit.trainer.max_steps", "1"]
    if recipe == "qwen2.5-coder-1.5b":
        words += ["--fit.model.backbone", str(folder_of("qwen-coder-0.5b"))]

    assert main(["run", *words]) == 0
    results = json.loads(Path("runs", recipe, "results.json").read_text(encoding="utf-8"))
    assert results
    lenvm = LengthValueModel.from_pretrained(Path("runs", recipe, "model"))
    assert lenvm.remaining(lenvm(torch.tensor([[1, 2, 3]]))).isfinite().all()
