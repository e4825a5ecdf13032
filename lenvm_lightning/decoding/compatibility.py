"""Whether a model says in slots what it says on its own: tried once for each model, on tokens that mean nothing.

Most families do, to the last bit. Those that take positions from where keys lie (ALiBi), or have masks of their own,
would be silently wrong.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..errors import GenerationError
from ..models.value_model import LengthValueModel
from .candidate_scorer import Guide
from .model_runner import SlotDecoder

_LARGEST = {torch.float64: 1e-6, torch.float32: 1e-3}  # difference of values, or of distributions; else 0.1
_TOKENS, _CANDIDATES = range(10, 22), (23, 24, 25)
_found: WeakKeyDictionary[nn.Module, tuple[torch.dtype, str | None]] = WeakKeyDictionary()


def open_generator(generator: Any, compiled: bool = False) -> SlotDecoder:
    """Ready to decode in slots.

    Args:
        generator: with a vocabulary head.
        compiled: see `SlotDecoder`. What is tried is the model as it is: to compile for that would
            take as long as for the steps themselves.

    Raises:
        GenerationError: it does not work so.
    """
    return _opened(
        "generator",
        generator,
        lambda model: SlotDecoder(model, compiled),
        lambda _: SlotDecoder(generator).difference(list(_TOKENS), {}),
    )


def open_lenvm(lenvm: LengthValueModel, fewest_rows: int = 1, compiled: bool = False) -> Guide:
    """Ready to score candidates in slots.

    Args:
        lenvm: in eval mode.
        fewest_rows: see `Guide`.
        compiled: see `open_generator`.

    Raises:
        GenerationError: it does not work so.
    """
    return _opened("lenvm", lenvm, lambda model: Guide(model, fewest_rows, compiled), lambda _: _difference(lenvm))


def _opened(who: str, model: Any, build: Any, difference: Any) -> Any:
    dtype = next(model.parameters()).dtype if who == "lenvm" else model.dtype
    try:
        opened = build(model)
        if not model.training and _found.get(model, (None, None))[0] != dtype:
            apart = difference(opened)
            wrong = apart > _LARGEST.get(dtype, 0.1)  # NaN is told where tokens are drawn
            _found[model] = dtype, f"what follows a token differs by {apart:.2g}" if wrong else None
        reason = _found.get(model, (None, None))[1]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a family does that works otherwise
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if reason:
        name = type(model.backbone if who == "lenvm" else model).__name__
        raise GenerationError(f"{who}: {name} cannot be decoded in slots, which guided decoding does: {reason}")
    return opened


@torch.inference_mode()
def _difference(lenvm: LengthValueModel) -> float:
    """Largest one between values of candidates in a tree and those of whole sequences."""
    guide = Guide(lenvm)
    device = lenvm.backbone.device
    ids, tried = torch.tensor([list(_TOKENS)], device=device), torch.tensor([_CANDIDATES], device=device)
    guide.cache.fill([0], guide.decoder.prefill([list(_TOKENS)[:-1]]), [0], len(_TOKENS) - 1)
    after, before = guide.score(ids[:, -1:], tried, torch.zeros_like(tried, dtype=torch.bool))
    whole = lenvm.remaining(lenvm(torch.cat([ids.expand(len(_CANDIDATES), -1), tried.T], 1)))[:, -2:]
    ours = torch.stack([before.expand(len(_CANDIDATES)), after[0]], 1)
    return float((lenvm.gamma ** ours.double() - lenvm.gamma ** whole.double()).abs().max())
