"""Which rows make up which batch under a token budget: similar lengths together, shuffled, reproducible."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lenvm_lightning.training.packing import take_batch

# Packed batches are filled from the rows of so many batches where lengths are not to meet: gaps need some choice.
_RANDOM_WINDOW = 8
# Lengths are multiplied by 1 plus or minus this before they are sorted, where there are few windows. It costs one or
# two per cent of padding.
_JITTER = 0.04
# Up to so many windows hold nearly the same rows in every epoch, so that sorting would let the same ones meet.
_FEW_WINDOWS = 2
# A window of packed batches has at most one part in so many of all rows, for the same reason.
_PARTS_OF_PACKED = 4


def plan_batches(
    lengths: Sequence[int],
    max_tokens: int,
    *,
    seed: int | None,
    window: int = 50,
    bucket: bool = True,
    prompts: Sequence[int] | None = None,
    completions_per_batch: int = 1,
    packed: bool = False,
) -> list[list[int]]:
    """Group rows so that `rows x longest row <= max_tokens`, or, packed, `bins x fullest bin <= max_tokens`.

    Rows are shuffled, sorted by length within windows of about `window` batches, split into batches, and the batches
    shuffled: rows of similar length meet, and no part of an epoch is all short or all long.

    With `completions_per_batch` above 1 all this happens to groups of completions of one prompt, sampled anew for every
    seed, and the length of a group is that of its longest row. The paper found that shuffled batches, the default, beat
    batches that keep a prompt's completions together; groups also cost padding, since their rows differ in length.

    Packed batches are filled within the same windows: with the longest rows that are left, as many bins as the budget
    holds, and gaps with shorter ones. Without `bucket` a window is only a few batches.

    Args:
        lengths: tokens of each row.
        max_tokens: padded tokens a batch may hold; a single longer row gets a batch of its own.
        seed: of the shuffles; None keeps the rows in order of length, longest first, for evaluation.
        window: batches in a sorting window.
        bucket: False leaves the sorting out: random batches, for comparison.
        prompts: number of each row's prompt; needed for `completions_per_batch` above 1.
        completions_per_batch: completions of a prompt that stay in one batch. A group of them that is above
            `max_tokens` is split, into rows of similar length.
        packed: for `pack`; only without `completions_per_batch`.

    Returns:
        Row numbers of each batch; every row exactly once.

    Raises:
        ValueError: `completions_per_batch` above 1 without a prompt for every row, or packed.
    """
    if len(lengths) == 0:
        return []
    sizes = np.asarray(lengths, dtype=np.int64)
    random = np.random.default_rng(seed) if seed is not None else None
    _check_grouping(len(sizes), prompts, completions_per_batch, packed)
    if packed:
        return _plan_packed(sizes, max_tokens, random, window if bucket else _RANDOM_WINDOW)
    # 1. What stays in one batch: single rows, or completions of a prompt.
    if completions_per_batch > 1:
        groups = _group_by_prompt(np.asarray(prompts), completions_per_batch, sizes, max_tokens, random)
    else:
        groups = _Groups([[row] for row in range(len(sizes))], longest=sizes)
    # 2. Evaluation goes from long to short.
    if random is None:
        return _split_into_batches(groups, np.argsort(-groups.longest, kind="stable"), max_tokens)
    # 3. Training shuffles, sorts within windows, and shuffles the batches.
    order = random.permutation(len(groups.rows))
    if bucket:
        order = _sort_within_windows(groups, order, window * max_tokens, random)
    batches = _split_into_batches(groups, order, max_tokens)
    random.shuffle(batches)
    return batches


def _check_grouping(rows: int, prompts: Sequence[int] | None, completions_per_batch: int, packed: bool) -> None:
    """Refuse groups of completions in packed batches, and without a prompt for every row."""
    if completions_per_batch <= 1:
        return
    asked_for = f"completions_per_batch: {completions_per_batch}"
    if packed:
        raise ValueError(f"packed batches keep no completions of a prompt together, got {asked_for}")
    if prompts is None or len(prompts) != rows:
        raise ValueError(f"{asked_for} needs the prompt of each of the {rows} rows")


@dataclass(frozen=True)
class _Groups:
    """Rows that stay in one batch.

    Attributes:
        rows: numbers of the rows of each group.
        longest: tokens of each group's longest row. Shape (groups,), int64.
    """

    rows: list[list[int]]
    longest: np.ndarray

    @property
    def padded(self) -> np.ndarray:
        """Tokens of each group, padded to its longest row. Shape (groups,), int64."""
        return self.longest * np.asarray([len(rows) for rows in self.rows])


def _group_by_prompt(
    prompts: np.ndarray, most: int, sizes: np.ndarray, max_tokens: int, random: np.random.Generator | None
) -> _Groups:
    """Rows of one prompt in random groups of up to `most`, fewer where the budget does not hold so many."""
    # 1. Shuffle the rows, then bring those of a prompt next to each other, in the order of the shuffle.
    rows = np.arange(len(prompts)) if random is None else random.permutation(len(prompts))
    rows = rows[np.argsort(prompts[rows], kind="stable")]
    # 2. A group starts at the first row of a prompt, and again after every `most` of its rows.
    first_of_prompt = np.searchsorted(prompts[rows], prompts[rows])  # place of the first row of each row's prompt
    place_in_prompt = np.arange(len(rows)) - first_of_prompt
    starts = np.flatnonzero(place_in_prompt % most == 0)
    # 3. Split groups that the budget does not hold, longest rows first.
    groups: list[list[int]] = []
    for group in np.split(rows, starts[1:]):
        by_length = group[np.argsort(-sizes[group], kind="stable")]
        single_rows = _Groups([[row] for row in by_length.tolist()], longest=sizes[by_length])
        groups += _split_into_batches(single_rows, np.arange(len(by_length)), max_tokens)
    return _Groups(groups, longest=np.asarray([sizes[group].max() for group in groups]))


def _sort_within_windows(
    groups: _Groups, order: np.ndarray, window_tokens: int, random: np.random.Generator
) -> np.ndarray:
    """Sort groups by length within windows of so many padded tokens, one window after the other.

    Where one or two windows hold all groups, lengths are first multiplied by a random factor close to 1: else the same
    groups would meet in every epoch.
    """
    groups_in_window = max(1, int(window_tokens / max(1.0, float(groups.padded.mean()))))
    windows = [order[start : start + groups_in_window] for start in range(0, len(order), groups_in_window)]
    keys = groups.longest
    if len(windows) <= _FEW_WINDOWS:
        keys = groups.longest * random.uniform(1 - _JITTER, 1 + _JITTER, len(groups.longest))
    return np.concatenate([window[np.argsort(keys[window], kind="stable")] for window in windows])


def _split_into_batches(groups: _Groups, order: np.ndarray, max_tokens: int) -> list[list[int]]:
    """Batches of whole groups, one after the other in this order, each as large as the budget allows."""
    longest_of = groups.longest.tolist()
    batches: list[list[int]] = []
    batch: list[int] = []
    longest = 0
    for number in order.tolist():
        rows = groups.rows[number]
        padded = (len(batch) + len(rows)) * max(longest, longest_of[number])
        if batch and padded > max_tokens:
            batches.append(batch)
            batch, longest = [], 0
        batch += rows
        longest = max(longest, longest_of[number])
    batches.append(batch)
    return batches


def _plan_packed(
    sizes: np.ndarray, max_tokens: int, random: np.random.Generator | None, window: int
) -> list[list[int]]:
    """Batches of rows that fit into bins of one width, from windows of about `window` batches."""
    # 1. Windows of shuffled rows.
    rows_in_window = max(1, int(window * max_tokens / max(1.0, float(sizes.mean()))))
    order = np.arange(len(sizes))
    if random is not None:
        order = random.permutation(len(sizes))
        rows_in_window = min(rows_in_window, -(-len(sizes) // _PARTS_OF_PACKED))
    # 2. Each is emptied, batch by batch, from its longest row down.
    lengths = sizes.tolist()
    batches: list[list[int]] = []
    for start in range(0, len(order), rows_in_window):
        rows = order[start : start + rows_in_window]
        left = rows[np.argsort(sizes[rows], kind="stable")].tolist()
        while left:
            batch, left = take_batch(lengths, left, max_tokens)
            batches.append(batch)
    # 3. Long batches come first in each window: shuffle them.
    if random is not None:
        random.shuffle(batches)
    return batches


def split_to_count(batches: list[list[int]], count: int) -> list[list[int]]:
    """Halve the largest batches until there are `count`: no row is lost or doubled.

    Raises:
        ValueError: there are fewer rows than `count`.
    """
    batches = [list(batch) for batch in batches]
    while len(batches) < count:
        largest = max(range(len(batches)), key=lambda number: len(batches[number]))
        rows = batches[largest]
        if len(rows) < 2:
            raise ValueError(f"{sum(map(len, batches))} rows cannot fill {count} batches")
        half = len(rows) // 2
        batches[largest] = rows[:half]
        batches.insert(largest + 1, rows[half:])
    return batches


def rows_for_layout_check(lengths: Sequence[int], prompts: Sequence[int]) -> list[int]:
    """Short rows that share prompts: two of each of two prompts, or one of them twice where there is only one."""
    # 1. The two shortest rows of every prompt.
    shortest_rows: dict[int, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        rows = shortest_rows.setdefault(prompts[row], [])
        if len(rows) < 2:
            rows.append(row)
    # 2. Prompts that have two come first, then those whose longer row is shortest.
    pairs = [(rows[0], rows[-1]) for rows in shortest_rows.values()]
    pairs.sort(key=lambda pair: (pair[0] == pair[1], lengths[pair[1]]))
    # 3. Of two prompts.
    chosen: list[int] = []
    for pair in pairs[:2]:
        chosen += pair
    return chosen
