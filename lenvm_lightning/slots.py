"""Key-value slots: a preallocated cache whose rows are freed, filled, cropped and moved one by one.

Every sequence holds one row and starts at column 0. A step writes each row at its own place, and the columns beyond it
are masked, so that rows of any lengths go through a model side by side, and to crop the last entries of a row is to
count them out. The completions of one prompt are rows filled from one prefill.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

COLUMNS = 64  # widths are multiples of this
FEWEST_ROWS = 8  # smaller batches take other kernels for their matrix products, which round differently
_SPAN_COST = 12 * COLUMNS  # what a span of its own costs, in columns of one row


def round_up(count: int, multiple: int = COLUMNS) -> int:
    """The next multiple."""
    return -(-count // multiple) * multiple


@dataclass(frozen=True)
class Span:
    """Rows ``start`` to ``stop`` read columns 0 to ``width``."""

    start: int
    stop: int
    width: int


@dataclass(frozen=True)
class Step:
    """Where the new tokens of one forward go.

    Attributes:
        columns: place of each new token in its row. Shape (B, T), int64.
        positions: of the first new token of each row, rope offsets included. Shape (B,), int64.
        width: columns read, a multiple of :data:`COLUMNS`.
        spans: rows that read fewer; together all rows, in order.
    """

    columns: Tensor
    positions: Tensor
    width: int
    spans: list[Span]

    @property
    def rows(self) -> int:
        """Rows B."""
        return self.columns.shape[0]


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, (rows, heads, columns, head size) each; allocated when it is first written."""

    is_sliding = False
    is_croppable = True

    def __init__(self, slots: "SlotCache") -> None:
        super().__init__()
        self._slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeros: a masked column still takes part in sums, with weight 0, and must be finite."""
        rows, columns = self._slots.rows, self._slots.capacity
        for name, states in (("keys", key_states), ("values", value_states)):
            setattr(self, name, states.new_zeros(rows, states.shape[1], columns, states.shape[3]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new tokens, shape (B, heads, T, head size) each, and return all that the step reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._both()
        step, index = self._slots.current, self._slots.places(keys.shape[1])
        for kept, states in ((keys, key_states), (values, value_states)):
            kept.view(-1, kept.shape[-1]).index_copy_(0, index, states.reshape(-1, states.shape[-1]))
        return keys[: step.rows, :, : step.width], values[: step.rows, :, : step.width]

    def _both(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def resize(self, rows: int, columns: int) -> None:
        """Make room, keeping what is there."""
        for name, old in zip(("keys", "values"), self._both(), strict=True):
            new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
            new[: old.shape[0], :, : old.shape[2]] = old
            setattr(self, name, new)

    def copy(self, rows: Sequence[int], columns: int, source: Any, source_rows: Sequence[int]) -> None:
        """Fill the first columns of some rows from rows of another layer, or from those of this one."""
        if not self.is_initialized:
            self.lazy_initialization(source.keys, source.values)
        index = torch.tensor([rows, source_rows], device=source.keys.device)
        for kept, states in zip(self._both(), (source.keys, source.values), strict=True):
            kept[:, :, :columns].index_copy_(0, index[0], states[:, :, :columns].index_select(0, index[1]))

    def wipe(self, row: int) -> None:
        """Fill a row with zeros."""
        for kept in self._both():
            kept[row] = 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a step reads, and the first of them."""
        return self._slots.current.width, 0

    def get_seq_length(self) -> int:
        """Tokens of the longest row."""
        return max(self._slots.lengths, default=0)

    def get_max_length(self) -> int:
        """There is no maximum."""
        return -1


