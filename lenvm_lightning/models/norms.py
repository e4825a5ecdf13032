"""Tells copies of one model by the weights of its norms, whatever its directory is called."""

import hashlib
from pathlib import Path

import torch

from ..errors import CheckpointError
from .hub_files import read_tensors


def norms_of(folder: Path) -> str | None:
    """Digest of the norms in a model directory, at bfloat16; None where there are none or its files are damaged.

    Quantised files (GGUF, bitsandbytes, GPTQ) leave norms as they are, so a copy that went through four bits has the
    digest of the original, and a model of the same shape that was trained otherwise has not. Adapters merged into a
    model (LoRA) leave its norms too: such a model cannot be told from its base by this.
    """
    found = hashlib.blake2b(digest_size=12)
    try:
        norms = sorted(read_tensors(folder, lambda key: key.endswith("norm.weight")))
    except CheckpointError:  # whoever loads the model says it better
        return None
    for key, tensor in norms:
        found.update(key.encode() + tensor.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return found.hexdigest() if norms else None
