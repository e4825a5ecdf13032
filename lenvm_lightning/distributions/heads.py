"""What a distributional head predicts beside the value, and how it learns: bins, quantiles or several discounts.

| kind | output k | loss | a truncated completion |
|---|---|---|---|
| bins | log-odds of the k-th range of lengths | cross entropy | counts as longer than what was seen |
| quantiles | distance to the next quantile, in log(1 + tokens) | pinball | errors are quantiles below what was seen |
| discounts | logit of 1 - E[gamma_k ** remaining] | cross entropy of a share | as the value head treats it |

To add a kind, write a class with the methods of `LengthRule` and name it in `HeadKind`, `make_rule` and
`rule_from_plain`; its test is `tests/maths/test_distribution_heads.py`.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.settings import is_integer, is_number
from ..values import inverse_softplus, softplus
from .length_distribution import LengthDistribution, from_quantiles

HeadKind = Literal["point", "bins", "quantiles", "discounts"]
_MOST_TOKENS = 2**31
_INVERSIONS = 200  # of Richardson and Lucy: 16 discounts of geometric lengths are met to .0006 by then, to .002 by 50


@dataclass(frozen=True)
class HeadConfig:
    """What the model predicts of the lengths that may follow.

    Attributes:
        kind: `point` = the value alone, the paper's; else a second head beside it predicts their distribution, see the
            table in `distributions/heads.py`.
        size: its bins, quantiles or discounts.
        weight: of its loss beside that of the value. Gradients are clipped by the norm of all of them, and those of a
            cross entropy are large beside those of values: at 1 they leave the value little to learn by.
        detached: True = it learns from the backbone as it is, and leaves the value as it would be without it, but for
            that clipping.
    """

    kind: HeadKind = "point"
    size: int = 32
    weight: float = 0.01
    detached: bool = False

    def problems(self) -> list[str]:
        """What is wrong with the settings, in words, all at once."""
        found = []
        if self.kind not in get_args(HeadKind):
            found.append(f"head.kind must be one of {', '.join(get_args(HeadKind))}; got {self.kind}")
        if not 2 <= self.size <= 1024:
            found.append(f"head.size must lie between 2 and 1024, got {self.size}")
        if not 0.0 < self.weight < math.inf:
            found.append(f"head.weight must be positive, got {self.weight}")
        return found


class LengthRule(Protocol):
    """What the outputs of a distributional head mean."""

    kind: ClassVar[str]

    @property
    def size(self) -> int:
        """Outputs K of the head."""

    def start(self, mean: float) -> Tensor:
        """Outputs that predict a geometric length of this mean: where a fresh head starts. Shape (K,)."""

    def losses(self, outputs: Tensor, remaining: Tensor, truncated: Tensor, supervised: Tensor) -> Tensor:
        """Loss of every state.

        Args:
            outputs: of the head. Shape (B, T, K).
            remaining: tokens to the end of what was seen. Shape (B, T).
            truncated: True = more than that follow. Shape (B, 1).
            supervised: what remains, with truncated completions as the settings of the value treat them, for kinds
                that have no likelihood of their own. Shape (B, T).

        Returns:
            Shape (B, T), float32 or better.
        """

    def distribution(self, outputs: Tensor) -> LengthDistribution:
        """The distribution that outputs (..., K) predict."""


def log_spaced_edges(size: int, longest: int) -> tuple[int, ...]:
    """Upper ends of `size` ranges of whole numbers, the first {0}, the last up to `longest`, about alike in log.

    Where `longest` is smaller than `size`, there are only as many as there are numbers.
    """
    edges = [0]
    while edges[-1] < longest:
        left = max(size - len(edges), 1)
        last = edges[-1]
        step = round(last * (longest / last) ** (1 / left)) if last else 1
        edges.append(min(max(step, last + 1), longest))
    return tuple(edges)


@dataclass(frozen=True)
class Bins:
    """The share of continuations in each range of lengths, and beyond all of them.

    Range k holds the whole numbers above edge k - 1 and up to edge k; the last range is open.

    Attributes:
        edges: upper ends, ascending from 0.
        tail: mean tokens beyond the last edge, for those that get there: an assumption, as nothing was seen there.
    """

    kind: ClassVar[str] = "bins"
    edges: tuple[int, ...]
    tail: float

    @property
    def size(self) -> int:
        """Outputs K of the head."""
        return len(self.edges) + 1

    def start(self, mean: float) -> Tensor:
        """Outputs that predict a geometric length of this mean. Shape (K,)."""
        edge = torch.tensor(self.edges, dtype=torch.float64)
        longer = torch.exp(-(edge + 1.0) / max(mean, 1.0))  # a length of 0 is rare, too
        share = torch.cat([1.0 - longer[:1], longer[:-1] - longer[1:], longer[-1:]])
        return torch.log(share.clamp(min=1e-6)).float()

    def losses(self, outputs: Tensor, remaining: Tensor, truncated: Tensor, supervised: Tensor) -> Tensor:
        """`-log P(range of r)`, or of truncated completions `-log P(more than r follow)`; see `LengthRule`."""
        edge = torch.tensor(self.edges, dtype=torch.float64, device=outputs.device)
        r = remaining.clamp(min=0).to(torch.float64)[..., None]  # (B, T, 1); below 0 is the padding of others
        lower = torch.cat([edge.new_full((1,), -1.0), edge])  # (K,)
        upper = torch.cat([edge, edge.new_full((1,), math.inf)])
        inside = (r > lower) & (r <= upper)  # (B, T, K), one True each
        # Of the range that r lies in, the share above r; of those above, everything. The open range counts whole.
        above = torch.where(torch.isinf(upper), 1.0, (upper - r) / (upper - lower)).clamp(0.0, 1.0)
        weight = torch.where(truncated[..., None], torch.where(r > upper, 0.0, above), inside.double())
        log_share = _as_float(outputs).log_softmax(-1)
        return -torch.logsumexp(log_share + torch.log(weight).to(log_share.dtype), dim=-1)

    def distribution(self, outputs: Tensor) -> LengthDistribution:
        """The distribution that outputs (..., K) predict."""
        share = _as_float(outputs).softmax(-1)
        longer = share.flip(-1).cumsum(-1).flip(-1)  # more than edge k - 1
        tokens = torch.tensor([-1, *self.edges], dtype=longer.dtype, device=longer.device)
        certain = torch.ones_like(longer[..., :1])
        return LengthDistribution(tokens, torch.cat([certain, longer[..., 1:]], -1).clamp(0.0, 1.0), self.tail)


@dataclass(frozen=True)
class Quantiles:
    """Quantiles of the length, in log(1 + tokens), each as its distance to the one before.

    Attributes:
        levels: in (0, 1), ascending.
    """

    kind: ClassVar[str] = "quantiles"
    levels: tuple[float, ...]

    @property
    def size(self) -> int:
        """Outputs K of the head."""
        return len(self.levels)

    def start(self, mean: float) -> Tensor:
        """Outputs that predict a geometric length of this mean. Shape (K,)."""
        level = torch.tensor(self.levels, dtype=torch.float64)
        log_tokens = torch.log1p(-max(mean, 1.0) * torch.log1p(-level))
        gaps = torch.diff(log_tokens, prepend=log_tokens.new_zeros(1)).clamp(min=1e-3)
        return inverse_softplus(gaps).float()

    def losses(self, outputs: Tensor, remaining: Tensor, truncated: Tensor, supervised: Tensor) -> Tensor:
        """Mean pinball loss of the levels; of truncated completions only of quantiles that are too short.

        That is too short for those that are beyond what was seen. `bins` have no such bias. See `LengthRule`.
        """
        predicted = self._log_tokens(outputs)
        level = predicted.new_tensor(self.levels)
        error = torch.log1p(remaining.to(predicted.dtype))[..., None] - predicted  # positive = predicted too short
        too_long = torch.where(truncated[..., None], 0.0, level - 1.0)
        return torch.where(error > 0, level * error, too_long * error).mean(-1)

    def distribution(self, outputs: Tensor) -> LengthDistribution:
        """The distribution that outputs (..., K) predict."""
        predicted = self._log_tokens(outputs)
        return from_quantiles(torch.expm1(predicted), predicted.new_tensor(self.levels))

    def _log_tokens(self, outputs: Tensor) -> Tensor:
        return softplus(outputs).cumsum(-1)


@dataclass(frozen=True)
class Discounts:
    """Values under several discounts: `1 - E[gamma_k ** r]`, that is, the Laplace transform of the length.

    Attributes:
        gammas: in (0, 1), ascending.
        edges: of the ranges in which the distribution is found again, ascending from 0.
        tail: mean tokens beyond the last edge, for those that get there.
    """

    kind: ClassVar[str] = "discounts"
    gammas: tuple[float, ...]
    edges: tuple[int, ...]
    tail: float

    @property
    def size(self) -> int:
        """Outputs K of the head."""
        return len(self.gammas)

    def start(self, mean: float) -> Tensor:
        """Outputs that predict a geometric length of this mean. Shape (K,)."""
        gamma = torch.tensor(self.gammas, dtype=torch.float64)
        ends = 1.0 / (max(mean, 1.0) + 1.0)  # a token: E[gamma ** r] = ends / (1 - (1 - ends) gamma), r from 0 on
        return torch.logit(1.0 - ends / (1.0 - (1.0 - ends) * gamma), eps=1e-6).float()

    def losses(self, outputs: Tensor, remaining: Tensor, truncated: Tensor, supervised: Tensor) -> Tensor:
        """Mean cross entropy of `1 - gamma_k ** r`, whose best prediction is its mean. See `LengthRule`."""
        outputs = _as_float(outputs)
        log_gamma = torch.log(torch.tensor(self.gammas, dtype=torch.float64, device=outputs.device))
        target = -torch.expm1(supervised.to(torch.float64)[..., None] * log_gamma)
        return F.binary_cross_entropy_with_logits(outputs, target.to(outputs.dtype), reduction="none").mean(-1)

    def distribution(self, outputs: Tensor) -> LengthDistribution:
        """Shares of ranges whose transform is nearest to the predicted one, by Richardson's and Lucy's iteration."""
        transform = torch.sigmoid(-_as_float(outputs).double()).clamp(min=1e-12)  # E[gamma_k ** r]
        gamma = torch.tensor(self.gammas, dtype=torch.float64, device=outputs.device)
        edge = torch.tensor([-1, *self.edges], dtype=torch.float64, device=outputs.device)
        middle = torch.cat([0.5 * (edge[:-1] + 1 + edge[1:]), edge[-1:] + self.tail])
        seen = gamma ** middle[:, None]  # of each range, in each discount. (ranges, K)
        # Every transform has a geometric length of its own; the iteration starts at the median one of a state.
        mean = ((1.0 / transform - 1.0) / (1.0 / gamma - 1.0)).median(-1, keepdim=True).values.clamp(min=0.5)
        longer = torch.exp(-(edge + 1.0) / mean)
        share = torch.cat([longer[..., :-1] - longer[..., 1:], longer[..., -1:]], dim=-1)
        for _ in range(_INVERSIONS):
            share = share * ((transform / (share @ seen)) @ seen.T) / seen.sum(-1)
        share = (share / share.sum(-1, keepdim=True)).to(_as_float(outputs).dtype)
        return Bins(self.edges, self.tail).distribution(torch.log(share.clamp(min=1e-30)))


def make_rule(kind: HeadKind, size: int, longest: int, tail: float | None) -> "LengthRule | None":
    """The rule of a fresh head.

    Args:
        kind: of head; `point` has none.
        size: outputs that are asked for.
        longest: tokens of the longest completion of the training data, the end included.
        tail: mean tokens beyond that, from `tail_after_cut`; half of `longest` where None.
    """
    if kind == "point":
        return None
    if kind == "quantiles":
        return Quantiles(tuple((k + 0.5) / size for k in range(size)))
    beyond = float(tail if tail is not None else max(longest / 2, 1.0))
    if kind == "bins":
        return Bins(log_spaced_edges(max(size - 1, 1), longest), beyond)
    horizons = torch.logspace(0.0, math.log10(2.0 * max(longest, 1)), size, dtype=torch.float64)
    return Discounts(tuple(torch.exp(-1.0 / horizons).tolist()), log_spaced_edges(32, longest), beyond)


def rule_to_plain(rule: Any) -> dict[str, Any]:
    """What `lenvm_config.json` says of a distributional head, whose `LengthRule` this is."""
    return {"kind": rule.kind, **dataclasses.asdict(rule)}


def rule_from_plain(plain: Mapping[str, Any]) -> LengthRule:
    """The rule again that `rule_to_plain` wrote down.

    Raises:
        ValueError: it says something else; the file may have been written by hand, or by a stranger.
    """
    kinds: dict[str, Any] = {"bins": Bins, "quantiles": Quantiles, "discounts": Discounts}
    entries = {name: value for name, value in plain.items() if name != "kind"}
    kind = kinds.get(str(plain.get("kind")))
    if kind is None or set(entries) != {field.name for field in dataclasses.fields(kind)}:
        raise ValueError(f"length_head must say kind ({', '.join(kinds)}) and what this kind needs")
    for name, value in entries.items():
        if name == "tail":
            _require(
                is_number(value) and 0 < value < _MOST_TOKENS, "length_head.tail must be a positive number of tokens"
            )
            continue
        if name == "edges":
            holds = _is_ascending(value) and all(map(is_integer, value)) and value[0] == 0 and value[-1] < _MOST_TOKENS
            _require(holds, "length_head.edges must be 2 to 1024 ascending whole numbers from 0")
        else:
            holds = _is_ascending(value) and value[0] > 0.0 and value[-1] < 1.0
            _require(holds, f"length_head.{name} must be 2 to 1024 ascending numbers between 0 and 1")
        entries[name] = tuple(value)
    found: LengthRule = kind(**entries)
    return found


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _is_ascending(value: Any) -> bool:
    """Whether it is a list of 2 to 1024 numbers, each above the one before."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not 2 <= len(value) <= 1024:
        return False
    return all(map(is_number, value)) and all(a < b for a, b in itertools.pairwise(value))


def _as_float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
