"""Prefix trees: tokens that share a beginning, laid out one after the other in one forward."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
