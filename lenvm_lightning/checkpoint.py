"""Model directories: the published layout plus ``lenvm_config.json``, read and written.

A published LenVM is an ordinary Hugging Face directory with the head either in ``value_head.safetensors`` or among
its shards. Nothing is guessed: a directory without a head is an error, and so is a backbone with weights missing.
Only safetensors are read, and remote code runs only where the caller asks for it.
"""

import contextlib
import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from . import tinyworld
from .errors import CheckpointError, nearest

CONFIG_FILE = "lenvm_config.json"
HEAD_FILE = "value_head.safetensors"
HEAD_KEYS = ("fc.weight", "fc.bias", "summary.weight", "summary.bias")
_HEAD_PREFIX = "v_head."
Source = str | os.PathLike[str]


def resolve(source: Source) -> str:
    """Path of an embedded model for its name; anything else as it is."""
    return str(tinyworld.path(str(source))) if str(source) in tinyworld.NAMES else str(source)


def hidden_size(config: PreTrainedConfig) -> int:
    """Width of the last hidden state of the language model, nested configs included."""
    return int(config.get_text_config().hidden_size)


def takes_argument(module: torch.nn.Module, name: str) -> bool:
    """Whether a module's forward names an argument."""
    return name in inspect.signature(module.forward).parameters


def _file(source: Source, name: str) -> Path | None:
    """Local path of a file of a model directory or hub repository; None where it has none."""
    found = cached_file(
        resolve(source),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return Path(found) if found else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}. Save the model again.") from error


def load_config(source: Source, overrides: dict[str, Any] | None = None, **options: Any) -> PreTrainedConfig:
    """The backbone's config, with some entries changed.

    Raises:
        CheckpointError: no such model here or on the hub, or an override that the config does not have.
    """
    try:
        config = AutoConfig.from_pretrained(resolve(source), **options)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no model could be read from {str(source)!r}: {str(error).splitlines()[0]} Give a Hugging Face id (needs "
            f"the hub), a directory with a config.json, or an embedded name ({', '.join(tinyworld.NAMES)})."
        ) from error
    _override(config, overrides or {}, str(source))
    return config


def _override(config: PreTrainedConfig, overrides: dict[str, Any], where: str) -> None:
    for key, value in overrides.items():
        if not hasattr(config, key):
            hint = nearest(key, config.to_dict())
            raise CheckpointError(f"the config of {where} has no entry {key!r}{hint}")
        nested = getattr(config, key)
        if isinstance(nested, PreTrainedConfig) and isinstance(value, dict):
            _override(nested, value, f"{where}.{key}")
        else:
            setattr(config, key, value)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silences the report of unused keys: a vocabulary head is expected to be left over, and missing keys raise."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def load_backbone(
    source: Source,
    *,
    pretrained: bool = True,
    overrides: dict[str, Any] | None = None,
    dtype: torch.dtype | str = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A headless transformers model.

    Args:
        source: hub id, directory or embedded name.
        pretrained: load the weights; False gives random ones of the same shape.
        overrides: entries of the config to change, nested where the config is.
        dtype: of the weights, or ``auto`` for the checkpoint's own.
        attn_implementation: ``sdpa``, ``flash_attention_2``, …; transformers' choice where None.
        trust_remote_code: run modelling code that comes with the checkpoint.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: no such model, an unknown override, overrides of pretrained weights, missing weights.
    """
    if pretrained and overrides:
        raise CheckpointError(
            f"overrides ({', '.join(overrides)}) change the shape that the weights of {str(source)!r} have; "
            "set pretrained: false to start from random weights, or leave the overrides out."
        )
    config = load_config(source, overrides, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    if not pretrained:
        if dtype == "auto":
            options["dtype"] = torch.float32
        elif isinstance(dtype, str):
            options["dtype"] = getattr(torch, dtype)
        return AutoModel.from_config(config, **options).eval()
    try:
        with _quiet_transformers():
            model, info = AutoModel.from_pretrained(
                resolve(source), config=config, use_safetensors=True, output_loading_info=True, **options
            )
    except OSError as error:
        raise CheckpointError(
            f"no weights could be read from {str(source)!r} (looked for safetensors files): "
            f"{str(error).splitlines()[0]}"
        ) from error
    _fill_missing(model, set(info["missing_keys"]), source)
    return model.eval()


def _fill_missing(model: PreTrainedModel, missing: set[str], source: Source) -> None:
    """Takes the input embedding from a tied ``lm_head.weight``; any other missing weight is an error."""
    embedding = model.get_input_embeddings()
    name = next(n for n, module in model.named_modules() if module is embedding) + ".weight"
    if name in missing:
        head = next((tensor for _, tensor in _tensors(source, lambda key: key.endswith("lm_head.weight"))), None)
        if head is not None and head.shape == embedding.weight.shape:
            embedding.weight.data.copy_(head)  # type: ignore[operator]
            missing = missing - {name}
    if missing:
        some = ", ".join(sorted(missing)[:5]) + (", …" if len(missing) > 5 else "")
        raise CheckpointError(
            f"{len(missing)} weights of {type(model).__name__} are not in {str(source)!r}: {some}. "
            "The directory is incomplete or of another architecture; transformers would have filled them at random."
        )


def _tensors(source: Source, wanted: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a model's shards whose key ``wanted`` accepts, without reading the others."""
    index = _file(source, "model.safetensors.index.json")
    if index:
        names = sorted({shard for key, shard in _read_json(index)["weight_map"].items() if wanted(key)})
        shards = [_file(source, name) for name in names]
    else:
        shards = [_file(source, "model.safetensors")]
    for shard in shards:
        if shard is None:
            continue
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (a safe_open handle is no dict)
                if wanted(key):
                    yield key, file.get_tensor(key)


