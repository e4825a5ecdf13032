"""What a value model directory holds beside its backbone: the heads and `lenvm_config.json`, read and written.

A published LenVM is an ordinary Hugging Face directory with the head either in `value_head.safetensors` or among its
shards. Nothing is guessed: a directory without a complete head is an error. A distributional head has a file of its
own, which the research code does not look for.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..utils.reading import read_json_object
from .hub_files import Source, find_file, quiet_transformers, read_tensors, tensors_of_file

CONFIG_FILE = "lenvm_config.json"
HEAD_FILE = "value_head.safetensors"
LENGTH_HEAD_FILE = "length_head.safetensors"
HEAD_KEYS = ("fc.weight", "fc.bias", "summary.weight", "summary.bias")
_HEAD_PREFIX = "v_head."


def _head_key(key: str) -> str | None:
    """Name inside the head of a checkpoint key: with prefix `…v_head.`, or bare."""
    for name in HEAD_KEYS:
        if key == name or key.endswith(_HEAD_PREFIX + name):
            return name
    return None


def _is_head_key(key: str) -> bool:
    return _head_key(key) is not None


def read_head(source: Source) -> dict[str, Tensor]:
    """State dict of the value head, from its own file or from the shards, in float32.

    Raises:
        CheckpointError: there is no complete head.
    """
    path = find_file(source, HEAD_FILE)
    found = read_tensors(source, _is_head_key) if path is None else tensors_of_file(path, _is_head_key)
    head = {name: tensor for key, tensor in found if (name := _head_key(key))}
    absent = [key for key in HEAD_KEYS if key not in head]
    if absent:
        there = f"found only {', '.join(sorted(head))}" if head else "found none of them"
        raise CheckpointError(
            f"{str(source)!r} has no value head (looked for {', '.join(_HEAD_PREFIX + k for k in HEAD_KEYS)} in "
            f"{HEAD_FILE} and in the model's safetensors shards; {there}). It looks like a base model. "
            f"Train a length value model on it:\n  lightning run text_lenvm --fit.model.backbone {source}"
        )
    return {key: tensor.float() if tensor.dtype != torch.float64 else tensor for key, tensor in head.items()}


def check_head(head: dict[str, Tensor], expected: dict[str, Tensor], source: Source) -> None:
    """Compare a head's shapes with the backbone's width.

    Raises:
        CheckpointError: they differ; all differences are listed.
    """
    wrong = [
        f"{key} is {tuple(head[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in HEAD_KEYS
        if head[key].shape != expected[key].shape
    ]
    if wrong:
        raise CheckpointError(
            f"the value head of {str(source)!r} does not fit its backbone: {'; '.join(wrong)}. "
            "Head and backbone come from different models: copy the head file that was trained with this backbone."
        )


def read_length_head(source: Source, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of the distributional head, in float32.

    Args:
        source: directory or hub id.
        expected: state dict of a head that fits.

    Raises:
        CheckpointError: it is missing or of another shape.
    """
    path = find_file(source, LENGTH_HEAD_FILE)
    found = dict(tensors_of_file(path, expected.__contains__)) if path else {}
    shapes = {key: tuple(tensor.shape) for key, tensor in expected.items()}
    if {key: tuple(tensor.shape) for key, tensor in found.items()} != shapes:
        raise CheckpointError(
            f"{str(source)!r} has a distributional head by its {CONFIG_FILE}, but "
            f"{LENGTH_HEAD_FILE} {'does not fit it' if path else 'is missing'} (expected {shapes}). Copy the file that "
            f"was saved with it, or remove length_head from {CONFIG_FILE} to use the value alone."
        )
    return {key: tensor.float() if tensor.dtype != torch.float64 else tensor for key, tensor in found.items()}


def read_lenvm_config(source: Source) -> dict[str, Any]:
    """Content of `lenvm_config.json`; empty for published directories, which have none."""
    path = find_file(source, CONFIG_FILE)
    return read_json_object(path) if path else {}


@contextlib.contextmanager
def writing_value_model(
    folder: Path,
    head: dict[str, Tensor],
    length_head: dict[str, Tensor] | None,
    config: dict[str, Any],
    processor: Any,
) -> Iterator[None]:
    """Write what every value model directory has, around what its backbone writes.

    Heads and config come last, so that half a directory is no LenVM.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (HEAD_FILE, LENGTH_HEAD_FILE, CONFIG_FILE):
        (folder / name).unlink(missing_ok=True)
    yield
    if processor is not None:
        with quiet_transformers():
            processor.save_pretrained(folder)
    _save({_HEAD_PREFIX + key: tensor for key, tensor in head.items()}, folder / HEAD_FILE)
    if length_head is not None:
        _save(length_head, folder / LENGTH_HEAD_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    held = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(held, path, metadata={"format": "pt"})
