"""The tiny world: a laboratory inside the package, of small real architectures and text and images made here.

`tiny-text` (Qwen2) and `tiny-vl` (Qwen2.5-VL) are ordinary Hugging Face folders. `python -m
lenvm_lightning.tinyworld.build` writes tokenizers and configurations; the weights come from the recipes tiny_text and
tiny_vl. Beside each is a length value model of its completions, `tiny-text-lenvm` and `tiny-vl-lenvm`, of the recipes
text_lenvm and vlm_lenvm with more prompts (see `ship`). `prompt_sets` has their prompts with answer checks; `rollouts`
writes scripted answers, without a model.

Importing this package registers its names with `models.embedded` and `rollouts.embedded`, where everything that takes
a name looks; nothing below imports it. Only the facade does, so this file imports nothing heavy.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..models import embedded
from ..models.embedded import EmbeddedModel
from ..rollouts.embedded import RolloutKind, register_prompt_set, register_rollouts

if TYPE_CHECKING:
    from ..rollouts.generators.interface import Prompt

NAMES = ("tiny-text", "tiny-vl")
VALUE_MODELS = {"tiny-text-lenvm": "tiny-text", "tiny-vl-lenvm": "tiny-vl"}  # and the generator of each
PROMPT_SETS = ("tiny-math", "tiny-write", "tiny-vqa", "tiny-think")
NOTICE = "tiny world: a laboratory that this package made itself, not a benchmark"
_SCRIPT = "tinyworld"  # scripted rollouts go by this name, and name their generator with it in front


def path(name: str) -> Path:
    """Return the folder of the tiny model `name`, one of `NAMES` or of `VALUE_MODELS`."""
    if name not in NAMES and name not in VALUE_MODELS:
        raise ValueError(f"no tiny model is called {name!r}; there are {', '.join((*NAMES, *VALUE_MODELS))}")
    return Path(__file__).parent / name


def _make_prompts(name: str, split: str | None, count: int, seed: int) -> "Sequence[Prompt]":
    from .prompt_sets import prompt_set

    return prompt_set(name, split, count, seed)


def _write_rollouts(kind: RolloutKind, folder: Path) -> Path:
    from .rollouts import write_rollouts

    return write_rollouts(kind, folder)


def _register() -> None:
    for name in NAMES:
        embedded.register(EmbeddedModel(name, path(name), NOTICE))
    for name, generator in VALUE_MODELS.items():
        embedded.register(EmbeddedModel(name, path(name), NOTICE, generator))
    embedded.register_script(_SCRIPT, NOTICE)
    for name in PROMPT_SETS:
        register_prompt_set(name, _make_prompts)
    register_rollouts(_SCRIPT, _write_rollouts)


_register()
