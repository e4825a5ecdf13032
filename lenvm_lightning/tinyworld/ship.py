"""Turns a trained length value model of the tiny world into the folder that is shipped.

python -m lenvm_lightning.tinyworld.ship runs/text_lenvm/model tiny-text-lenvm
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lenvm_lightning.models.value_head_io import CONFIG_FILE, HEAD_FILE
from lenvm_lightning.tinyworld import VALUE_MODELS, path

WEIGHTS = "model.safetensors"


def ship(source: Path, name: str, folder: Path | None = None) -> Path:
    """Write the shipped folder: weights in float16, half the size, which load as float32; the head as it is.

    Args:
        source: model directory of a run.
        name: one of `VALUE_MODELS`.
        folder: where to, by default where `path` finds it.
    """
    folder = folder or path(name)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: tensor.to(torch.float16) for key, tensor in load_file(source / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    for kept in ("config.json", CONFIG_FILE, HEAD_FILE):
        shutil.copyfile(source / kept, folder / kept)
    for file in path(VALUE_MODELS[name]).iterdir():  # the tokenizer of its generator
        if file.name not in (WEIGHTS, "config.json"):
            shutil.copyfile(file, folder / file.name)
    return folder


if __name__ == "__main__":
    print(ship(Path(sys.argv[1]), sys.argv[2]))
