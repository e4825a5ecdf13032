"""`adapter_config.json`, PEFT's settings of an adapter, read as far as they are plain LoRA.

PEFT takes this file at its word: names of layers may be regular expressions that match for ever, and some settings name
modules to import. A stranger may have written it, so only what is known here is handed on, and the rest refused.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..utils.reading import in_a_sentence, read_json_object
from ..utils.settings import is_integer, is_number

_ABOUT_TRAINING = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "parent_library", "revision", "inference_mode",
    "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core",
    "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip  # that change nothing in an adapter whose weights are there
_WORD = r"(?:\w|\\[.\-])+"  # a name as `re.escape` writes it
_OUR_PATTERN = re.compile(rf"(?:{_WORD}\\\.)?\(\?:\.\*\\\.\)\?\(\?:{_WORD}(?:\|{_WORD})*\)")
_NAME = re.compile(r"[\w.\-]+")


def target_pattern(prefix: str, names: list[str]) -> str:
    """What PEFT is told to put adapters on: layers with one of these last names, below one module.

    Full names, so that layers of the same name in the vision tower are left alone.
    """
    under = re.escape(prefix) + r"\." if prefix else ""
    return f"{under}(?:.*\\.)?(?:{'|'.join(map(re.escape, names))})"


def read_adapter_config(path: Path) -> Any:
    """PEFT's `LoraConfig` of a file, for adapters that are not to be trained.

    Raises:
        CheckpointError: it is broken, is no LoRA, names no base model, or asks for more than plain LoRA.
    """
    from peft import LoraConfig

    stored = read_json_object(path)
    base = stored.get("base_model_name_or_path")
    if str(stored.get("peft_type")).upper() != "LORA" or not base or not isinstance(base, str):
        raise CheckpointError(
            f"{path} must describe a LoRA adapter and name its base model, found peft_type "
            f"{stored.get('peft_type')!r} and base_model_name_or_path {base!r}"
        )
    known = {name: stored[name] for name in _PLAIN if stored.get(name) is not None}
    problems = [f"{name} must be {_PLAIN[name][1]}, found {value!r}" for name, value in known.items()
                if not _PLAIN[name][0](value)]  # fmt: skip
    problems += [f"{name} is missing" for name in ("r", "target_modules") if name not in known]
    defaults = _defaults(LoraConfig)
    problems += [
        f"{name} is {value!r}, and only plain LoRA is read here"
        for name, value in stored.items()
        if name not in _PLAIN and name not in _ABOUT_TRAINING and value and value != defaults.get(name)
    ]
    if problems:
        raise CheckpointError(f"{path} cannot be used:\n  " + "\n  ".join(problems))
    with in_a_sentence(f"{path} cannot be used", advice="Save or download the model again."):
        return LoraConfig(**known, inference_mode=True)


def _defaults(config_class: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(config_class)}


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _are_targets(value: Any) -> bool:
    """Names of layers. A pattern only where it is one that this package writes: others may match for ever."""
    if isinstance(value, str):
        return _OUR_PATTERN.fullmatch(value) is not None
    return isinstance(value, list) and bool(value) and all(map(_is_name, value))


def _is_rank(value: Any) -> bool:
    return is_integer(value) and value >= 1


def _is_by_layer(value: Any, fits: Any) -> bool:
    """Whether a value is a mapping from names of layers; PEFT would take them for patterns."""
    return isinstance(value, dict) and all(_is_name(name) and fits(one) for name, one in value.items())


_TRUTH = (lambda value: isinstance(value, bool), "true or false")
_PLAIN: dict[str, tuple[Any, str]] = {
    "base_model_name_or_path": (lambda value: isinstance(value, str), "a text"),
    "r": (_is_rank, "a whole number of at least 1"),
    "lora_alpha": (is_number, "a number"),
    "lora_dropout": (lambda value: is_number(value) and 0.0 <= value < 1.0, "a number of at least 0 and below 1"),
    "target_modules": (_are_targets, "a list of names of layers (other patterns could take for ever)"),
    "rank_pattern": (lambda value: _is_by_layer(value, _is_rank), "whole numbers by names of layers"),
    "alpha_pattern": (lambda value: _is_by_layer(value, is_number), "numbers by names of layers"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "fan_in_fan_out": _TRUTH,
    "use_rslora": _TRUTH,
    "use_dora": _TRUTH,
}
"""What is handed on to PEFT: (what it may be, how that is called), by name."""
