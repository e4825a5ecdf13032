"""Batches computed without doing anything twice: packed rows, and prompts shared by their completions.

Everything around sees rows: only how the logits (B, T) come about differs, and they are the same, gradients included.

**Packed.** Rows one after the other in bins, with positions that start over; transformers makes the block-diagonal
masks of sdpa and eager attention from them, and flash attention, which skips what is masked, gets one long bin.

**Shared.** Completions of one prompt compute it, and its pictures, once. Two ways, chosen for each batch by what they
cost:

- *cache*: the prompts run once, with gradients; their keys and values are gathered for the rows, and the completions
  run on top of them. Cheap masks, but recomputing activations drops caches.
- *tree*: prompt and completions one after the other under a mask, each completion seeing the prompt and itself. No
  padding between completions, but attention over them costs their whole length squared.

Where neither gains anything, rows are computed as rows.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from ..batch import Layout, LengthBatch
from ..errors import RecipeError
from ..models.backbone import cache_argument, token_types
from ..models.value_model import LengthValueModel
from ..tree import KINDS, attention_kinds, forest_mask
from .fsdp import is_in_step
from .packing import cost, pack, width_of

Way = Literal["rows", "cache", "tree", "packed"]
_MASKED = ("sdpa", "eager")  # attention that takes the masks of a tree
_WORTH_IT = 0.97  # of the cost of a plainer way, or less
_LARGEST, _LARGEST_HALF = 1e-3, 0.05  # difference from plain rows, in spreads of their logits; in half precision


class Plan(NamedTuple):
    """How a batch is computed.

    Attributes:
        way: how.
        bins: what lies in each row of the forward: numbers of prompts for ``tree``, of rows for ``packed``.
        computed: positions that the backbone runs over, padding included.
        real: tokens among them.
    """

    way: Way
    bins: list[list[int]]
    computed: int
    real: int


# -- planning: numbers only -------------------------------------------------------------------------------------------


def make_plan(layout: Layout, ways: Sequence[Way], ordered: bool = False, flat: bool = False) -> Plan:
    """The cheapest way to compute a batch, by `cost`; one named earlier where it hardly costs more.

    Args:
        layout: of the batch.
        ways: those that are possible, at least one.
        ordered: True = in a tree every prompt has a row of the forward to itself, in order, as pictures need it.
        flat: True = packed rows go into one bin, for attention that skips what is masked.
    """
    groups = members(layout)
    completions = [length - prompt for length, prompt in zip(layout.lengths, layout.prompt_lengths, strict=True)]
    prompts = [layout.prompt_lengths[rows[0]] for rows in groups]
    trees = [prompt + sum(completions[row] for row in rows) for prompt, rows in zip(prompts, groups, strict=True)]
    best: tuple[float, Plan] | None = None
    for way in ways:
        bins: list[list[int]] = []
        if way == "cache":
            before, after = max(prompts), max(completions)
            tokens = len(prompts) * before + len(completions) * after
            pairs = len(prompts) * before**2 + len(completions) * after * (before + after)
        else:
            sizes = trees if way == "tree" else layout.lengths
            if way == "rows" or (way == "tree" and ordered):
                bins = [[number] for number in range(len(sizes))]
            else:
                bins = [list(range(len(sizes)))] if flat else pack(sizes)
            width = width_of(bins, sizes)
            tokens, pairs = len(bins) * width, len(bins) * width**2
        plan = Plan(way, bins, tokens, sum(trees if way in ("cache", "tree") else layout.lengths))
        if best is None or cost(tokens, pairs) < _WORTH_IT * best[0]:
            best = cost(tokens, pairs), plan
    assert best is not None
    return best[1]


def members(layout: Layout) -> list[list[int]]:
    """Rows of each prompt."""
    groups: list[list[int]] = [[] for _ in range(max(layout.prompts) + 1)]
    for row, prompt in enumerate(layout.prompts):
        groups[prompt].append(row)
    return groups


def possible_ways(model: LengthValueModel, layout: Layout, pictures: bool, training: bool) -> list[Way]:
    """Ways to compute batches of a layout with a model, the plainest first; empty where there is none.

    Args:
        model: its attention and its layers decide.
        layout: of the batch.
        pictures: whether there are any, given once for each prompt.
        training: whether activations may have to be computed again.
    """
    if layout.kind != "shared":
        return [layout.kind]
    if len(set(layout.prompts)) == len(layout.prompts):
        return ["rows"]  # nothing to share
    ways: list[Way] = [] if pictures else ["rows"]
    return ways + sharing_ways(model, training)


def sharing_ways(model: LengthValueModel, training: bool) -> list[Way]:
    """Ways to compute a prompt once that the model's kind of attention allows."""
    config = model.backbone.config.get_text_config()
    made_here = config._attn_implementation in _MASKED and set(attention_kinds(config)) <= set(KINDS)
    ways: list[Way] = ["tree"] if made_here and model.takes_positions else []
    # A cache takes two passes; ranks that share out weights or gradients must make as many as each other.
    return ways if (training and recomputes(model)) or is_in_step(model) else [*ways, "cache"]


