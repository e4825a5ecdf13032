"""The tiny world: a laboratory inside the package, of small real architectures and text and pictures made here.

`tiny-text` (Qwen2) and `tiny-vl` (Qwen2.5-VL) are ordinary Hugging Face folders without weights, written by
`python -m lenvm_lightning.tinyworld.build`. `rollouts.write_rollouts` writes generated answers to go with them.
"""

from pathlib import Path

NAMES = ("tiny-text", "tiny-vl")
NOTICE = "tiny world: a laboratory that this package made itself, not a benchmark"


def path(name: str) -> Path:
    """Return the folder of the tiny model `name`, one of `NAMES`."""
    if name not in NAMES:
        raise ValueError(f"no tiny model is called {name!r}; there are {', '.join(NAMES)}")
    return Path(__file__).parent / name
