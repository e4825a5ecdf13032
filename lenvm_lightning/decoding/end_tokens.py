"""Which tokens end what a control counts to: a completion, or a segment of it."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..guidance import Ends
from ..reweighting import end_where_due
from .batched_controls import PerRow
from .segments import Segment


class EndTokens:
    """Those of completions, the same in all rows.

    Args:
        stop_ids: ids that end a completion. Shape (n,), int64; n may be 0.
    """

    def __init__(self, stop_ids: Tensor) -> None:
        self.stop_ids = stop_ids

    def __bool__(self) -> bool:
        return len(self.stop_ids) > 0

    def told_by(self, control: PerRow, generated: Tensor) -> Ends:
        """What the controls say of the end of each row."""
        return control.ends(generated)

    def left_in(self, logits: Tensor, early: Tensor, some_early: bool) -> Tensor:
        """Logits without end tokens in the rows that may not end yet; the very tensor where none has to.

        Args:
            logits: of the generator. Shape (B, V).
            early: True = the row may not end yet. Shape (B,).
            some_early: False = none of them, for all that is known without a wait for the device.
        """
        if not some_early:
            return logits
        ends = logits[:, self.stop_ids].masked_fill(early[:, None], -torch.inf)
        return logits.index_copy(1, self.stop_ids, ends)

    def among(self, ids: Tensor) -> Tensor:
        """True = an end token. Shape (B, K) as ``ids``."""
        return torch.isin(ids, self.stop_ids)

    def brought(self, ids: Tensor) -> Tensor:
        """True = one of the tokens that are brought in where the end is due. Shape (B, K) as ``ids``."""
        return self.among(ids)

    def likeliest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest of the tokens that are brought in, and its logit. Shapes (B, 1), the second float64."""
        best, place = logits[:, self.stop_ids].double().max(-1, keepdim=True)
        return self.stop_ids[place], best

    def forced(self, probs: Tensor, ids: Tensor, guided: Tensor, due: Tensor) -> Tensor:
        """What to sample from, where the end takes a token of its own. Shape (B, K) as ``guided``."""
        return guided


class SegmentEnds(EndTokens):
    """Where the segments of some rows are open: the tokens that close them.

    A text of several tokens is due so early that all of them have room, from wherever a part of it is written; then
    they follow one another. An end of the whole completion ends the segment, too, but is a candidate only where it is
    the likeliest token of all: a control that pulls at what is short would end the text before its answer.

    Args:
        stop_ids: ids that end a completion. Shape (n,), int64.
        open_rows: segment of each row that has an open one, and how much of its text is written, see `Segment.place`.
        shape: of the logits, (B, V).
        device: of the logits.
    """

    def __init__(
        self,
        stop_ids: Tensor,
        open_rows: Mapping[int, tuple[Segment, int]],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(stop_ids)
        is_open = torch.zeros(shape[0], dtype=torch.bool)
        more = torch.zeros(shape[0], dtype=torch.int64)
        closing: dict[int, Tensor] = {}
        brought: dict[int, Tensor] = {}
        for row, (segment, place) in open_rows.items():
            is_open[row] = True
            more[row] = segment.tokens - 1
            closing[row] = ids = segment.closing(place)
            brought[row] = ids if len(ids) else torch.tensor([segment.next_id(place)])
        self._open, self._more = is_open.to(device), more.to(device)  # (B,)
        self._closing, self._brought = _mask(closing, shape, device), _mask(brought, shape, device)  # (B, V)

    def __bool__(self) -> bool:
        return True

    @cached_property
    def _ends(self) -> Tensor:
        """True = an end token of the row. Shape (B, V)."""
        return self._closing.index_fill(1, self.stop_ids, True)

    @cached_property
    def _brought_in(self) -> Tensor:
        """True = brought in where the end of the row is due. Shape (B, V)."""
        of_completions = torch.zeros_like(self._brought).index_fill_(1, self.stop_ids, True)
        return torch.where(self._open[:, None], self._brought, of_completions)

    def told_by(self, control: PerRow, generated: Tensor) -> Ends:
        """What the controls say of the end of each row; a text of several tokens is due with the first of them."""
        return Ends(control.ends(generated).early, control.ends(generated + self._more).due)

    def left_in(self, logits: Tensor, early: Tensor, some_early: bool) -> Tensor:
        """Logits without the end tokens that may not come; see `EndTokens`."""
        would_end = torch.isin(logits.argmax(-1), self.stop_ids)
        barred = self._ends & early[:, None]
        if len(self.stop_ids):
            of_completions = barred[:, self.stop_ids] | (self._open & ~would_end)[:, None]
            barred = barred.index_copy(1, self.stop_ids, of_completions)
        return logits.masked_fill(barred, -torch.inf)

    def among(self, ids: Tensor) -> Tensor:
        """True = an end token of its row."""
        return self._ends.gather(1, ids)

    def brought(self, ids: Tensor) -> Tensor:
        """True = brought in where the end of its row is due."""
        return self._brought_in.gather(1, ids)

    def likeliest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest of the tokens that are brought in; one without any brings in what nobody asks for."""
        best, ids = logits.masked_fill(~self._brought_in, -torch.inf).double().max(-1, keepdim=True)
        return ids, best

    def forced(self, probs: Tensor, ids: Tensor, guided: Tensor, due: Tensor) -> Tensor:
        """The next token of a text of several, where that is due: no control knows of it."""
        of_text = self.brought(ids)
        next_only = end_where_due(probs, (~of_text).to(probs.dtype), due)
        return torch.where((self._open & (self._more > 0) & due)[:, None], next_only, guided)


def _mask(ids: Mapping[int, Tensor], shape: Sequence[int], device: torch.device | str) -> Tensor:
    """True = one of the ids of the row. Shape (B, V)."""
    rows = torch.cat([torch.full_like(of_row, row) for row, of_row in ids.items()])
    places = torch.stack([rows, torch.cat(list(ids.values()))]).to(device)
    mask = torch.zeros(*shape, dtype=torch.bool, device=device)
    mask[places[0], places[1]] = True
    return mask
