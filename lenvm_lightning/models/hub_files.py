"""Files of a model directory or hub repository: found, read, and what is wrong with them said in a sentence."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from ..errors import CheckpointError
from . import embedded

Source = str | os.PathLike[str]


def resolve(source: Source) -> str:
    """Path of an embedded model for its name; anything else as it is."""
    return str(embedded.folder(str(source))) if embedded.is_embedded(str(source)) else str(source)


def find_file(source: Source, name: str) -> Path | None:
    """Local path of a file of a model directory or hub repository; None where it has none."""
    try:
        found = cached_file(resolve(source), name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise CheckpointError(f"{name} of {str(source)!r} could not be looked for: {first_line(error)}") from error
    return Path(found) if found else None


def first_line(error: Exception) -> str:
    """What an error of another library says first, as a sentence."""
    return str(error).partition("\n")[0].rstrip(".") + "."


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file.

    Raises:
        CheckpointError: it is broken, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # broken JSON, or no text at all
        raise CheckpointError(f"{path} is not valid JSON: {error}. Save or download the model again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object, found {type(content).__name__}. Save or download the model again."
        )
    return content


def some(texts: list[str]) -> str:
    """The first of many, for errors."""
    return ", ".join(texts[:5]) + (", …" if len(texts) > 5 else "")


def read_tensors(source: Source, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a model's shards whose key ``wanted`` accepts, without reading the others."""
    index = find_file(source, "model.safetensors.index.json")
    if index is None:
        names = ["model.safetensors"]
    else:
        names = sorted({shard for key, shard in read_json(index)["weight_map"].items() if wanted(key)})
    for name in names:
        shard = find_file(source, name)
        if shard is not None:
            yield from tensors_of_file(shard, wanted)
        elif index is not None:
            raise CheckpointError(f"{index} lists {name}, but {str(source)!r} has no such file. Download it again.")


def tensors_of_file(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a safetensors file whose key ``wanted`` accepts.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (a safe_open handle is no dict)
                if wanted(key):
                    yield key, file.get_tensor(key)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}. Save or download it again.") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' bars and its report of unused keys; those that are missing raise. Downloads still show."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    hook = transformers_logging.set_tqdm_hook(lambda factory, args, kwargs: factory(*args, **kwargs, disable=True))
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(hook)
        transformers_logging.set_verbosity(level)
