"""Batches computed without doing anything twice: packed rows, and prompts shared by their completions.

Everything around sees rows: only how the logits (B, T) come about differs, and they are the same, gradients included.

1. `layout_plan` chooses the way, by what it costs.
2. `token_places` says where every token of the rows lies in that way, and where its logit is found again.
3. Here the tokens are taken there, run through the model, and the outputs of its heads are brought back.

For packed rows positions start over: transformers makes the block-diagonal masks of sdpa and eager attention from them,
and flash attention, which skips what is masked, gets one long bin.
"""

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from ..batch import Layout, LengthBatch
from ..models.backbone import cache_argument, token_types
from ..models.value_model import LengthValueModel
from ..tree import attention_kinds, packed_trees_mask
from .layout_plan import LayoutPlan, attention_of, plan_batch, rows_of_prompts, skips_what_is_masked
from .token_places import place_in_bins, place_on_cache


def row_logits(model: LengthValueModel, batch: LengthBatch) -> Tensor:
    """Logits of the rows of a batch, computed in its layout.

    Returns:
        Shape (B, T), float32 or better. Without a layout as the model gives them; with one, 0 at padding.
    """
    return row_outputs(model, batch)[..., 0]


def row_outputs(model: LengthValueModel, batch: LengthBatch) -> Tensor:
    """Outputs of all heads, the logit first, computed in the layout of a batch. Shape (B, T, 1 + K)."""
    layout = batch.get("layout")
    if layout is None or layout.kind == "rows":
        return _run_rows(model, batch)
    return compute(model, batch, plan_batch(model, batch))


def compute(model: LengthValueModel, batch: LengthBatch, plan: LayoutPlan) -> Tensor:
    """Outputs of all heads for the rows of a batch, computed as planned. Shape (B, T, 1 + K), 0 at padding."""
    if plan.way == "rows":
        outputs = _run_rows(model, batch)
    elif plan.way == "cache":
        outputs = _run_on_cache(model, batch)
    else:
        outputs = _run_in_bins(model, batch, plan)
    return torch.where(batch["attention_mask"].bool()[..., None], outputs, 0.0)


def _run_rows(model: LengthValueModel, batch: LengthBatch) -> Tensor:
    """Padded rows. Padding is on the right, where causal attention does not look: without a mask, kernels skip half."""
    mask = batch["attention_mask"] if skips_what_is_masked(model) else None
    return model(batch["input_ids"], mask, all_heads=True, **batch["vision"])


def _to(device: torch.device, array: np.ndarray) -> Tensor:
    """An array of the host on a device, without waiting for it."""
    return torch.from_numpy(array).to(device, non_blocking=True)


# -- completions on the cache of their prompts ------------------------------------------------------------------------


def _run_on_cache(model: LengthValueModel, batch: LengthBatch) -> Tensor:
    """Prompts once, and completions on top of their keys and values."""
    ids = batch["input_ids"]
    device = ids.device
    # 1. Where everything lies.
    places = place_on_cache(batch["layout"], width=ids.shape[1])
    prompt_mask = _to(device, places.prompt_mask)
    completion_mask = _to(device, places.completion_mask)
    prompt_of_row = _to(device, places.prompt_of_row)
    # 2. The prompts, with their images, into a cache.
    cache = DynamicCache()
    cache_name = cache_argument(model.backbone)
    prompt_ids = ids.take(_to(device, places.prompt_sources))
    of_prompts = model(prompt_ids, prompt_mask, all_heads=True, **{cache_name: cache}, **batch["vision"])
    # 3. The completions: every row reads the keys and values of its own prompt.
    gather_for_rows(cache, prompt_of_row)
    completion_ids = ids.take(_to(device, places.completion_sources))
    mask = torch.cat([prompt_mask[prompt_of_row], completion_mask], 1)
    of_completions = model(completion_ids, mask, all_heads=True, **{cache_name: cache})
    # 4. Back to the rows.
    outputs = torch.cat([of_prompts.flatten(0, 1), of_completions.flatten(0, 1)])
    return _bring_back(outputs, places.places)


def _bring_back(outputs: Tensor, places: np.ndarray) -> Tensor:
    """Outputs (N, 1 + K) of tokens wherever they were computed, to the tokens (B, T) of the rows."""
    flat = outputs.index_select(0, _to(outputs.device, places.reshape(-1)))
    return flat.view(*places.shape, outputs.shape[-1])


