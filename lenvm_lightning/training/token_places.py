"""Where the tokens of a batch lie when it is computed in another layout than rows, and the way back. Host arrays only.

`sources` name tokens of the rows by their place in the flat `input_ids` (row * T + column). `places` name, for every
token of the rows (B, T), where its logit is among all logits, flat; padding of the rows gets some place, never read.

Letters in shapes: B rows of T tokens, G prompts; P and C the longest prompt and completion; K bins of W tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..batch import Layout
from .layout_plan import LayoutPlan, rows_of_prompts


@dataclass(frozen=True)
class CachePlaces:
    """Prompts, padded on the left, in a first forward; completions, padded on the right, on top of their caches.

    Attributes:
        prompt_of_row: number of each row's prompt. Shape (B,).
        prompt_sources: shape (G, P).
        prompt_mask: 1 = a token of the prompt, 0 = padding. Shape (G, P), int64.
        completion_sources: shape (B, C).
        completion_mask: 1 = a token of the completion, 0 = padding. Shape (B, C), int64.
        places: among the logits of the prompts and then those of the completions. Shape (B, T).
    """

    prompt_of_row: np.ndarray
    prompt_sources: np.ndarray
    prompt_mask: np.ndarray
    completion_sources: np.ndarray
    completion_mask: np.ndarray
    places: np.ndarray


def place_on_cache(layout: Layout, width: int) -> CachePlaces:
    """Prompts once, completions on top of them.

    Filler is the last token of a completion: never that of an image.

    Args:
        layout: of the batch.
        width: T of the rows.
    """
    # 1. Columns of numbers that broadcast over tokens: of every row (B, 1), and of the first row of each prompt (G, 1).
    lengths = np.asarray(layout.lengths)[:, None]
    prompt_lengths = np.asarray(layout.prompt_lengths)[:, None]
    prompt_of_row = np.asarray(layout.prompts)
    rows = np.arange(len(lengths))[:, None]
    first_row = np.asarray([rows_of_prompt[0] for rows_of_prompt in rows_of_prompts(layout)])
    # 2. Prompts end where completions begin, in column P.
    prompt_width = int(prompt_lengths.max())
    column = np.arange(prompt_width)
    start = prompt_width - prompt_lengths[first_row]  # (G, 1)
    is_prompt = column >= start  # (G, P)
    prompt_column = np.where(is_prompt, column - start, lengths[first_row] - 1)
    prompt_sources = first_row[:, None] * width + prompt_column
    # 3. Completions begin in column 0 of the second forward.
    completion_width = int((lengths - prompt_lengths).max())
    completion_column = prompt_lengths + np.arange(completion_width)  # (B, C)
    completion_sources = rows * width + np.minimum(completion_column, lengths - 1)
    is_completion = completion_column < lengths
    # 4. Back to the rows: tokens of a prompt are where its first row has them, the others after all prompts.
    row_column = np.arange(width)
    in_prompt = prompt_of_row[:, None] * prompt_width + (prompt_width - prompt_lengths) + row_column
    in_completion = len(first_row) * prompt_width + rows * completion_width + (row_column - prompt_lengths)
    places = np.where(row_column < prompt_lengths, in_prompt, in_completion)
    places = np.where(row_column < lengths, places, 0)
    return CachePlaces(
        prompt_of_row=prompt_of_row,
        prompt_sources=prompt_sources,
        prompt_mask=is_prompt.astype(np.int64),
        completion_sources=completion_sources,
        completion_mask=is_completion.astype(np.int64),
        places=places,
    )


@dataclass(frozen=True)
class PrefixTree:
    """A prefix, and the rows that branch off it.

    Attributes:
        prefix_length: tokens at the beginning that the rows share.
        rows: their numbers.
        row_lengths: tokens of each, the prefix included.
    """

    prefix_length: int
    rows: list[int]
    row_lengths: list[int]

    @property
    def size(self) -> int:
        """Tokens, the prefix once."""
        return self.prefix_length + sum(length - self.prefix_length for length in self.row_lengths)


def trees_of_rows(layout: Layout) -> list[PrefixTree]:
    """Every row a tree of its own, without branches."""
    return [PrefixTree(length, [row], [length]) for row, length in enumerate(layout.lengths)]


def trees_of_prompts(layout: Layout) -> list[PrefixTree]:
    """Every prompt a prefix, its completions the branches."""
    trees = []
    for rows in rows_of_prompts(layout):
        row_lengths = [layout.lengths[row] for row in rows]
        trees.append(PrefixTree(layout.prompt_lengths[rows[0]], rows, row_lengths))
    return trees


@dataclass(frozen=True)
class PackedTrees:
    """Trees one after the other in bins.

    Attributes:
        sources: shape (K, W).
        tree: number of each token's tree; -1 = filler. Shape (K, W).
        branch: 0 = a token of the prefix, else the number of its branch within the tree, from 1. Shape (K, W).
        depth: tokens between the root and it. Shape (K, W).
        places: shape (B, T).
    """

    sources: np.ndarray
    tree: np.ndarray
    branch: np.ndarray
    depth: np.ndarray
    places: np.ndarray


def place_in_bins(layout: Layout, plan: LayoutPlan, width: int) -> PackedTrees:
    """Trees, or whole rows, in the bins of a plan.

    Args:
        layout: of the batch.
        plan: `tree` or `packed`.
        width: T of the rows.
    """
    trees = trees_of_rows(layout) if plan.way == "packed" else trees_of_prompts(layout)
    bin_width = max(sum(trees[number].size for number in numbers) for numbers in plan.bins)
    shape = (len(plan.bins), bin_width)
    packed = PackedTrees(
        sources=np.full(shape, layout.lengths[0] - 1),  # filler: the last token of a completion, never that of an image
        tree=np.full(shape, -1),
        branch=np.zeros(shape, np.int64),
        depth=np.zeros(shape, np.int64),
        places=np.zeros((len(layout.lengths), width), np.int64),
    )
    one_tree_a_bin = len(plan.bins) == len(trees)
    for bin_number, numbers in enumerate(plan.bins):
        column = _fill_bin(packed, bin_number, trees, numbers)
        # Filler starts over as one more row does. Where no bin holds two trees it counts on: nothing real sees what
        # comes later, and sdpa then needs no mask.
        first_depth = column if one_tree_a_bin else 0
        packed.depth[bin_number, column:] = first_depth + np.arange(bin_width - column)
    return packed


def _fill_bin(packed: PackedTrees, bin_number: int, trees: Sequence[PrefixTree], numbers: Sequence[int]) -> int:
    """Write trees into a bin, from its first column on; returns the column after the last of them."""
    bin_width, width = packed.sources.shape[1], packed.places.shape[1]
    first_place = bin_number * bin_width
    column = 0
    for number in numbers:
        tree = trees[number]
        packed.tree[bin_number, column : column + tree.size] = number
        # 1. The prefix, taken from the first of its rows; all of them find their logits here.
        depth = np.arange(tree.prefix_length)
        columns = slice(column, column + tree.prefix_length)
        packed.sources[bin_number, columns] = tree.rows[0] * width + depth
        packed.depth[bin_number, columns] = depth
        packed.places[tree.rows, : tree.prefix_length] = first_place + column + depth
        column += tree.prefix_length
        # 2. What each row has beyond it, one branch after the other; depth goes on from the prefix.
        for branch, (row, length) in enumerate(zip(tree.rows, tree.row_lengths, strict=True), start=1):
            depth = np.arange(tree.prefix_length, length)
            columns = slice(column, column + len(depth))
            packed.sources[bin_number, columns] = row * width + depth
            packed.depth[bin_number, columns] = depth
            packed.branch[bin_number, columns] = branch
            packed.places[row, depth] = first_place + column + np.arange(len(depth))
            column += len(depth)
    return column
