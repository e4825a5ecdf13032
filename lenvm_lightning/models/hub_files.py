"""Files of a model directory or hub repository: found, read, and what is wrong with them said in a sentence."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from ..errors import CheckpointError
from ..utils.names import is_plain_name
from ..utils.reading import first_line, in_a_sentence, read_json_object
from . import embedded

Source = str | os.PathLike[str]


def resolve(source: Source) -> str:
    """Path of an embedded model for its name; anything else as it is."""
    return str(embedded.folder(str(source))) if embedded.is_embedded(str(source)) else str(source)


def find_file(source: Source, name: str) -> Path | None:
    """Local path of a file of a model directory or hub repository; None where it has none."""
    try:
        found = cached_file(resolve(source), name, _raise_exceptions_for_missing_entries=False)
    except Exception as error:  # of the hub's client, which takes a wrong name for many things
        raise CheckpointError(f"{name} of {str(source)!r} could not be looked for: {first_line(error)}") from error
    return Path(found) if found else None


def must_be_trusted(source: Source, what: str) -> CheckpointError:
    """The error for a model whose code would have to be run, where nobody allowed it.

    Args:
        source: of the model.
        what: of code it comes with, such as "modelling code".
    """
    return CheckpointError(
        f"{str(source)!r} comes with {what} of its own: look at that code and, if it may run here, say so: "
        "fit.model.backbone.trust_remote_code: true in a recipe, --options '{trust_remote_code: true}' of a "
        "generator, --trust-remote-code of lenvm export, trust_remote_code=True in Python"
    )


def asks_for_trust(error: Exception, source: Source, files: tuple[str, ...]) -> bool:
    """Whether an error of transformers comes from not running code that comes with a model.

    Args:
        error: that it raised. It says so, unless it went on to look for something else.
        source: of the model.
        files: of it that may name code.
    """
    if "trust_remote_code" in str(error):
        return True
    try:
        found = [file for name in files if (file := find_file(source, name)) is not None]
        return any("auto_map" in read_json_object(file) for file in found)
    except CheckpointError:  # a file that cannot be read names none
        return False


def some(texts: list[str]) -> str:
    """The first of many, for errors."""
    return ", ".join(texts[:5]) + (", …" if len(texts) > 5 else "")


def shard_names(index: Path) -> dict[str, str]:
    """Which file of its folder each weight of a model is in, by the index of the shards.

    Raises:
        CheckpointError: it is broken, or names a file elsewhere.
    """
    listed = read_json_object(index).get("weight_map")
    if isinstance(listed, dict) and all(isinstance(name, str) and is_plain_name(name) for name in listed.values()):
        return listed
    raise CheckpointError(
        f"{index} must say under weight_map in which file of its folder each weight is. Save or download the model "
        "again."
    )


def read_tensors(source: Source, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a model's shards whose key `wanted` accepts, without reading the others.

    Raises:
        CheckpointError: a file is damaged or missing.
    """
    index = find_file(source, "model.safetensors.index.json")
    if index is None:
        names = ["model.safetensors"]
    else:
        names = sorted({shard for key, shard in shard_names(index).items() if wanted(key)})
    for name in names:
        shard = find_file(source, name)
        if shard is not None:
            yield from tensors_of_file(shard, wanted)
        elif index is not None:
            raise CheckpointError(f"{index} lists {name}, but {str(source)!r} has no such file. Download it again.")


def tensors_of_file(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a safetensors file whose key `wanted` accepts.

    Raises:
        CheckpointError: the file is damaged.
    """
    with in_a_sentence(f"{path} is damaged", advice="Save or download it again."), safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (a safe_open handle is no dict)
            if wanted(key):
                yield key, file.get_tensor(key)


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