def gather_for_rows(cache: Any, prompt_of_row: Tensor) -> None:
    """Give every row the keys and values of its prompt, and the positions that its images took."""
    for layer in cache.layers:  # the cache's own way of doing it has a backward pass that is 7 times slower
        layer.keys = layer.keys.index_select(0, prompt_of_row)
        layer.values = layer.values.index_select(0, prompt_of_row)
    if getattr(cache, "lenvm_offset", None) is not None:  # an image takes fewer positions than tokens
        cache.lenvm_offset = cache.lenvm_offset[prompt_of_row]


# -- trees, or whole rows, in bins ------------------------------------------------------------------------------------


def _run_in_bins(model: LengthValueModel, batch: LengthBatch, plan: LayoutPlan) -> Tensor:
    """Trees, or whole rows, one after the other."""
    ids, vision = batch["input_ids"], batch["vision"]
    device = ids.device
    # 1. Where everything lies.
    packed = place_in_bins(batch["layout"], plan, width=ids.shape[1])
    sources = _to(device, packed.sources)
    tree = _to(device, packed.tree)
    branch = _to(device, packed.branch)
    depth = _to(device, packed.depth)
    # 2. Masks and positions.
    rope = next((module for module in model.backbone.modules() if hasattr(module, "rope_deltas")), None)
    mask: Tensor | dict[str, Tensor] | None
    if plan.way == "packed":
        mask = None  # transformers makes it from positions that start over
        positions = depth if rope is None else depth.expand(4, *depth.shape)  # of its 4 axes the first is for masks
    else:
        mask = _tree_masks(model, tree, branch, depth)
        positions = depth
        if rope is not None and vision:
            positions = _image_positions(model, rope, batch, depth)
    # 3. One forward, and back to the rows.
    outputs = model(ids.take(sources), mask, all_heads=True, position_ids=positions, **vision)
    return _bring_back(outputs.flatten(0, 1), packed.places)


def _tree_masks(model: LengthValueModel, tree: Tensor, branch: Tensor, depth: Tensor) -> Tensor | dict[str, Tensor]:
    """Who sees whom: one mask, or, where layers differ in their kind of attention, one of each kind."""
    config = model.backbone.config.get_text_config()
    masks = {}
    for kind in attention_kinds(config):
        seen = packed_trees_mask(tree, branch, depth, kind, config)
        if attention_of(model) == "eager":  # adds masks to scores, bools too
            added = torch.zeros_like(seen, dtype=model.backbone.dtype)
            masks[kind] = added.masked_fill_(~seen, -torch.inf)
        else:
            masks[kind] = seen
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _image_positions(model: LengthValueModel, rope: Any, batch: LengthBatch, depth: Tensor) -> Tensor:
    """Positions in time, height and width, one tree a bin: as the model counts its prompt, and on from there.

    Returns:
        Shape (3, K, W).
    """
    ids, vision = batch["input_ids"], batch["vision"]
    # 1. The prompts, padded on the right.
    first_rows, prompt_lengths = _prompts_of(batch["layout"])
    lengths = torch.tensor(prompt_lengths, device=ids.device)
    width = max(prompt_lengths)
    prompts = ids[first_rows, :width]
    mask = (torch.arange(width, device=ids.device) < lengths[:, None]).long()
    # 2. The model counts them: an image takes as many positions as its longer side has patches.
    types = token_types(model.backbone.config, prompts) * mask
    wanted = inspect.signature(rope.get_rope_index).parameters  # each family asks for other sizes of its images
    sizes = {name: vision[name] for name in wanted if name in vision}
    counted, offset = rope.get_rope_index(prompts, mm_token_type_ids=types, attention_mask=mask, **sizes)
    # 3. Completions count on by one a token, from where the model's own count has got to.
    positions = (depth + offset).expand(3, *depth.shape).clone()
    positions[:, :, :width] = torch.where(mask.bool(), counted, positions[:, :, :width])
    return positions


def _prompts_of(layout: Layout) -> tuple[list[int], list[int]]:
    """Of each prompt, the first of its rows, and its tokens."""
    first_rows = [rows[0] for rows in rows_of_prompts(layout)]
    return first_rows, [layout.prompt_lengths[row] for row in first_rows]
