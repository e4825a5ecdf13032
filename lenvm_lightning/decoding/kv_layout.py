"""How the rows of a `KVCache` lie in memory: groups of rows of one width, and where each line was before."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

COLUMNS = 32  # widths are multiples of this: the block that attention on a CPU computes at once
ROW_GROUP_COST = 800  # what a row group of its own costs attention, in columns of one row


def round_up_to_power(count: int) -> int:
    """The next power of two."""
    return 1 << max(count - 1, 0).bit_length()


def round_up(count: int, multiple: int = COLUMNS) -> int:
    """The next multiple."""
    return -(-count // multiple) * multiple


@dataclass(frozen=True)
class RowGroup:
    """Rows ``start`` to ``stop``, each ``width`` columns wide, after ``before`` columns of the rows before them."""

    start: int
    stop: int
    width: int
    before: int


def cut_row_groups(widths: Sequence[int]) -> list[RowGroup]:
    """Cut rows into groups so that few columns are read in few groups.

    Args:
        widths: columns that each row needs, roughly falling.
    """
    # 1. The width that a group beginning at a row must have: that of the widest row from there on.
    widest_from = list(widths)
    for row in range(len(widths) - 2, -1, -1):
        widest_from[row] = max(widest_from[row], widest_from[row + 1])
    # 2. Groups begin and end only where that width falls.
    bounds = [0]
    for row in range(1, len(widths)):
        if widest_from[row] < widest_from[row - 1]:
            bounds.append(row)
    bounds.append(len(widths))
    # 3. From the last bound to the first: the cheapest way to the end, and the bound that its first group stops at.
    cost_to_end = [0] * len(bounds)
    stop_of_first = [0] * len(bounds)
    for start in range(len(bounds) - 2, -1, -1):
        width = widest_from[bounds[start]]
        ways = []
        for stop in range(start + 1, len(bounds)):
            columns = (bounds[stop] - bounds[start]) * width
            ways.append((ROW_GROUP_COST + columns + cost_to_end[stop], stop))
        cost_to_end[start], stop_of_first[start] = min(ways)
    # 4. Walk the cheapest way.
    groups: list[RowGroup] = []
    start = before = 0
    while start < len(bounds) - 1:
        stop = stop_of_first[start]
        group = RowGroup(bounds[start], bounds[stop], widest_from[bounds[start]], before)
        groups.append(group)
        before += (group.stop - group.start) * group.width
        start = stop
    return groups


@dataclass(frozen=True)
class RowLayout:
    """Where every row lies.

    Attributes:
        row_groups: rows of the same width.
        widths: columns of each row.
        row_starts: columns of all rows before each.
    """

    row_groups: list[RowGroup] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    row_starts: list[int] = field(default_factory=list)

    @classmethod
    def of_groups(cls, row_groups: list[RowGroup]) -> "RowLayout":
        """The layout of rows in groups."""
        widths = []
        for group in row_groups:
            widths += [group.width] * (group.stop - group.start)
        return cls(row_groups, widths, [0, *itertools.accumulate(widths)][:-1])

    def place_of(self, row: int) -> tuple[int, int]:
        """Columns before a row, and its width; of -1, a row that was not there, those of a row of one column."""
        return (self.row_starts[row], self.widths[row]) if row >= 0 else (0, 1)


def lines_before(old: RowLayout, new: RowLayout, order: Sequence[int], heads: int) -> Tensor:
    """Where each line of a layout was in the one before.

    A row that was not there takes some line. Columns that a row gains repeat its last one until they are written.

    Args:
        old: the layout before.
        new: the layout now.
        order: for each row now, which one it was before; -1 = it was not there.
        heads: of the layer.

    Returns:
        Shape (lines,), int64.
    """
    # 1. Of every line now: its row, its head, and its column.
    widths, row_starts = torch.tensor(new.widths), torch.tensor(new.row_starts)
    row = torch.arange(len(widths)).repeat_interleave(widths * heads)
    place_in_row = torch.arange(len(row)) - row_starts[row] * heads
    head, column = place_in_row // widths[row], place_in_row % widths[row]
    # 2. The same head and column of the row that it was.
    old_places = torch.tensor([old.place_of(before) for before in order])
    old_start, old_width = old_places[row, 0], old_places[row, 1]
    old_column = torch.minimum(column, old_width - 1)
    return old_start * heads + head * old_width + old_column
