"""Key-value slots: a preallocated cache whose rows are freed, filled, cropped and moved one by one.

Every sequence holds one row and starts at column 0. A step writes each row at its own place, and the columns beyond it
are masked, so that rows of any lengths go through a model side by side, and to crop the last entries of a row is to
count them out. The completions of one prompt are rows filled from one prefill.

With a long tail of lengths, rows as wide as the longest would be mostly padding. So rows can be laid out anew from time
to time, in the order of their lengths: spans of rows of one width, without any gap between them, because what attention
costs on a CPU is to read keys and values, and gaps halve the speed of reading.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

COLUMNS = 32  # widths are multiples of this
FEWEST_ROWS = 16  # smaller batches take other kernels for their matrix products, which round differently
SPAN_COST = 800  # what a span of its own costs, in columns of one row
LEAST_WIDTH = 256  # of rows of a static cache


def round_up_to_power(count: int) -> int:
    """The next power of two."""
    return 1 << max(count - 1, 0).bit_length()


def round_up(count: int, multiple: int = COLUMNS) -> int:
    """The next multiple."""
    return -(-count // multiple) * multiple


@dataclass(frozen=True)
class Span:
    """Rows ``start`` to ``stop``, each ``width`` columns wide, after ``before`` columns of other rows."""

    start: int
    stop: int
    width: int
    before: int


def cut_spans(widths: Sequence[int]) -> list[Span]:
    """Cut rows into spans so that few columns are read in few spans.

    Args:
        widths: columns that each row needs, roughly falling.
    """
    tops = list(widths)  # widest of a row and those after it
    for row in range(len(tops) - 2, -1, -1):
        tops[row] = max(tops[row], tops[row + 1])
    bounds = [0, *(row for row in range(1, len(tops)) if tops[row] < tops[row - 1]), len(tops)]
    best: list[tuple[int, int]] = [(0, 0)] * len(bounds)  # from each bound to the end: cost, next bound
    for start in range(len(bounds) - 2, -1, -1):
        best[start] = min(
            (SPAN_COST + (bounds[stop] - bounds[start]) * tops[bounds[start]] + best[stop][0], stop)
            for stop in range(start + 1, len(bounds))
        )
    spans: list[Span] = []
    start = before = 0
    while start < len(bounds) - 1:
        stop = best[start][1]
        span = Span(bounds[start], bounds[stop], tops[bounds[start]], before)
        before += (span.stop - span.start) * span.width
        spans.append(span)
        start = stop
    return spans


@dataclass(frozen=True)
class Step:
    """Where the new tokens of one forward go.

    Attributes:
        columns: place of each new token in its row. Shape (B, T), int64.
        positions: of the first new token of each row, rope offsets included. Shape (B,), int64.
        width: of the widest row.
    """

    columns: Tensor
    positions: Tensor
    width: int


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, in lines of one head of one token.

    Row after row; in a row head after head; of a head as many columns as the row is wide. Every line belongs to a row
    and moves with it: a masked column still takes part in sums, with weight 0, and must be as finite as its row.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, slots: "SlotCache") -> None:
        super().__init__()
        self._slots = slots
        self.heads = 0
        self.memory: dict[str, Tensor] = {}  # what `keys` and `values` are the beginning of

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeros."""
        self.heads = key_states.shape[1]
        lines = self.heads * sum(self._slots.widths)
        for name, states in (("keys", key_states), ("values", value_states)):
            self.hold(name, states.new_zeros(lines, states.shape[3]), lines)
        self.is_initialized = True

    def hold(self, name: str, memory: Tensor, lines: int) -> None:
        """Take the beginning of some memory, so many lines of it, for ``keys`` or ``values``."""
        self.memory[name] = memory
        kept = memory[:lines]
        if self._slots.static:
            torch._dynamo.mark_static_address(kept)
        setattr(self, name, kept)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new tokens, shape (B, heads, T, head size) each, and return everything.

        Returns:
            Keys and values. Where there is one span, of all rows, shape (B, heads, width, head size). Else the lines as
            they lie, shape (1, heads, lines / heads, head size), for an attention that knows the spans.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        index = self._slots.lines_of_step(self.heads)
        shape = (-1, self.heads, self._slots.current.width) if len(self._slots.spans) == 1 else (1, self.heads, -1)
        result = []
        for kept, states in zip(self.both, (key_states, value_states), strict=True):
            kept.index_copy_(0, index, states.reshape(-1, states.shape[-1]))
            result.append(kept.view(*shape, kept.shape[-1]))
        return result[0], result[1]

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        """Keys and values. Shape (lines, head size) each."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def row(self, row: int) -> list[Tensor]:
        """Keys and values of one row. Shape (heads, width, head size) each."""
        before, width = self._slots.befores[row], self._slots.widths[row]
        lines = slice(self.heads * before, self.heads * (before + width))
        return [kept[lines].view(self.heads, width, -1) for kept in self.both]

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

    Args:
        tight: rows may be of different widths.
        fewest_rows: rows that there are at least, `FEWEST_ROWS` where every batch is to round alike; 1 wastes
            nothing on small batches.
        static: rows and their widths are powers of two, so that there are few shapes, all of one width.

    Attributes:
        lengths: tokens that each row holds; -1 = the row is free.
        offsets: what each row adds to the number of a token to get its position (Qwen-VL's rope delta; else 0).
        widths: columns of each row.
        befores: columns of all rows before each.
        spans: rows of the same width.
        current: the step in progress, or the last one.
    """

    layers: list[SlotLayer]  # type: ignore[assignment]
    current: Step

    def __init__(self, tight: bool = False, fewest_rows: int = FEWEST_ROWS, static: bool = False) -> None:
        super().__init__(layers=[])
        self.tight = tight
        self.static = static
        self._fewest_rows = fewest_rows
        self.lengths: list[int] = []
        self.offsets: list[int] = []
        self.widths: list[int] = []
        self.befores: list[int] = []
        self.spans: list[Span] = []
        self._step_lines: dict[int, Tensor] = {}
        self._spare: dict[tuple[int, torch.dtype], Tensor] = {}

    @property
    def rows(self) -> int:
        """How many there are, free ones among them."""
        return len(self.lengths)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new tokens of one layer and return what they read; called by the model."""
        self._grow_layers(layer_idx + 1)
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    def _grow_layers(self, count: int) -> None:
        self.layers.extend(SlotLayer(self) for _ in range(len(self.layers), count))

    # -- layout ---

    def lay_out(self, order: Sequence[int], widths: Sequence[int]) -> None:
        """Lay rows out anew.

        Args:
            order: for each row, which one it was before; -1 = a new, free one. Rows left out are gone.
            widths: columns that each is to hold; what it holds now is kept in any case.
        """
        # What a row was before; the last entry, which -1 finds, is for new ones.
        lengths, offsets = [*self.lengths, -1], [*self.offsets, 0]
        old_befores, old_widths = [*self.befores, 0], [*self.widths, 1]
        wanted = [round_up(max(width, lengths[row], 1)) for row, width in zip(order, widths, strict=True)]
        fewest = max(self._fewest_rows, len(order))
        missing = (round_up_to_power(fewest) if self.static else fewest) - len(order)
        least = round_up_to_power(max([LEAST_WIDTH, *wanted])) if self.static else COLUMNS
        order, wanted = [*order, *[-1] * missing], wanted + [least] * missing
        self.spans = cut_spans(wanted) if self.tight else [Span(0, len(order), max(least, *wanted), 0)]
        self.widths = [span.width for span in self.spans for _ in range(span.start, span.stop)]
        self.befores = [0, *itertools.accumulate(self.widths)][:-1]
        self.lengths, self.offsets = [lengths[row] for row in order], [offsets[row] for row in order]
        rows = torch.tensor([[old_befores[row], old_widths[row]] for row in order]).T
        for heads in {layer.heads for layer in self.layers if layer.is_initialized}:
            self._move(heads, rows[0], rows[1], [row for row, old in enumerate(order) if old < 0])

    def _move(self, heads: int, old_before: Tensor, old_width: Tensor, fresh: list[int]) -> None:
        """Bring the lines of all layers of so many heads to their new places; ``fresh`` rows get zeros."""
        layers = [layer for layer in self.layers if layer.heads == heads]
        widths = torch.tensor(self.widths)
        row = torch.arange(len(widths)).repeat_interleave(widths * heads)
        place = torch.arange(len(row)) - torch.tensor(self.befores)[row] * heads
        head, column = place // widths[row], place % widths[row]
        # Columns that a row gains repeat its last one until they are written.
        column = torch.minimum(column, old_width[row] - 1)
        source = (old_before[row] * heads + head * old_width[row] + column).to(layers[0].both[0].device)
        for layer in layers:
            for name, old in zip(("keys", "values"), layer.both, strict=True):
                # What the tensor that moved before this one left behind, where that is enough.
                kind = (old.shape[1], old.dtype)
                memory = self._spare.pop(kind, None)
                if memory is None or len(memory) < len(source):
                    room = len(source) if self.static else len(source) * 5 // 4
                    memory = old.new_zeros(room, old.shape[1])
                torch.index_select(old, 0, source, out=memory[: len(source)])
                self._spare[kind] = layer.memory[name]
                layer.hold(name, memory, len(source))
            for new in fresh:
                for kept in layer.row(new):
                    kept.zero_()

    # -- sequences ---

    def fill(
        self,
        rows: Sequence[int],
        prefix: Cache,
        sources: Sequence[int],
        length: int,
        offset: int = 0,
        start: int = 0,
    ) -> None:
        """Start sequences in rows.

        Args:
            rows: free rows; those that do not exist yet are made.
            prefix: cache of a prefill.
            sources: its row for each of ``rows``.
            length: tokens to take.
            offset: see `offsets`.
            start: column of the prefill at which its rows begin; padding stands before.
        """
        missing = max(0, max(rows) + 1 - self.rows)
        if missing or any(self.widths[row] <= length for row in rows):
            widths = [*self.widths, *[1] * missing]
            for row in rows:
                widths[row] = max(widths[row], length + 1)
            self.lay_out([*range(self.rows), *[-1] * missing], widths)
        if length:
            self._grow_layers(len(prefix.layers))
            for layer, source in zip(self.layers, prefix.layers, strict=True):
                _fill_layer(layer, rows, source, sources, slice(start, start + length))
        for row in rows:
            self.lengths[row], self.offsets[row] = length, offset

    def free(self, row: int, *, wipe: bool = False) -> None:
        """Give a row back; ``wipe`` where it may hold NaN, which would spread through the weight 0 of its columns."""
        self.lengths[row], self.offsets[row] = -1, 0
        if wipe:
            for layer in self.layers:
                for kept in layer.row(row):
                    kept.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every row in use; their columns are masked until they are written again."""
        count = abs(tokens_to_remove)
        self.lengths = [max(length - count, 0) if length >= 0 else -1 for length in self.lengths]

    def begin(self, tokens: int, device: torch.device | str = "cpu") -> Step:
        """Count ``tokens`` new ones into every row in use and say where they go.

        Args:
            tokens: T, the same for all rows.
            device: of the tensors of the step.

        Returns:
            The step, of all rows; free ones write into their first columns.
        """
        ends = [max(length, 0) + tokens for length in self.lengths]
        if not ends or any(end > width for end, width in zip(ends, self.widths, strict=True)):
            # Longer by a quarter at least, so that growing costs little in the long run.
            pairs = zip(ends, self.widths, strict=True)
            room = [end + max(COLUMNS, end // 4) if end > width else width for end, width in pairs]
            self.lay_out(range(self.rows), room)
            ends = [max(length, 0) + tokens for length in self.lengths]
        starts = torch.tensor([end - tokens for end in ends])
        both = torch.stack([starts, starts + torch.tensor(self.offsets)]).to(device, non_blocking=True)
        columns = both[0][:, None] + torch.arange(tokens, device=device)
        self.current = Step(columns, both[1], max(self.widths))
        self._step_lines.clear()
        self.lengths = [length + tokens if length >= 0 else -1 for length in self.lengths]
        return self.current

    def lines_of_step(self, heads: int) -> Tensor:
        """Where the new tokens of the step go. Shape (B * heads * T,), int64."""
        if heads not in self._step_lines:
            columns = self.current.columns
            rows = torch.tensor([self.befores, self.widths], device=columns.device)
            first = rows[0][:, None] * heads + torch.arange(heads, device=columns.device) * rows[1][:, None]
            self._step_lines[heads] = (first[:, :, None] + columns[:, None]).flatten()
        return self._step_lines[heads]


def _fill_layer(layer: SlotLayer, rows: Sequence[int], source: Any, sources: Sequence[int], columns: slice) -> None:
    if not layer.is_initialized:
        layer.lazy_initialization(source.keys, source.values)
    for row, source_row in zip(rows, sources, strict=True):
        for kept, states in zip(layer.row(row), (source.keys, source.values), strict=True):
            kept[:, : columns.stop - columns.start] = states[source_row, :, columns]
