"""A small generator with random weights, questions for it, and recipes and commands that ask it."""

import json
import shutil
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from lenvm_lightning import tinyworld

SAMPLE = {"generator": "small", "prompts": "q.jsonl", "n": 3, "max_tokens": 12}
COMMAND = ["sample", "--generator", "small", "--prompts", "q.jsonl", "-n", "3", "--max-tokens", "12", "--out", "out"]


def save_small(folder: Path) -> Path:
    """The shape of tiny-text with random weights, but that an end comes once in about ten tokens."""
    shutil.copytree(tinyworld.path("tiny-text"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # the first column of the hidden states is the same everywhere: the head has a bias there
        model.get_input_embeddings().weight[:, 0] = 3.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[config.eos_token_id, 0] = 0.35
    model.save_pretrained(folder)
    return folder


def lay_out(folder: Path, model: Path) -> None:
    """The generator and six questions in a folder, by the names that `SAMPLE` and `COMMAND` give them."""
    (folder / "small").symlink_to(model)
    questions = [
        {"prompt_id": f"q{i}", "messages": [{"role": "user", "content": f"{i} + {i} ="}], "meta": {"answer": 2 * i}}
        for i in range(6)
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))


def recipe(folder: Path, **stages) -> str:
    """Write a recipe of these stages."""
    (folder / "r.yaml").write_text(yaml.safe_dump(stages, sort_keys=False))
    return "r.yaml"


def records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.open()]
