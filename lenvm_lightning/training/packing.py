"""Packing: sequences into bins of one width, so that little of it is padding. Numbers only."""

import bisect
from collections.abc import Sequence

# Widths of bins that are compared, in longest sequences: each wider one leaves room for less padding, and costs more
# attention, which goes by the square of the width.
_WIDTH_FACTORS = (1.0, 1.25, 1.5, 2.0, 3.0)
# Pairs of tokens that cost attention as much as the rest of a token costs, see cost().
_PAIRS_PER_TOKEN = 4096
# What a batch costs by itself, as a part of the largest one: so that few large batches win over many half-empty ones.
_COST_OF_A_BATCH = 0.05


def cost(tokens: int, pairs: int) -> float:
    """What a forward and a backward cost, in tokens.

    Args:
        tokens: positions that the model runs over, padding included.
        pairs: queries times keys, masked ones included. On a CPU about 3,000 of them took as long as the rest of a
            token, at widths of 512 and 1024; counted by operations it is 3 to 6 times the width of the model.
    """
    return tokens + pairs / _PAIRS_PER_TOKEN


def fill_bins(lengths: Sequence[int], rows: Sequence[int], width: int, most: int) -> tuple[list[list[int]], list[int]]:
    """First-fit decreasing: the longest sequence first, each into the first bin with room for it.

    Args:
        lengths: tokens of every sequence.
        rows: numbers of the sequences to place, shortest first.
        width: tokens of a bin, at least the longest sequence.
        most: bins there may be.

    Returns:
        The numbers in each bin, and those without a place, shortest first.
    """
    left = list(rows)
    left_lengths = [lengths[row] for row in rows]
    bins: list[list[int]] = []
    while left and len(bins) < most:
        filled: list[int] = []
        room = width
        while True:
            # Lengths ascend: the longest that fits comes just before the first that does not.
            longest_that_fits = bisect.bisect_right(left_lengths, room) - 1
            if longest_that_fits < 0:
                break
            filled.append(left.pop(longest_that_fits))
            room -= left_lengths.pop(longest_that_fits)
        bins.append(filled)
    return bins, left


def width_of(bins: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    """Tokens of the fullest bin."""
    return max(sum(lengths[row] for row in filled) for filled in bins)


def pack(lengths: Sequence[int]) -> list[list[int]]:
    """Bins for the sequences of a batch.

    Wider bins hold less padding, but attention over a bin costs its width squared, what is masked included: the
    cheapest of a few widths is taken.

    Args:
        lengths: tokens of each sequence, at least 1; at least one sequence.

    Returns:
        Numbers of the sequences in each bin; every sequence once.
    """
    rows = sorted(range(len(lengths)), key=lengths.__getitem__)
    longest = lengths[rows[-1]]
    choices = []
    for factor in _WIDTH_FACTORS:
        bins, _ = fill_bins(lengths, rows, width=int(longest * factor), most=len(rows))
        choices.append(bins)
    return min(choices, key=lambda bins: _cost_of_bins(bins, lengths))


def take_batch(lengths: Sequence[int], rows: Sequence[int], max_tokens: int) -> tuple[list[int], list[int]]:
    """The next batch of `pack`-able rows: the longest row, those that fit beside it, and the shorter into gaps.

    Args:
        lengths: tokens of every row.
        rows: numbers of the rows to choose from, shortest first; at least one.
        max_tokens: tokens of all bins of the batch; a single longer row gets a batch of its own.

    Returns:
        Numbers of the rows of the batch, and those that are left, shortest first.
    """
    longest = lengths[rows[-1]]
    chosen: tuple[list[int], list[int]] | None = None
    lowest: tuple[bool, float] | None = None
    for factor in _WIDTH_FACTORS:
        # 1. Fill as many bins of this width as the budget holds.
        width = int(longest * factor)
        if chosen is not None and width > max_tokens:
            break
        bins, left = fill_bins(lengths, rows, width, most=max(1, max_tokens // width))
        batch: list[int] = []
        for filled in bins:
            batch += filled
        # 2. Pack them as they will be when they are computed: narrower bins may be cheaper, and need more tokens.
        batch_lengths = [lengths[row] for row in batch]
        packed = pack(batch_lengths)
        too_large = len(packed) * width_of(packed, batch_lengths) > max_tokens
        # 3. Take what costs least a token, within the budget if it can be.
        total_cost = _cost_of_bins(packed, batch_lengths) + _COST_OF_A_BATCH * max_tokens
        how_bad = (too_large, total_cost / sum(batch_lengths))
        if lowest is None or how_bad < lowest:
            lowest = how_bad
            chosen = batch, left
    assert chosen is not None  # the first width is always tried
    return chosen


def _cost_of_bins(bins: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
    width = width_of(bins, lengths)
    return cost(len(bins) * width, len(bins) * width**2)
