"""The tiny world: a laboratory inside the package, of small real architectures and text and pictures made here.

`tiny-text` (Qwen2) and `tiny-vl` (Qwen2.5-VL) are ordinary Hugging Face folders. `python -m
lenvm_lightning.tinyworld.build` writes tokenizers and configurations; the weights come from the recipes tiny_text and
tiny_vl. Beside each is a length value model of its completions, `tiny-text-lenvm` and `tiny-vl-lenvm`, of the recipes
text_lenvm and vlm_lenvm with more prompts (see `ship`). `prompt_sets` has their prompts with answer checks; `rollouts`
writes scripted answers, without a model.
"""

from pathlib import Path

NAMES = ("tiny-text", "tiny-vl")
VALUE_MODELS = {"tiny-text-lenvm": "tiny-text", "tiny-vl-lenvm": "tiny-vl"}  # and the generator of each
NOTICE = "tiny world: a laboratory that this package made itself, not a benchmark"


def path(name: str) -> Path:
    """Return the folder of the tiny model `name`, one of `NAMES` or of `VALUE_MODELS`."""
    if not embedded(name):
        raise ValueError(f"no tiny model is called {name!r}; there are {', '.join((*NAMES, *VALUE_MODELS))}")
    return Path(__file__).parent / name


def embedded(name: str) -> bool:
    """Whether `name` is a model of this package."""
    return name in NAMES or name in VALUE_MODELS


def wrote(generator: str) -> bool:
    """Whether completions of this `generator` (the name in their records) are of the tiny world."""
    return generator in NAMES or generator.startswith("tinyworld")