class SlotCache(Cache):
    """A cache whose rows are freed and filled one by one; see the head of this module.

    Its book-keeping is on the host, so that a step needs no synchronisation.

    Attributes:
        lengths: tokens that each row holds; -1 = the row is free.
        offsets: what each row adds to the number of a token to get its position (Qwen-VL's rope delta; else 0).
        capacity: columns allocated.
        current: the step in progress, or the last one.
    """

    layers: list[SlotLayer]  # type: ignore[assignment]
    current: Step

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.lengths: list[int] = []
        self.offsets: list[int] = []
        self.capacity = 0
        self._places: dict[int, Tensor] = {}

    @property
    def rows(self) -> int:
        """Rows allocated."""
        return len(self.lengths)

    @property
    def used(self) -> int:
        """Rows of a step: up to the last one that holds a sequence."""
        last = max((row for row, length in enumerate(self.lengths) if length >= 0), default=-1)
        return max(last + 1, FEWEST_ROWS)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new tokens of one layer and return what they read; called by the model."""
        self._grow_layers(layer_idx + 1)
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    def _grow_layers(self, count: int) -> None:
        self.layers.extend(SlotLayer(self) for _ in range(len(self.layers), count))

    def places(self, heads: int) -> Tensor:
        """Where the new tokens of the step go, rows, heads and columns counted through. Shape (B * heads * T,)."""
        if heads not in self._places:
            columns = self.current.columns
            starts = torch.arange(self.current.rows * heads, device=columns.device) * self.capacity
            self._places[heads] = (starts.view(-1, heads, 1) + columns[:, None]).flatten()
        return self._places[heads]

    def reserve(self, rows: int, columns: int) -> None:
        """Make room for so many rows of so many columns; what is there stays."""
        rows = max(rows, FEWEST_ROWS)
        if rows <= self.rows and columns <= self.capacity:
            return
        if columns > self.capacity:  # by a quarter at least, so that growing costs little in the long run
            self.capacity = round_up(max(columns, self.capacity * 5 // 4))
        missing = max(0, rows - self.rows)
        self.lengths += [-1] * missing
        self.offsets += [0] * missing
        for layer in self.layers:
            if layer.is_initialized:
                layer.resize(self.rows, self.capacity)

    def fill(self, rows: Sequence[int], prefix: Cache, sources: Sequence[int], length: int, offset: int = 0) -> None:
        """Start sequences in rows.

        Args:
            rows: free rows.
            prefix: cache of a prefill whose rows start at column 0.
            sources: its row for each of ``rows``.
            length: tokens to take.
            offset: see :attr:`offsets`.
        """
        self.reserve(max(rows) + 1, length + 1)
        if length:
            self._grow_layers(len(prefix.layers))
            for layer, source in zip(self.layers, prefix.layers, strict=True):
                layer.copy(rows, length, source, sources)
        for row in rows:
            self.lengths[row], self.offsets[row] = length, offset

    def begin(self, tokens: int, device: torch.device | str = "cpu", spans: bool = False) -> Step:
        """Count ``tokens`` new ones into every row in use and say where they go.

        Args:
            tokens: T, the same for all rows.
            device: of the tensors of the step.
            spans: cut rows into spans of similar length.

        Returns:
            The step, of all rows up to the last one in use; free rows among them write into their first columns.
        """
        used = self.used
        starts = [max(length, 0) for length in self.lengths[:used]]
        self.reserve(used, max(starts, default=0) + tokens)
        starts += [0] * (used - len(starts))
        first = torch.tensor([starts, self.offsets[:used]]).to(device, non_blocking=True)
        columns = first[0][:, None] + torch.arange(tokens, device=device)
        widths = [round_up(start + tokens) for start in starts]
        width = max(widths)
        cut = cut_spans(widths) if spans else [Span(0, used, width)]
        self.current = Step(columns, first.sum(0), width, cut)
        self._places.clear()
        self.lengths[:used] = [length + tokens if length >= 0 else -1 for length in self.lengths[:used]]
        return self.current

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every row in use; their columns are masked until they are written again."""
        count = abs(tokens_to_remove)
        self.lengths = [max(length - count, 0) if length >= 0 else -1 for length in self.lengths]

    def free(self, row: int, *, wipe: bool = False) -> None:
        """Give a row back; ``wipe`` where it may hold NaN, which would spread through the weight 0 of its columns."""
        self.lengths[row], self.offsets[row] = -1, 0
        if wipe:
            for layer in self.layers:
                layer.wipe(row)

    def sort(self) -> list[int]:
        """Bring rows into the order of their widths, the widest first and free ones last, moving as few as possible.

        Returns:
            For every row, which one it was before.
        """
        widths = [round_up(length + 1) if length >= 0 else 0 for length in self.lengths]
        wanted = sorted(widths, reverse=True)
        order = list(range(self.rows))
        targets = [row for row in order if widths[row] != wanted[row]]
        homeless: dict[int, list[int]] = {}
        for row in targets:
            homeless.setdefault(widths[row], []).append(row)
        for row in targets:
            order[row] = homeless[wanted[row]].pop()
        moved = [row for row in targets if widths[order[row]]]  # free rows hold nothing
        if moved:
            width = min(max(wanted[row] for row in moved), self.capacity)
            for layer in self.layers:
                layer.copy(moved, width, layer, [order[row] for row in moved])
        self.lengths = [self.lengths[row] for row in order]
        self.offsets = [self.offsets[row] for row in order]
        return order


def cut_spans(widths: Sequence[int]) -> list[Span]:
    """Cut rows into spans so that few columns are read in few spans.

    Args:
        widths: columns that each row needs, roughly falling.
    """
    tops = list(widths)  # widest of a row and those after it
    for row in range(len(tops) - 2, -1, -1):
        tops[row] = max(tops[row], tops[row + 1])
    bounds = [0] + [row for row in range(1, len(tops)) if tops[row] < tops[row - 1]] + [len(tops)]
    best: list[tuple[int, int]] = [(0, 0)] * len(bounds)  # from each bound to the end: cost, next bound
    for start in range(len(bounds) - 2, -1, -1):
        best[start] = min(
            (_SPAN_COST + (bounds[stop] - bounds[start]) * tops[bounds[start]] + best[stop][0], stop)
            for stop in range(start + 1, len(bounds))
        )
    spans, start = [], 0
    while start < len(bounds) - 1:
        stop = best[start][1]
        spans.append(Span(bounds[start], bounds[stop], tops[bounds[start]]))
        start = stop
    return spans
