"""KV cache: keys and values of many sequences, one row each, which are freed, filled, cropped and moved one by one.

Every sequence holds one row and starts at its column 0. A step writes each row at its own place, and the columns beyond
it are masked, so rows of any lengths go through a model side by side. Cropping a row only decreases its length counter.
The completions of one prompt are rows filled from one prefill.

With a long tail of lengths, rows as wide as the longest would be mostly padding. So rows can be laid out anew from time
to time, in the order of their lengths: groups of rows of one width, without a gap between them, because what attention
costs on a CPU is to read keys and values, and gaps halve the speed of reading.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from .kv_layout import COLUMNS, RowGroup, RowLayout, cut_row_groups, lines_before, round_up, round_up_to_power

FEWEST_ROWS = 16  # smaller batches take other kernels for their matrix products, which round differently
LEAST_STATIC_WIDTH = 256  # of rows of a static cache: narrower ones would only add shapes to compile


@dataclass(frozen=True)
class Placement:
    """Where the new tokens of one forward go.

    Attributes:
        columns: place of each new token in its row. Shape (B, T), int64.
        positions: of the first new token of each row, rope offsets included. Shape (B,), int64.
        width: of the widest row.
        kept: which of the B * T new tokens there are, row after row, ascending; None = all. Shape (N,), int64.
    """

    columns: Tensor
    positions: Tensor
    width: int
    kept: Tensor | None = None


class KVCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, in lines; a line is one head of one token.

    Row after row; in a row head after head; of a head as many columns as the row is wide. Every line belongs to a row
    and moves with it: a masked column still takes part in sums, with weight 0, and must be as finite as its row.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, cache: "KVCache") -> None:
        super().__init__()
        self._cache = cache
        self.heads = 0
        self.memory: dict[str, Tensor] = {}  # what `keys` and `values` are the beginning of

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeros."""
        self.heads = key_states.shape[1]
        lines = self.heads * sum(self._cache.layout.widths)
        for name, states in (("keys", key_states), ("values", value_states)):
            self.hold(name, states.new_zeros(lines, states.shape[3]), lines)
        self.is_initialized = True

    def hold(self, name: str, memory: Tensor, lines: int) -> None:
        """Take the first ``lines`` lines of some memory for ``keys`` or ``values``."""
        self.memory[name] = memory
        kept = memory[:lines]
        if self._cache.static:
            torch._dynamo.mark_static_address(kept)
        setattr(self, name, kept)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new tokens, shape (B, heads, T, head size) each, and return everything.

        Where only some of them are there, shape (1, heads, N, head size).

        Returns:
            Keys and values. Where there is one row group, of all rows, shape (B, heads, width, head size). Else the
            lines as they lie, shape (1, heads, lines / heads, head size), for an attention that knows the groups.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        index = self._cache.new_lines(self.heads)
        one_group = len(self._cache.layout.row_groups) == 1
        shape = (-1, self.heads, self._cache.current.width) if one_group else (1, self.heads, -1)
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
        start, width = self._cache.layout.row_starts[row], self._cache.layout.widths[row]
        lines = slice(self.heads * start, self.heads * (start + width))
        return [kept[lines].view(self.heads, width, -1) for kept in self.both]

    def fill(self, rows: Sequence[int], source: Any, source_rows: Sequence[int], columns: slice) -> None:
        """Copy columns of rows of another cache's layer to the beginning of rows of this one."""
        if not self.is_initialized:
            self.lazy_initialization(source.keys, source.values)
        length = columns.stop - columns.start
        for row, source_row in zip(rows, source_rows, strict=True):
            for kept, states in zip(self.row(row), (source.keys, source.values), strict=True):
                kept[:, :length] = states[source_row, :, columns]

    def wipe(self, row: int) -> None:
        """Set all columns of a row to zero."""
        for kept in self.row(row):
            kept.zero_()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a step reads, and the first of them."""
        return self._cache.current.width, 0

    def get_seq_length(self) -> int:
        """Tokens of the longest row."""
        return max(self._cache.lengths, default=0)

    def get_max_length(self) -> int:
        """There is no maximum."""
        return -1


class KVCache(Cache):
    """A cache whose rows are freed and filled one by one; see the head of this module.

    Its book-keeping is on the host, so that a step needs no synchronisation.

    Args:
        grouped: rows may be of different widths, in row groups.
        fewest_rows: rows that there are at least, `FEWEST_ROWS` where every batch is to round alike; 1 wastes nothing
            on small batches.
        static: rows and their widths are powers of two, so that there are few shapes, all of one width.

    Attributes:
        lengths: tokens that each row holds; -1 = the row is free.
        offsets: what each row adds to the number of a token to get its position (Qwen-VL's rope delta; else 0).
        layout: where each row lies: its width, the columns before it, and the rows of the same width.
        current: where the tokens of the forward in progress, or of the last one, go.
    """

    layers: list[KVCacheLayer]  # type: ignore[assignment]
    current: Placement

    def __init__(self, grouped: bool = False, fewest_rows: int = FEWEST_ROWS, static: bool = False) -> None:
        super().__init__(layers=[])
        self.grouped = grouped
        self.static = static
        self._fewest_rows = fewest_rows
        self.lengths: list[int] = []
        self.offsets: list[int] = []
        self.layout = RowLayout()
        self._new_lines: dict[int, Tensor] = {}  # of the current placement, by number of heads
        self._spare: dict[tuple[int, torch.dtype], Tensor] = {}  # memory that the last layout left behind

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
        self.layers.extend(KVCacheLayer(self) for _ in range(len(self.layers), count))

    # -- layout ---

    def lay_out(self, order: Sequence[int], widths: Sequence[int]) -> None:
        """Lay rows out anew.

        Args:
            order: for each row, which one it was before; -1 = a new, free one. Rows left out are gone.
            widths: columns that each is to hold; what it holds now is kept in any case.
        """
        # 1. The columns that each row needs.
        order = list(order)
        needed = []
        for old_row, width in zip(order, widths, strict=True):
            held = self.lengths[old_row] if old_row >= 0 else 0
            needed.append(round_up(max(width, held, 1)))
        # 2. Free rows beside them, up to the fewest that there must be.
        count = max(self._fewest_rows, len(order))
        least_width = COLUMNS
        if self.static:
            count = round_up_to_power(count)
            least_width = round_up_to_power(max([LEAST_STATIC_WIDTH, *needed]))
        missing = count - len(order)
        order += [-1] * missing
        needed += [least_width] * missing
        # 3. Groups of rows of one width.
        one_group = RowGroup(0, count, max(least_width, *needed), 0)
        row_groups = cut_row_groups(needed) if self.grouped else [one_group]
        old, self.layout = self.layout, RowLayout.of_groups(row_groups)
        self.lengths = [self.lengths[row] if row >= 0 else -1 for row in order]
        self.offsets = [self.offsets[row] if row >= 0 else 0 for row in order]
        # 4. The lines of every layer to where their rows are now; new rows are set to zero.
        new_rows = [row for row, before in enumerate(order) if before < 0]
        layers = [layer for layer in self.layers if layer.is_initialized]
        for heads in {layer.heads for layer in layers}:
            sources = lines_before(old, self.layout, order, heads).to(layers[0].both[0].device)
            for layer in layers:
                if layer.heads == heads:
                    self._move_lines(layer, sources, new_rows)

    def _move_lines(self, layer: KVCacheLayer, sources: Tensor, new_rows: list[int]) -> None:
        """Bring the lines of a layer to their new places, into memory that the tensor moved before left behind."""
        for name, old in zip(("keys", "values"), layer.both, strict=True):
            kind = (old.shape[1], old.dtype)
            memory = self._spare.pop(kind, None)
            if memory is None or len(memory) < len(sources):
                room = len(sources) if self.static else len(sources) * 5 // 4  # so that the next layout fits too
                memory = old.new_zeros(room, old.shape[1])
            torch.index_select(old, 0, sources, out=memory[: len(sources)])
            self._spare[kind] = layer.memory[name]
            layer.hold(name, memory, len(sources))
        for row in new_rows:
            layer.wipe(row)

    # -- sequences ---

    def fill(
        self,
        rows: Sequence[int],
        prefill: Cache,
        prefill_rows: Sequence[int],
        length: int,
        offset: int = 0,
        start: int = 0,
    ) -> None:
        """Start sequences in rows.

        Args:
            rows: free rows; those that do not exist yet are made.
            prefill: cache of a prefill.
            prefill_rows: its row for each of ``rows``.
            length: tokens to take.
            offset: see `offsets`.
            start: column of the prefill at which its rows begin; padding stands before.
        """
        missing = max(0, max(rows) + 1 - self.rows)
        if missing or any(self.layout.widths[row] <= length for row in rows):
            widths = [*self.layout.widths, *[1] * missing]
            for row in rows:
                widths[row] = max(widths[row], length + 1)
            self.lay_out([*range(self.rows), *[-1] * missing], widths)
        if length:
            self._grow_layers(len(prefill.layers))
            for layer, source in zip(self.layers, prefill.layers, strict=True):
                layer.fill(rows, source, prefill_rows, slice(start, start + length))
        for row in rows:
            self.lengths[row] = length
            self.offsets[row] = offset

    def free(self, row: int, *, wipe: bool = False) -> None:
        """Give a row back; ``wipe`` where it may hold NaN, which would spread through the weight 0 of its columns."""
        self.lengths[row] = -1
        self.offsets[row] = 0
        if wipe:
            for layer in self.layers:
                layer.wipe(row)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every row in use; their columns are masked until they are written again."""
        count = abs(tokens_to_remove)
        self.lengths = [max(length - count, 0) if length >= 0 else -1 for length in self.lengths]

    def append(self, tokens: int, device: torch.device | str = "cpu", present: Tensor | None = None) -> Placement:
        """Make room for new tokens in every row in use, count them in, and say where they go.

        Args:
            tokens: T, the same for all rows.
            device: of the tensors of the placement.
            present: False = a token that is not there: its column keeps what it holds. All are there where None.
                Shape (B, T).

        Returns:
            Of all rows; free ones write into their first columns.
        """
        ends = [max(length, 0) + tokens for length in self.lengths]
        if not ends or any(end > width for end, width in zip(ends, self.layout.widths, strict=True)):
            widths = []
            for end, width in zip(ends, self.layout.widths, strict=True):
                # Longer by a quarter at least, so that growing costs little in the long run.
                widths.append(end + max(COLUMNS, end // 4) if end > width else width)
            self.lay_out(range(self.rows), widths)
            ends = [max(length, 0) + tokens for length in self.lengths]
        starts = torch.tensor([end - tokens for end in ends])
        both = torch.stack([starts, starts + torch.tensor(self.offsets)]).to(device, non_blocking=True)
        columns = both[0][:, None] + torch.arange(tokens, device=device)
        kept = None if present is None else present.flatten().nonzero().flatten()
        self.current = Placement(columns, both[1], max(self.layout.widths), kept)
        self._new_lines.clear()
        self.lengths = [length + tokens if length >= 0 else -1 for length in self.lengths]
        return self.current

    def new_lines(self, heads: int) -> Tensor:
        """Lines that the new tokens of the current forward are written to, in their order in `KVCacheLayer.update`.

        Shape (B * heads * T,) or, where only N of them are there, (heads * N,), int64.
        """
        if heads not in self._new_lines:
            columns, kept = self.current.columns, self.current.kept  # (B, T), (N,)
            layout = torch.tensor([self.layout.row_starts, self.layout.widths], device=columns.device)
            row_start, width = layout[0][:, None] * heads, layout[1][:, None]
            head_start = row_start + torch.arange(heads, device=columns.device) * width  # (B, heads)
            if kept is None:
                lines = head_start[:, :, None] + columns[:, None]
            else:
                lines = head_start[kept // columns.shape[1]].T + columns.flatten()[kept]
            self._new_lines[heads] = lines.flatten()
        return self._new_lines[heads]
