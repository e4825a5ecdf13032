"""Generators as they lie on disk: the whole model with its vocabulary head, and what identifies it."""

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import cached_file

from ....errors import CheckpointError, GenerationError, GeneratorError, nearest
from ....models import embedded
from ....models.backbone import load_config
from ....models.dtypes import own_dtype, usual_dtype
from ....models.hub_files import quiet_transformers, resolve, shard_names
from ....models.processors import load_processor, tokenizer_of

DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")
_WHOLE = 2**30  # bytes of weights up to which all of them are digested
_FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja", "chat_template.json", "value_head.safetensors", "lenvm_config.json",
    "adapter_config.json", "length_head.safetensors",
)  # fmt: skip


def load_model(
    source: str, *, dtype: str | None = None, device: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a text model, or a vision-language one, with its vocabulary head.

    Args:
        source: embedded name, directory or hub id.
        dtype: of the weights; where None, see `models.dtypes.usual_dtype`.
        device: ``cuda``, ``cpu``, …; where None, a GPU if there is one.
        trust_remote_code: run modelling code that comes with the checkpoint.

    Returns:
        The model, in eval mode.

    Raises:
        GeneratorError: an unknown dtype or device, no such model, or weights that are missing or do not fit.
    """
    target = place_for(device, dtype)
    try:
        config = load_config(source, trust_remote_code=trust_remote_code)
    except CheckpointError as error:
        raise GeneratorError(str(error)) from error
    auto: Any = AutoModelForImageTextToText if _sees(config) else AutoModelForCausalLM
    try:
        with quiet_transformers():
            model, info = auto.from_pretrained(
                resolve(source),
                config=config,
                dtype=dtype or _usual_dtype(source, config, target),
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # listed below
                trust_remote_code=trust_remote_code,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise GeneratorError(_no_weights(source, error)) from error
    wrong = [f"{key} is not there" for key in sorted(info["missing_keys"])]
    wrong += [f"{key} is {tuple(have)}, expected {tuple(want)}" for key, have, want in sorted(info["mismatched_keys"])]
    if wrong:
        raise GeneratorError(
            f"{len(wrong)} weights of {type(model).__name__} are missing from {source!r} or do not fit its config: "
            f"{', '.join(wrong[:5])}{', …' if len(wrong) > 5 else ''}. A generator needs all of them, its vocabulary "
            "head too (a length value model has none): save or download it again, or name another one."
        )
    try:
        return model.eval().to(target)
    except torch.OutOfMemoryError as error:
        size = sum(weight.nbytes for weight in model.parameters()) / 2**30
        raise GeneratorError(
            f"{source!r} does not fit on {target}: its weights alone take {size:.1f} GiB. Use a smaller dtype or "
            "model, or serve it on several GPUs and give the server's http:// address."
        ) from error


def _usual_dtype(source: str, config: PreTrainedConfig, device: torch.device) -> str:
    dtype, own = usual_dtype(config, device), own_dtype(config)
    if dtype == "float32" and own in (torch.bfloat16, torch.float16):
        name = str(own).removeprefix("torch.")
        warnings.warn(
            f"{name_of(source)} is computed in float32: this processor is slow at {name}",
            stacklevel=3,
        )
    return dtype


def _sees(config: PreTrainedConfig) -> bool:
    """Whether a model takes images."""
    remote = getattr(config, "auto_map", None) or {}
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or "AutoModelForImageTextToText" in remote


def _no_weights(source: str, error: Exception) -> str:
    first = str(error).partition("\n")[0].rstrip(".")
    return (
        f"no generator could be loaded from {source!r} (looked for config.json and safetensors weights): {first}. "
        f"Give a Hugging Face id (needs the hub), a directory written by save_pretrained, an embedded name "
        f"({', '.join(embedded.generators())}), or the http:// address of a server."
    )


def place_for(name: str | None, dtype: str | None = None) -> torch.device:
    """The device called so; where None, a GPU if there is one.

    Raises:
        GeneratorError: there is none, or no such dtype.
    """
    if dtype is not None and dtype not in DTYPES:
        raise GeneratorError(f"unknown dtype {dtype!r}{nearest(dtype, DTYPES)} (known: {', '.join(DTYPES)})")
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).partition("\n")[0]
        raise GeneratorError(f"there is no device {name!r} here: {first}. Leave the device out, or use cpu.") from error
    return device


def name_of(source: str) -> str:
    """How records call a generator: a directory by its last part, anything else as it was given."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def digest(source: str) -> str:
    """SHA-256 of what decides a model's answers: config, tokenizer and weights, the same wherever they lie.

    Of more than 1 GiB of weights, the names, shapes and sizes.
    """
    seen = hashlib.sha256()
    for name in _FILES:
        file = _file(source, name)
        if file is not None:
            seen.update(f"\n{name}\n".encode())
            seen.update(file.read_bytes())
    weights = _weight_files(source)
    whole = sum(file.stat().st_size for file in weights) <= _WHOLE
    for file in weights:
        seen.update(f"\n{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            if not whole:  # a safetensors file starts with the length of its header
                seen.update(content.read(int.from_bytes(content.read(8), "little")))
                continue
            while block := content.read(2**22):
                seen.update(block)
    return seen.hexdigest()


def _weight_files(source: str) -> list[Path]:
    index = _file(source, "model.safetensors.index.json")
    names = ["model.safetensors", "adapter_model.safetensors"]
    if index is not None:
        names = sorted(set(shard_names(index).values()))
    return [file for name in names if (file := _file(source, name)) is not None]


def _file(source: str, name: str) -> Path | None:
    """A file of a model directory or of the hub's cache; None where the model has none."""
    folder = Path(resolve(source))
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None


def require_same_tokens(tokenizer: Any, lenvm: str) -> None:
    """Refuse a length value model of another tokenizer, where its folder has one.

    Args:
        tokenizer: of the generator.
        lenvm: where the length value model is.

    Raises:
        GenerationError: more than a few tokens have other ids.
    """
    try:
        own = tokenizer_of(load_processor(lenvm))
    except CheckpointError:  # it need not have one
        return
    require_same_vocabulary(tokenizer, own, f"--lenvm: {lenvm}")


def require_same_vocabulary(tokenizer: Any, other: Any, whose: str) -> None:
    """Refuse a length value model of another tokenizer.

    Args:
        tokenizer: of the generator.
        other: of the length value model.
        whose: the beginning of the sentence, the length value model's name.

    Raises:
        GenerationError: more than a few tokens have other ids.
    """
    ids, known = tokenizer.get_vocab(), other.get_vocab()
    others = sum(known.get(token) != number for token, number in ids.items())
    if others > 0.01 * len(ids):
        raise GenerationError(
            f"{whose} has another tokenizer than the generator, {others:,} of {len(ids):,} tokens have other "
            "ids there: a length value model serves generators that share its tokenizer"
        )