def _head_key(key: str) -> str | None:
    """Name inside the head of a checkpoint key: with prefix ``…v_head.``, or bare."""
    for name in HEAD_KEYS:
        if key == name or key.endswith(_HEAD_PREFIX + name):
            return name
    return None


def read_head(source: Source) -> dict[str, Tensor]:
    """State dict of the value head, from its own file or from the shards, in float32.

    Raises:
        CheckpointError: there is no complete head.
    """
    head: dict[str, Tensor] = {}
    path = _file(source, HEAD_FILE)
    if path is not None:
        with safe_open(path, framework="pt") as file:
            head = {name: file.get_tensor(key) for key in file.keys() if (name := _head_key(key))}  # noqa: SIM118
    else:
        head = {
            name: t for key, t in _tensors(source, lambda key: _head_key(key) is not None) if (name := _head_key(key))
        }
    absent = [key for key in HEAD_KEYS if key not in head]
    if absent:
        found = f"found only {', '.join(sorted(head))}" if head else "found none of them"
        raise CheckpointError(
            f"{str(source)!r} has no value head (looked for {', '.join(_HEAD_PREFIX + k for k in HEAD_KEYS)} in "
            f"{HEAD_FILE} and in the model's safetensors shards; {found}). It looks like a base model. "
            "Train a length value model on it:\n  lightning run text_lenvm --fit.model.backbone "
            f"{source} --fit.model.pretrained true"
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


def read_lenvm_config(source: Source) -> dict[str, Any]:
    """Content of ``lenvm_config.json``; empty for published directories, which have none."""
    path = _file(source, CONFIG_FILE)
    return _read_json(path) if path else {}


def load_processor(source: Source, **options: Any) -> Any:
    """Processor of a vision-language model, or tokenizer of a text model.

    Raises:
        CheckpointError: neither can be read from there.
    """
    try:
        return AutoProcessor.from_pretrained(resolve(source), **options)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no tokenizer or processor could be read from {str(source)!r}: {str(error).splitlines()[0]}"
        ) from error


def save(
    folder: Path, backbone: PreTrainedModel, head: dict[str, Tensor], config: dict[str, Any], processor: Any
) -> None:
    """Write backbone, head, config and processor; the head and our config come last, so half a directory is no LenVM."""
    folder.mkdir(parents=True, exist_ok=True)
    backbone.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    tensors = {_HEAD_PREFIX + key: tensor.detach().cpu().contiguous() for key, tensor in head.items()}
    save_file(tensors, folder / HEAD_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
