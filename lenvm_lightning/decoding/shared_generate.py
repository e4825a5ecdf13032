"""``custom_generate`` of transformers: a model directory that guides by itself, wherever this package is installed.

A directory with ``custom_generate/generate.py`` changes what ``generate`` does, for whoever says `trust_remote_code`:

    model.generate(**inputs, custom_generate="DIR", trust_remote_code=True, control="equal-to:96")

Where DIR holds the generator, too, with its length value model in ``DIR/lenvm``, that is its ``generate`` from the
start, and ``transformers serve DIR --trust-remote-code`` guides: requests name a control in their
``generation_config``.
"""

import copy
import json
import weakref
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel, StoppingCriteriaList, StopStringCriteria

from ..errors import GenerationError
from ..models.dtypes import open_value_model
from ..models.processors import tokenizer_of
from ..models.value_model import LengthValueModel
from .control_text import parse_control
from .transformers_hook import guided

INSIDE = "lenvm"
"""Folder of the length value model in a directory that holds its generator."""
_SETTING = "control"  # of a generation configuration: JSON may hold more than transformers knows
_FILE = '''"""Length control through transformers' own `generate`; needs `pip install lenvm-lightning`."""

from lenvm_lightning.decoding.shared_generate import generate_under_control

SOURCE = {source}  # of the length value model, where it does not lie beside the generator


def generate(model, **arguments):
    """`model.generate(..., control="equal-to:96")`; without a control, what `generate` always does."""
    return generate_under_control(model, SOURCE, **arguments)
'''
_opened: "weakref.WeakKeyDictionary[PreTrainedModel, dict[str, LengthValueModel]]" = weakref.WeakKeyDictionary()


def write_custom_generate(folder: Path, source: str) -> None:
    """Write ``custom_generate/generate.py`` into a model directory.

    Args:
        folder: the directory.
        source: of the length value model, a directory or a hub id, where the generator has none beside it.
    """
    place = folder / "custom_generate"
    place.mkdir()
    (place / "generate.py").write_text(_FILE.format(source=json.dumps(source)), encoding="utf-8")


def generate_under_control(model: PreTrainedModel, source: str, *, control: Any = None, **arguments: Any) -> Any:
    """What ``generate.py`` of such a directory does.

    Args:
        model: the generator.
        source: see `write_custom_generate`.
        control: of the length, as text or as a control; where None, that of ``generation_config``.
        arguments: of ``generate``.

    Raises:
        GenerationError: a control that is none, or what `guided` refuses.
        CheckpointError: the length value model is not where it was.
    """
    arguments = {name: value for name, value in arguments.items() if value is not None}
    config = arguments.get("generation_config")
    if control is None and config is not None:
        control = getattr(config, _SETTING, None)
    if isinstance(control, str):
        control = parse_control(control)
    if control is None:
        return GenerationMixin.generate(model, **arguments)
    tokenizer = tokenizer_of(arguments.get("tokenizer"))
    way = guided(_lenvm_of(model, source), control, arguments.get("streamer"), tokenizer)
    return GenerationMixin.generate(model, custom_generate=way, **_with_stops(arguments))


def _with_stops(arguments: dict[str, Any]) -> dict[str, Any]:
    """``stop_strings`` as a criterion, for transformers loses their tokenizer on the way to a custom method.

    Raises:
        GenerationError: there is no tokenizer.
    """
    config = arguments.get("generation_config")
    stops = arguments.get("stop_strings") or (config.stop_strings if config is not None else None)
    if not stops:
        return arguments
    if "tokenizer" not in arguments:
        raise GenerationError("stop_strings need the tokenizer: give tokenizer=...")
    stopping = StopStringCriteria(tokenizer_of(arguments["tokenizer"]), stops)
    others = {name: value for name, value in arguments.items() if name != "stop_strings"}
    if config is not None:
        others["generation_config"] = config = copy.deepcopy(config)
        config.stop_strings = None
    return {**others, "stopping_criteria": StoppingCriteriaList([*arguments.get("stopping_criteria", ()), stopping])}


def _lenvm_of(model: PreTrainedModel, source: str) -> LengthValueModel:
    """The length value model of a generator, opened once: where it was, or beside a generator that was moved."""
    by_source = _opened.setdefault(model, {})
    if source not in by_source:
        beside = Path(model.config.name_or_path or "") / INSIDE
        where = str(beside) if beside.is_dir() and not Path(source).is_dir() else source
        with torch.random.fork_rng():  # weights are drawn before they are loaded; the first text is as any other
            by_source[source] = open_value_model(where, gamma=None, dtype=None, device=model.device)
    return by_source[source]
