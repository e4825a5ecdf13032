"""The length value model's side of a batch that another engine writes.

That engine keeps its own keys and values, and asks at every step which tokens come next. Here each of its guided
requests has a row in the cache of the length value model: filled when it comes, stepped with the others, filled anew
when it was away. Choice and controls are those of `CandidateScorer`, so the same logits give the same tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

from ..decoding import compatibility
from ..decoding.candidate_scorer import RowRules
from ..decoding.end_tokens import EndTokens
from ..decoding.kv_layout import round_up
from ..decoding.model_runner import PADDING
from ..decoding.sampling_params import SamplingParams
from ..guidance import Control
from ..models.value_model import LengthValueModel

_PREFILL_TOKENS = 8192  # padded, of one forward
_SPARE_ROWS = 1.5  # rows for each request beyond which free ones are taken away


@dataclass(eq=False)
class GuidedRow:
    """A request that another engine writes, as far as its length is concerned.

    Attributes:
        prompt_ids: of its prompt.
        written: what the engine has written so far; its own list, which grows.
        control: of the length.
        params: how tokens are sampled.
        seed: of its random numbers.
        stop_ids: ids that end it.
        place: row of the cache; None while it has none.
    """

    prompt_ids: list[int]
    written: list[int]
    control: Control
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    place: int | None = None
    _uniforms: list[float] = field(default_factory=list)
    _random: Random | None = None

    @property
    def held(self) -> int:
        """Tokens that its row of the cache holds before a step: all but the last."""
        return len(self.prompt_ids) + len(self.written) - 1

    def ids(self) -> list[int]:
        """Prompt and what was written."""
        return [*self.prompt_ids, *self.written]

    def uniform(self) -> float:
        """The number that the next token is sampled with: one for each token, however often that is asked for."""
        self._random = self._random or Random(self.seed)
        while len(self._uniforms) <= len(self.written):
            self._uniforms.append(self._random.random())
        return self._uniforms[len(self.written)]


class GuidedRows:
    """Chooses the next tokens of requests that another engine writes.

    Args:
        lenvm: of the same vocabulary, in eval mode.
        forbidden: ids that are never chosen. Shape (n,), int64.

    Raises:
        GenerationError: the length value model cannot be decoded in rows of a cache.
    """

    def __init__(self, lenvm: LengthValueModel, forbidden: Tensor | None = None) -> None:
        self._scorer = compatibility.open_scorer(lenvm)
        self._cache = self._scorer.cache
        self._forbidden = forbidden
        self._rows: list[GuidedRow | None] = []  # of the cache
        self._rules: RowRules | None = None  # of the rows; None = they have changed

    def remove(self, row: GuidedRow) -> None:
        """Free the row of a request that has ended, was aborted, or will not be stepped for a while."""
        if row.place is not None:
            self._cache.free(row.place)
            self._rows[row.place] = None
            row.place = self._rules = None

    @torch.inference_mode()
    def choose(self, rows: Sequence[GuidedRow], logits: Tensor) -> Tensor:
        """Choose the next token of some requests.

        Args:
            rows: all that are written in this step; those that were and are not give their rows back.
            logits: of the generator, before temperature and truncation. Shape (len(rows), V).

        Returns:
            Ids, -1 where logits or values are not numbers or leave none. Shape (len(rows),), int64.
        """
        # 1. A row of the cache for each, holding all of its tokens but the last.
        here = set(map(id, rows))
        for row in self._rows:
            if row is not None and id(row) not in here:
                self.remove(row)
        for row in rows:
            self._set_back(row)
        self._drop_free_rows(len(rows))
        self._fill([row for row in rows if row.place is None])
        # 2. Everything in the order of the rows of the cache; free ones compute something that nobody reads.
        device = logits.device
        places = torch.tensor([row.place for row in rows], device=device)
        of_all = [(row.ids()[-1], len(row.written), row.uniform()) if row else (0, 0, 0.0) for row in self._rows]
        last, generated, uniforms = (torch.tensor(column, device=device) for column in zip(*of_all, strict=True))
        in_place = logits.new_zeros(len(self._rows), logits.shape[1])
        in_place[places] = logits
        # 3. The choice.
        rules = self._rules = self._rules or self._new_rules(device)
        result = self._scorer.choose(
            last[:, None], in_place, uniforms.double(), generated, rules, self._end_tokens(device), self._forbidden
        )
        return result.tokens[places]

    def _set_back(self, row: GuidedRow) -> None:
        """Forget the last token of a row whose last choice was not taken; give up one that has missed more."""
        if row.place is None:
            return
        more = self._cache.lengths[row.place] - row.held
        if more == 1:
            self._cache.lengths[row.place] -= 1
        elif more:
            self.remove(row)

    def _drop_free_rows(self, count: int) -> None:
        kept = [place for place, row in enumerate(self._rows) if row is not None]
        if len(self._rows) <= _SPARE_ROWS * max(count, 1) or not kept:
            return
        self._cache.lay_out(kept, [self._cache.layout.widths[place] for place in kept])
        found = [self._rows[place] for place in kept]
        self._rows = [*found, *[None] * (self._cache.rows - len(found))]
        for place, row in enumerate(found):
            assert row is not None
            row.place = place
        self._rules = None

    def _fill(self, rows: list[GuidedRow]) -> None:
        """Read prompts and what was written, and give each a row; those of one width together."""
        by_width: dict[int, list[GuidedRow]] = {}
        for row in rows:
            by_width.setdefault(round_up(row.held, PADDING), []).append(row)
        for width, some in by_width.items():
            count = max(1, _PREFILL_TOKENS // max(width, 1))
            for start in range(0, len(some), count):
                part = some[start : start + count]
                prefill = self._scorer.runner.prefill([row.ids()[:-1] for row in part])
                for number, row in enumerate(part):
                    self._place(row)
                    assert row.place is not None
                    self._cache.fill([row.place], prefill, [number], row.held)
                    self._rows += [None] * (self._cache.rows - len(self._rows))
                    self._rows[row.place] = row
        if rows:
            self._rules = None

    def _place(self, row: GuidedRow) -> None:
        free = (place for place, other in enumerate(self._rows) if other is None)
        row.place = next(free, len(self._rows))

    def _new_rules(self, device: torch.device) -> RowRules:
        params = [row.params if row else None for row in self._rows]
        return RowRules(params, [row.control if row else None for row in self._rows], device)

    def _end_tokens(self, device: torch.device) -> EndTokens:
        """What ends a completion: the same for all, as it comes from the model."""
        ids = frozenset().union(*(row.stop_ids for row in self._rows if row))
        return EndTokens(torch.tensor(sorted(ids), dtype=torch.int64, device=device))
