"""Fixtures of training."""

from collections.abc import Callable

import pytest
import torch
from layouts import exact, image_rows, layouts_of, random_rows

from lenvm_lightning import LengthValueModel


@pytest.fixture(scope="module")
def laid_out(tiny_vl) -> Callable:
    """A model, and the same rows plain, shared and packed."""
    models = {}

    def laid_out(kind):
        name = "tiny-text-lenvm" if kind == "text" else "tiny-vl-lenvm"
        if name not in models:
            models[name] = exact(LengthValueModel.from_pretrained(name, dtype=torch.float64))
        rows = image_rows(tiny_vl) if kind == "vision" else random_rows()
        processor = tiny_vl.image_processor if kind == "vision" else None
        return models[name], layouts_of(rows, processor)

    return laid_out