def recomputes(model: LengthValueModel) -> bool:
    """Whether the language model computes activations again in the backward pass, which drops caches."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.backbone.get_decoder().modules())


def plan_batch(model: LengthValueModel, batch: LengthBatch) -> Plan:
    """How `row_logits` computes a batch that has a layout; the same whenever it is asked."""
    layout, pictures = batch["layout"], bool(batch["vision"])
    ways = possible_ways(model, layout, pictures, model.backbone.training)
    return make_plan(layout, ways, ordered=pictures, flat=_skips_masked(model))


def _skips_masked(model: LengthValueModel) -> bool:
    """Whether attention costs only what is seen, and takes packed rows in one bin only."""
    return "flash" in model.backbone.config.get_text_config()._attn_implementation


# -- computing --------------------------------------------------------------------------------------------------------


def row_logits(model: LengthValueModel, batch: LengthBatch) -> Tensor:
    """Logits of the rows of a batch, computed in its layout.

    Returns:
        Shape (B, T), float32 or better. Without a layout as the model gives them; with one, 0 at padding.
    """
    layout = batch.get("layout")
    if layout is None or layout.kind == "rows":
        return _as_rows(model, batch)
    return compute(model, batch, plan_batch(model, batch))


def compute(model: LengthValueModel, batch: LengthBatch, plan: Plan) -> Tensor:
    """Logits of the rows of a batch, computed as planned. Shape (B, T), 0 at padding."""
    ids, layout = batch["input_ids"], batch["layout"]
    if plan.way == "rows":
        logits, places = _as_rows(model, batch), None
    elif plan.way == "cache":
        logits, places = _on_cache(model, ids, layout, batch["vision"])
    else:
        logits, places = _in_bins(model, ids, layout, batch["vision"], plan)
    if places is not None:
        logits = logits.take(torch.from_numpy(places).to(ids.device))
    return torch.where(batch["attention_mask"].bool(), logits, 0.0)


def _as_rows(model: LengthValueModel, batch: LengthBatch) -> Tensor:
    """Padded rows. Padding is on the right, where causal attention does not look: without a mask, kernels skip half."""
    mask = batch["attention_mask"] if _skips_masked(model) else None
    return model(batch["input_ids"], mask, **batch["vision"])


def _on_cache(
    model: LengthValueModel, ids: Tensor, layout: Layout, vision: dict[str, Any]
) -> tuple[Tensor, np.ndarray]:
    """Prompts, padded on the left, and completions on top of them.

    Returns:
        Logits of all positions, flat; and where the rows' tokens are among them, shape (B, T).
    """
    width, device = ids.shape[1], ids.device
    lengths, prompt_lengths, prompts = (np.asarray(column)[:, None] for column in layout[1:])  # (B, 1)
    rows = np.arange(len(lengths))[:, None]
    first = np.asarray([group[0] for group in members(layout)])
    before, after = int(prompt_lengths.max()), int((lengths - prompt_lengths).max())

    # Filler is the last token of a completion: never that of a picture.
    start = before - prompt_lengths[first]  # (G, 1)
    column = np.arange(before)
    sources = first[:, None] * width + np.where(column >= start, column - start, lengths[first] - 1)
    column = prompt_lengths + np.arange(after)  # (B, after)
    sources_after = rows * width + np.minimum(column, lengths - 1)
    column_of_rows = np.arange(width)
    places = np.where(
        column_of_rows < prompt_lengths,
        prompts * before + column_of_rows + (before - prompt_lengths),
        len(first) * before + rows * after + (column_of_rows - prompt_lengths),
    )
    places = np.where(column_of_rows < lengths, places, 0)

    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    mask = on_device((np.arange(before) >= start).astype(np.int64))
    mask_after = on_device((column < lengths).astype(np.int64))
    cache, name, group = DynamicCache(), cache_argument(model.backbone), on_device(prompts[:, 0])
    shared = model(ids.take(on_device(sources)), mask, **{name: cache}, **vision)
    _gather(cache, group)
    own = model(ids.take(on_device(sources_after)), torch.cat([mask[group], mask_after], 1), **{name: cache})
    return torch.cat([shared.flatten(), own.flatten()]), places


def _gather(cache: Any, group: Tensor) -> None:
    """Give every row the keys and values of its prompt, and the positions that its pictures took."""
    for layer in cache.layers:  # the cache's own way of doing it has a backward pass that is 7 times slower
        layer.keys, layer.values = layer.keys.index_select(0, group), layer.values.index_select(0, group)
    if getattr(cache, "lenvm_offset", None) is not None:  # a picture takes fewer positions than tokens
        cache.lenvm_offset = cache.lenvm_offset[group]


class _Bins(NamedTuple):
    """Tokens in bins, all (K, W) but the last: where they come from, what they belong to, and the way back (B, T)."""

    sources: np.ndarray
    tree: np.ndarray
    branch: np.ndarray
    depth: np.ndarray
    places: np.ndarray


def _fill(layout: Layout, bins: list[list[int]], groups: list[list[int]], trunks: Sequence[int], total: int) -> _Bins:
    """Lay out trees.

    Args:
        layout: of the batch.
        bins: numbers of the trees in each bin.
        groups: rows of each tree.
        trunks: tokens at the beginning of each tree that its rows share.
        total: width T of the rows.
    """
    sizes = [
        trunk + sum(layout.lengths[row] - trunk for row in rows) for trunk, rows in zip(trunks, groups, strict=True)
    ]
    shape = (len(bins), width_of(bins, sizes))
    sources = np.full(shape, layout.lengths[0] - 1)  # filler: the last token of a completion, never that of a picture
    tree, branch, depth = np.full(shape, -1), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    places = np.zeros((len(layout.lengths), total), np.int64)
    for number, filled in enumerate(bins):
        at = 0
        for each in filled:
            trunk, rows = trunks[each], groups[each]
            tree[number, at : at + sizes[each]] = each
            own = np.arange(trunk)
            sources[number, at : at + trunk], depth[number, at : at + trunk] = rows[0] * total + own, own
            places[rows, :trunk] = number * shape[1] + at + own
            at += trunk
            for twig, row in enumerate(rows, start=1):
                own = np.arange(trunk, layout.lengths[row])
                part = slice(at, at + len(own))
                sources[number, part], depth[number, part], branch[number, part] = row * total + own, own, twig
                places[row, own] = number * shape[1] + at + np.arange(len(own))
                at += len(own)
        # Filler starts over as one more row does. Where no bin holds two trees it counts on: nothing real sees what
        # comes later, and sdpa then needs no mask.
        depth[number, at:] = np.arange(shape[1] - at) + (at if len(bins) == len(sizes) else 0)
    return _Bins(sources, tree, branch, depth, places)


def _in_bins(
    model: LengthValueModel, ids: Tensor, layout: Layout, vision: dict[str, Any], plan: Plan
) -> tuple[Tensor, np.ndarray]:
    """Trees, or whole rows, one after the other; returns what `_on_cache` does."""
    config = model.backbone.config.get_text_config()
    if plan.way == "packed":
        filled = _fill(layout, plan.bins, [[row] for row in range(len(layout.lengths))], layout.lengths, ids.shape[1])
    else:
        groups = members(layout)
        trunks = [layout.prompt_lengths[rows[0]] for rows in groups]
        filled = _fill(layout, plan.bins, groups, trunks, ids.shape[1])
    sources, tree, branch, depth = (torch.from_numpy(array).to(ids.device, non_blocking=True) for array in filled[:4])
    rope = next((module for module in model.backbone.modules() if hasattr(module, "rope_deltas")), None)
    if plan.way == "packed":
        mask, positions = None, depth if rope is None else depth.expand(4, *depth.shape)  # the first axis is for masks
    else:
        masks = {kind: forest_mask(tree, branch, depth, kind, config) for kind in attention_kinds(config)}
        if config._attn_implementation == "eager":  # adds masks to scores, bools too
            masks = {kind: torch.zeros_like(m, dtype=model.backbone.dtype).masked_fill_(~m, -torch.inf)
                     for kind, m in masks.items()}  # fmt: skip
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        positions = depth
        if rope is not None and vision:
            positions = _picture_positions(model, rope, ids, layout, vision, branch, depth)
    logits = model(ids.take(sources), mask, position_ids=positions, **vision)
    return logits.flatten(), filled.places


def _picture_positions(
    model: LengthValueModel,
    rope: Any,
    ids: Tensor,
    layout: Layout,
    vision: dict[str, Any],
    branch: Tensor,
    depth: Tensor,
) -> Tensor:
    """Positions in time, height and width, one tree a row: as the model counts its prompt, and on from there.

    Shape (3, K, W).
    """
    first = [rows[0] for rows in members(layout)]
    lengths = torch.tensor([layout.prompt_lengths[row] for row in first], device=ids.device)
    width = max(layout.prompt_lengths[row] for row in first)
    prompts = ids[first, :width]
    mask = (torch.arange(width, device=ids.device) < lengths[:, None]).long()
    types = token_types(model.backbone.config, prompts) * mask
    grids = {name: vision[name] for name in inspect.signature(rope.get_rope_index).parameters if name in vision}
    counted, offset = rope.get_rope_index(prompts, mm_token_type_ids=types, attention_mask=mask, **grids)
    positions = (depth + offset).expand(3, *depth.shape).clone()
    positions[:, :, :width] = torch.where(mask.bool(), counted, positions[:, :, :width])
    return positions


# -- before training --------------------------------------------------------------------------------------------------


def try_out(model: LengthValueModel, plain: LengthBatch, laid_out: LengthBatch) -> None:
    """Compare the ways that training and validation can take with plain rows, on a few of them.

    Args:
        model: put into eval mode, so that nothing is dropped.
        plain: rows without a layout.
        laid_out: the same rows, with one.

    Raises:
        RecipeError: the model gives other values in this layout, or cannot compute it.
    """
    layout = laid_out["layout"]
    ways = sharing_ways(model, training=True) if layout.kind == "shared" else [layout.kind]
    reason = _never(model, layout, ways)
    model.eval()
    exact = model.backbone.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(
        plain["input_ids"].device.type
    )
    if layout.kind == "shared":
        ways = sharing_ways(model, training=False)  # validation may take the cache where training cannot
    for way in ways if reason is None else ():
        try:
            apart = _difference(model, plain, laid_out, way)
            if not apart <= (_LARGEST if exact else _LARGEST_HALF):
                reason = f"by way of {way}, logits of a few rows differ from padded rows by {apart:.2g} of their spread"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a family does that works otherwise
            reason = f"by way of {way}, a few rows ended in {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if reason is not None:
        raise RecipeError(f"data.layout: {layout.kind} cannot be used with {type(model.backbone).__name__}: {reason}. "
                          "Set data.layout: rows")  # fmt: skip


def _never(model: LengthValueModel, layout: Layout, ways: Sequence[Way]) -> str | None:
    """Why a layout cannot work, told by what the model is."""
    config = model.backbone.config.get_text_config()
    if getattr(model.backbone, "_is_stateful", False):
        return "its layers hand a state from token to token, which no mask stops"
    if layout.kind == "packed" and not model.takes_positions:
        return "it takes no positions, which have to start over with every row"
    if not ways:
        return (
            "gradient_checkpointing drops the cache, and a tree needs attn_implementation: sdpa or eager, a model that "
            f"takes positions, and attention over whole sequences, windows or chunks (found "
            f"{config._attn_implementation}, {', '.join(attention_kinds(config))})"
        )
    return None


@torch.no_grad()
def _difference(model: LengthValueModel, plain: LengthBatch, laid_out: LengthBatch, way: Way) -> float:
    """Root mean square difference of logits, in standard deviations of theirs; NaN where there is none."""
    plan = make_plan(laid_out["layout"], [way], ordered=bool(laid_out["vision"]), flat=_skips_masked(model))
    mask = plain["attention_mask"].bool()
    theirs = row_logits(model, plain)[mask].double()
    ours = compute(model, laid_out, plan)[mask].double()
    return float((ours - theirs).square().mean().sqrt() / theirs.std())
