"""CPU threads for small models: one.

Two threads of a model of a million parameters wait for each other longer than they compute, busily; beside other work
on the same cores they are many times slower than one.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

_SMALL = 20_000_000  # parameters


def is_small(model: nn.Module) -> bool:
    """Whether a model lives on the CPU and is so small that one thread computes it fastest."""
    weights = list(model.parameters())
    return (
        bool(weights)
        and all(weight.device.type == "cpu" for weight in weights)
        and sum(w.numel() for w in weights) < _SMALL
    )


@contextlib.contextmanager
def one_thread(if_small: bool = True) -> Iterator[None]:
    """Compute with one thread, and with as many as before afterwards; with False nothing changes."""
    before = torch.get_num_threads()
    if if_small and before > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if if_small and before > 1:
            torch.set_num_threads(before)
