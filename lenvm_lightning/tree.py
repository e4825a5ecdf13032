"""Prefix trees: tokens that share a beginning, laid out one after the other in one forward."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

KINDS = ("full_attention", "sliding_attention", "chunked_attention")  # of attention whose masks can be made here


def tree_layout(parents: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Who sees whom among the tokens of a tree, and how deep they stand.

    Args:
        parents: for each token the one it follows, an earlier one; -1 for those that follow the prefix itself.

    Returns:
        True = token t (row) sees token s (column): itself and what leads to it, shape (T, T); and the number of tokens
        between the prefix and each token, from 0, shape (T,), int64.

    Raises:
        ValueError: a token follows itself, a later one, or none that there is.
    """
    seen = torch.eye(len(parents), dtype=torch.bool)
    depth = torch.zeros(len(parents), dtype=torch.int64)
    for token, parent in enumerate(parents):
        if not -1 <= parent < token:
            raise ValueError(f"token {token} follows {parent}: it must follow an earlier token, or -1 for the prefix")
        if parent >= 0:
            seen[token] |= seen[parent]
            depth[token] = depth[parent] + 1
    return seen, depth


def packed_trees_mask(tree: Tensor, branch: Tensor, depth: Tensor, kind: str, config: "PreTrainedConfig") -> Tensor:
    """Who sees whom where trees are packed into rows: of its own tree, the prefix and its own branch up to itself.

    Args:
        tree: number of each token's tree within its row; -1 = filler. Shape (K, W), int64.
        branch: 0 = a token of the prefix, else the number of its branch. Shape (K, W), int64.
        depth: tokens from the root to it. Shape (K, W), int64.
        kind: of attention, one of `KINDS`; windows and chunks count in depth.
        config: of the language model, for the size of windows and chunks.

    Returns:
        True = token t (row) sees token s (column). Shape (K, 1, W, W).
    """
    width = tree.shape[1]
    earlier = torch.ones(width, width, dtype=torch.bool, device=tree.device).tril()
    same_tree = tree[:, :, None] == tree[:, None]
    in_prefix = branch[:, None] == 0
    same_branch = branch[:, :, None] == branch[:, None]
    seen = earlier & same_tree & (in_prefix | same_branch)
    if kind == "sliding_attention":
        seen &= depth[:, :, None] - depth[:, None] < config.sliding_window
    elif kind == "chunked_attention":
        seen &= depth[:, :, None] // config.attention_chunk_size == depth[:, None] // config.attention_chunk_size
    return seen.unsqueeze(1)


def step_mask(
    columns: Tensor, width: int, within: Tensor | None, depth: Tensor, kind: str, config: "PreTrainedConfig"
) -> Tensor:
    """Who sees whom where new tokens follow rows of a cache: of its row what is before, of the others ``within``.

    Args:
        columns: that the new tokens take, one after the other in each row. Shape (B, T), int64.
        width: columns of the cache.
        within: True = the new token t (row) sees the new token s (column). Shape (T, T); causal where None.
        depth: tokens between the end of the row and each new token, from 0. Shape (T,), int64.
        kind: of attention, one of `KINDS`; windows and chunks count in tokens before.
        config: of the language model, for the size of windows and chunks.

    Returns:
        True = new token t sees what column s holds. Shape (B, T, width).
    """
    every = torch.arange(width, device=columns.device)
    start = columns[:, :1, None]  # (B, 1, 1)
    if within is None:
        seen = every <= columns[:, :, None]
    else:
        new = every - columns[:, :1]  # (B, width): which of the new tokens a column holds
        beside = within[:, new.clamp(0, len(within) - 1)].transpose(0, 1)
        seen = (new < 0)[:, None] | ((new < len(within))[:, None] & beside)
    if kind != "full_attention":
        places = start + depth[:, None]  # (B, T, 1)
        which = (every - start).clamp(0, len(depth) - 1)
        there = torch.where(every < start, every, start + depth[which])  # places of what columns hold, (B, 1, width)
        if kind == "sliding_attention":
            seen &= places - there < config.sliding_window
        else:
            seen &= places // config.attention_chunk_size == there // config.attention_chunk_size
    return seen


def attention_kinds(config: "PreTrainedConfig") -> list[str]:
    """Kinds of attention among the layers, each once; told as transformers' own caches tell them."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None and "local" in (getattr(config, "attention_layers", None) or ()):
        kinds = ["local"]  # GPT-Neo's, whose masks are its own
    if kinds is None:
        windows = {"sliding_window": "sliding_attention", "attention_chunk_size": "chunked_attention"}
        kinds = [kind for name, kind in windows.items() if getattr(config, name, None) is not None][:1]
    return list(dict.fromkeys(kinds or ["full_attention"]))
