"""Packing: sequences into bins of one width, so that little of it is padding. Numbers only."""

import bisect
from collections.abc import Sequence

_WIDTHS = (1.0, 1.25, 1.5, 2.0, 3.0)  # of bins, in longest sequences
_PAIRS = 4096  # see cost()
_BATCH = 0.05  # what a batch costs by itself, as a share of the largest one


def cost(tokens: int, pairs: int) -> float:
    """What a forward and a backward cost, in tokens.

    Args:
        tokens: positions that the model runs over, padding included.
        pairs: queries times keys, masked ones included. On a CPU about 3,000 of them took as long as the rest of a
            token, at widths of 512 and 1024; counted by operations it is 3 to 6 times the width of the model.
    """
    return tokens + pairs / _PAIRS


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
    left, sizes = list(rows), [lengths[row] for row in rows]
    bins: list[list[int]] = []
    while left and len(bins) < most:
        room, filled = width, []
        while (at := bisect.bisect_right(sizes, room) - 1) >= 0:
            filled.append(left.pop(at))
            room -= sizes.pop(at)
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
    choices = [fill_bins(lengths, rows, int(longest * factor), len(rows))[0] for factor in _WIDTHS]
    return min(choices, key=lambda bins: _cost(bins, lengths))


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
    best: tuple[bool, float, list[int], list[int]] | None = None
    for factor in _WIDTHS:
        width = int(longest * factor)
        if best is not None and width > max_tokens:
            break
        bins, left = fill_bins(lengths, rows, width, max(1, max_tokens // width))
        batch = [row for filled in bins for row in filled]
        sizes = [lengths[row] for row in batch]
        packed = pack(sizes)  # may find narrower bins cheaper, and more of them
        too_large = len(packed) * width_of(packed, sizes) > max_tokens
        each = (_cost(packed, sizes) + _BATCH * max_tokens) / sum(sizes)
        if best is None or (too_large, each) < best[:2]:
            best = too_large, each, batch, left
    assert best is not None
    return best[2], best[3]


def _cost(bins: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
    width = width_of(bins, lengths)
    return cost(len(bins) * width, len(bins) * width**2)
