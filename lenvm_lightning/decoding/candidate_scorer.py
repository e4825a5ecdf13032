"""A length value model beside a generator that writes: one forward a step scores every candidate for the next token.

The token chosen last goes through the model together with the K candidates for the next one: the chosen token sees the
prefix, each candidate sees the prefix, the chosen token and itself. Then the candidates are cropped off the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..guidance import Control
from ..models.value_model import LengthValueModel
from ..tree import tree_layout
from .batched_controls import per_row
from .end_tokens import EndTokens
from .kv_layout import round_up_to_power
from .model_runner import ModelRunner
from .sampling import RowParams, candidates, sample_candidates, sample_tokens
from .sampling_params import SamplingParams

MOST_CANDIDATES = 64  # likeliest tokens that are scored at most: beyond them lies next to no probability


@dataclass(frozen=True)
class StepResult:
    """What one step decided.

    Attributes:
        tokens: chosen, -1 where logits, values or what a control made of them are NaN or leave none. Shape (B,), int64.
        logprobs: that the generator's logits give them, before temperature, truncation and control. Shape (B,).
        before: remaining tokens at the state in which they were chosen. Shape (B,).
        after: remaining tokens after them, as predicted for the chosen candidate; in rows without a control, where
            it may be none of the candidates, and in those with one candidate, one less than before. Shape (B,).
        ids: of the candidates, the likeliest first. Shape (B, K).
        probs: of the base model, 0 where a row has fewer candidates, or nothing to choose among. Shape (B, K).
        remaining: tokens that would follow each candidate. Shape (B, K).
        guided: what was sampled from. Shape (B, K).
    """

    tokens: Tensor
    logprobs: Tensor
    before: Tensor
    after: Tensor
    ids: Tensor
    probs: Tensor
    remaining: Tensor
    guided: Tensor


class RowRules:
    """How the rows of a batch are written: params and controls, made ready once for many steps.

    Args:
        params: of each row; None for a row that nothing is written in.
        controls: of each row; None leaves it to the base model.
        device: of the logits.

    Attributes:
        params: of each row, as columns.
        control: one for all rows that have any, see `per_row`.
        guided: True = the row has a control. Shape (B,).
        most_candidates: tokens to look at in a step.
        unguided: rows without a control, int64, with their params: those of the same params together.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams | None],
        controls: Sequence[Control | None],
        device: torch.device | str = "cpu",
    ) -> None:
        self.params = RowParams([one or SamplingParams(top_k=1) for one in params], device)
        self.control = per_row(controls, device)
        self.guided = torch.tensor([control is not None for control in controls], device=device)
        wanted = [one.top_k or MOST_CANDIDATES for one in self.params.params]
        self.most_candidates = min(MOST_CANDIDATES, max(wanted, default=1))
        groups: dict[tuple[float, ...], tuple[SamplingParams, list[int]]] = {}
        for row, (one, control) in enumerate(zip(params, controls, strict=True)):
            if control is None and one is not None:
                groups.setdefault(one.truncation, (one, []))[1].append(row)
        self.unguided = [(torch.tensor(rows, device=device), one) for one, rows in groups.values()]


