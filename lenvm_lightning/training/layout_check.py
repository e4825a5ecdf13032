"""Whether a model computes batches of a layout as it computes padded rows: asked before training, on a few rows."""

from collections.abc import Sequence

import torch

from ..batch import Layout, LengthBatch
from ..errors import RecipeError
from ..models.value_model import LengthValueModel
from ..tree import attention_kinds
from .batch_layouts import compute, row_logits
from .layout_plan import Way, attention_of, make_plan, sharing_ways, skips_what_is_masked

# Largest root mean square difference from plain rows, in standard deviations of their logits. Kernels that add up in
# another order stay far below it, and a token that sees what it should not is far above.
_LARGEST = 1e-3
_LARGEST_IN_HALF_PRECISION = 0.05


def check_layout(model: LengthValueModel, plain: LengthBatch, laid_out: LengthBatch) -> None:
    """Compare the ways that training and validation can take with plain rows, on a few of them.

    Args:
        model: put into eval mode, so that nothing is dropped.
        plain: rows without a layout.
        laid_out: the same rows, with one.

    Raises:
        RecipeError: the model gives other values in this layout, or cannot compute it.
    """
    layout = laid_out["layout"]
    # 1. What the model is may rule the layout out.
    training_ways: list[Way] = sharing_ways(model, training=True) if layout.kind == "shared" else [layout.kind]
    reason = _unsupported_because(model, layout, training_ways)
    # 2. Else every way is computed; validation may take the cache where training cannot.
    model.eval()
    if reason is None:
        every_way: list[Way] = sharing_ways(model, training=False) if layout.kind == "shared" else [layout.kind]
        for way in every_way:
            reason = _fails_because(model, plain, laid_out, way) or reason
    if reason is not None:
        raise RecipeError(
            f"data.layout: {layout.kind} cannot be used with {type(model.backbone).__name__}: {reason}. "
            "Set data.layout: rows"
        )


def _unsupported_because(model: LengthValueModel, layout: Layout, ways: Sequence[Way]) -> str | None:
    """Why a layout cannot work, told by what the model is."""
    if getattr(model.backbone, "_is_stateful", False):
        return "its layers hand a state from token to token, which no mask stops"
    if layout.kind == "packed" and not model.takes_positions:
        return "it takes no positions, which have to start over with every row"
    if not ways:
        kinds = ", ".join(attention_kinds(model.backbone.config.get_text_config()))
        return (
            "gradient_checkpointing drops the cache, and a tree needs attn_implementation: sdpa or eager, a model that "
            f"takes positions, and attention over whole sequences, windows or chunks (found {attention_of(model)}, "
            f"{kinds})"
        )
    return None


def _fails_because(model: LengthValueModel, plain: LengthBatch, laid_out: LengthBatch, way: Way) -> str | None:
    """Why a way cannot be taken, told by computing a few rows in it."""
    computes_exactly = model.backbone.dtype in (torch.float32, torch.float64)
    if torch.is_autocast_enabled(plain["input_ids"].device.type):
        computes_exactly = False
    largest = _LARGEST if computes_exactly else _LARGEST_IN_HALF_PRECISION
    try:
        difference = _difference(model, plain, laid_out, way)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a family does that works otherwise
        first_line = str(error).partition("\n")[0]
        return f"by way of {way}, a few rows ended in {type(error).__name__}: {first_line}"
    if difference <= largest:  # False for NaN
        return None
    return f"by way of {way}, logits of a few rows differ from padded rows by {difference:.2g} of their spread"


@torch.no_grad()
def _difference(model: LengthValueModel, plain: LengthBatch, laid_out: LengthBatch, way: Way) -> float:
    """Root mean square difference of logits, in standard deviations of theirs; NaN where there is none."""
    plan = make_plan(laid_out["layout"], [way], ordered=bool(laid_out["vision"]), flat=skips_what_is_masked(model))
    mask = plain["attention_mask"].bool()
    expected = row_logits(model, plain)[mask].double()
    found = compute(model, laid_out, plan)[..., 0][mask].double()
    return float((found - expected).square().mean().sqrt() / expected.std())