class CandidateScorer:
    """The length value model's side of guided decoding; its rows are those of the generator.

    Args:
        lenvm: in eval mode.
        fewest_rows: of the caches of both models, see `KVCache`.
        compiled: see `ModelRunner`; so many candidates are scored then that there are few shapes.

    Raises:
        ValueError: a `KVCache` cannot hold what its layers keep.
    """

    def __init__(self, lenvm: LengthValueModel, fewest_rows: int = 1, compiled: bool = False) -> None:
        self.lenvm = lenvm
        self.compiled = compiled
        self.runner = ModelRunner(lenvm.backbone, compiled)
        self.cache = self.runner.new_cache(fewest_rows)

    def score(
        self, last_tokens: Tensor, ids: Tensor, ends: Tensor, wanted: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Append the tokens chosen last, and say how much would follow each candidate for the next one.

        Args:
            last_tokens: of each row of the cache. Shape (B, 1).
            ids: candidates. Shape (B, K), K may be 0.
            ends: True = an end token, after which nothing follows. Shape (B, K).
            wanted: False = a candidate that nobody asks for; all are scored where None. Shape (B, K).

        Returns:
            Remaining tokens after each candidate, exactly 0 after an end, and one less than before where it is not
            wanted, shape (B, K); and before them, at the state that ``last_tokens`` lead to, shape (B,).
        """
        count = ids.shape[1] if wanted is None or bool(wanted.any()) else 0
        device = self.lenvm.backbone.device
        within, depth = _star(count, device)
        tokens = torch.cat([last_tokens, ids[:, :count]], dim=1).to(device, non_blocking=True)
        present = None
        if wanted is not None and self.runner.leaves_out:
            used = torch.tensor(self.cache.lengths)[:, None] >= 0
            present = torch.cat([used, wanted[:, :count]], dim=1)
        hidden = self.runner.forward(self.cache, tokens, within, depth, present).last_hidden_state
        self.cache.crop(count)
        remaining = self.lenvm.remaining(self.lenvm.v_head(hidden)).to(ids.device)
        if present is not None:
            remaining = remaining.new_zeros(present.shape).masked_scatter(present, remaining)
        before = remaining[:, 0]
        after = (before - 1).clamp(min=0)[:, None].expand_as(ids)
        if count:
            after = remaining[:, 1:] if wanted is None else torch.where(wanted, remaining[:, 1:], after)
        return after.masked_fill(ends, 0.0), before

    def choose(
        self,
        last_tokens: Tensor,
        logits: Tensor,
        uniforms: Tensor,
        generated: Tensor,
        rules: RowRules,
        end_tokens: EndTokens,
        forbidden: Tensor | None,
    ) -> StepResult:
        """Choose the next token of every row.

        Args:
            last_tokens: chosen by the step before. Shape (B, 1).
            logits: of the generator, after ``last_tokens``. Shape (B, V).
            uniforms: one number in [0, 1) a row. Shape (B,), float64.
            generated: tokens written so far. Shape (B,).
            rules: of each row.
            end_tokens: of each row.
            forbidden: ids that are never sampled. Shape (n,), int64.
        """
        # 1. What truncation leaves of the tokens that may come, and how many columns of it have to be scored.
        narrow = self._may_narrow(logits)
        early, due = end_tokens.told_by(rules.control, generated)
        some_early = bool(end_tokens) and (not narrow or bool(early.any()))
        may_come = end_tokens.left_in(logits, early, some_early)
        ids, probs = candidates(may_come, rules.params, self._most_candidates(rules), forbidden)
        counts = (probs > 0).sum(-1)
        chooses = rules.guided & ((counts != 1) | due)  # none at all is NaN, which is passed on
        if narrow:
            columns = max(1, int((counts * chooses).amax()))
            ids, probs = ids[:, :columns], probs[:, :columns]
        # 2. How much would follow each candidate of the rows in which a control has something to choose among.
        ends = end_tokens.among(ids)
        wanted = chooses[:, None] & (probs > 0) & ~ends if narrow else None
        remaining, before = self.score(last_tokens, ids, ends, wanted)
        remaining = remaining.to(probs.dtype)
        # 3. An end that is due is a candidate too. What the controls make of them; nothing comes back that is none.
        if end_tokens and (not narrow or bool(due.any())):
            ids, probs, remaining = _with_end(ids, probs, remaining, logits, due, rules.params.temperature, end_tokens)
        guided = torch.where(chooses[:, None], rules.control(probs, remaining, generated, self.lenvm.gamma), probs)
        guided = end_tokens.forced(probs, ids, guided, due)
        guided = guided.masked_fill(probs <= 0, 0.0)
        # 4. One candidate of each row.
        sampled = sample_candidates(ids, guided, uniforms)
        place = torch.where(rules.params.greedy, guided.argmax(-1), sampled)[:, None]
        tokens = ids.gather(1, place)
        # 5. Its log-probability, and whether all numbers on the way were sound.
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))  # a whole vocabulary in float64 is slow
        logprobs = wide.gather(1, tokens).double() - wide.logsumexp(-1, keepdim=True).double()
        mass = guided.sum(-1, keepdim=True)
        sound = logprobs.isfinite() & mass.isfinite() & (mass > 0)
        tokens, logprobs = tokens.masked_fill(~sound, -1).squeeze(1), logprobs.squeeze(1)
        # 6. Rows without a control: what the base model samples on its own, bit for bit.
        for rows, params in rules.unguided:
            tokens[rows], logprobs[rows] = sample_tokens(logits[rows], uniforms[rows], params, forbidden)
        # 7. What remains after the tokens that were chosen.
        of_chosen = remaining.gather(1, place).squeeze(1)
        after = torch.where(chooses, of_chosen, (before - 1).clamp(min=0))
        after = after.masked_fill(torch.isin(tokens, end_tokens.stop_ids), 0.0)
        shown = probs.masked_fill(~chooses[:, None], 0.0)
        return StepResult(tokens, logprobs, before, after, ids, shown, remaining, guided)

    def _most_candidates(self, rules: RowRules) -> int:
        """Tokens to look at; where steps are compiled, with the token chosen last a power of two."""
        most = rules.most_candidates
        return min(round_up_to_power(most + 1) - 1, MOST_CANDIDATES) if self.compiled else most

    def _may_narrow(self, logits: Tensor) -> bool:
        """Whether the number of columns may differ from step to step: not where that means a wait or a new shape."""
        return logits.device.type == "cpu" and not self.compiled


def _with_end(
    ids: Tensor,
    probs: Tensor,
    remaining: Tensor,
    logits: Tensor,
    due: Tensor,
    temperature: Tensor,
    end_tokens: EndTokens,
) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates with one more column: the likeliest end token, where the end is due and truncation has left it out.

    Args:
        ids: candidates, the likeliest first. Shape (B, K).
        probs: shape (B, K).
        remaining: shape (B, K).
        logits: of the generator. Shape (B, V).
        due: True = the end is due. Shape (B,).
        temperature: shape (B, 1).
        end_tokens: of each row.

    Returns:
        The three, shape (B, K + 1). An end that is brought in has the probability that the generator gives it beside
        the candidates, and 0 tokens follow it.
    """
    end_ids, best = end_tokens.likeliest(logits)
    beside_first = ((best - logits.gather(1, ids[:, :1]).double()) / temperature).exp()
    offered = (end_tokens.brought(ids) & (probs > 0)).any(-1, keepdim=True)
    smallest = torch.finfo(probs.dtype).tiny  # an end that is due is never impossible
    end = torch.where(due[:, None] & ~offered, (probs[:, :1] * beside_first).clamp(min=smallest), 0.0)
    after = torch.where(end_tokens.among(end_ids), 0.0, 1.0).to(probs.dtype)
    ids = torch.cat([ids, end_ids], 1)
    probs = torch.cat([probs, end], 1) / (1.0 + end)
    return ids, probs, torch.cat([remaining, after], 1)


@lru_cache(maxsize=64)
def _star(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The tree of a step: one token, and ``count`` that follow it."""
    seen, depth = tree_layout([-1, *[0] * count])
    return seen.to(device), depth.to(device)
