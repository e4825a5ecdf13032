"""A length value model beside a generator that writes: one forward a step scores every candidate for the next token.

The token chosen last goes through the model together with the K candidates for the next one: the chosen token sees the
prefix, each candidate sees the prefix, the chosen token and itself. Then the candidates are cropped off the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..guidance import Control
from ..models.value_model import LengthValueModel
from ..tree import tree_layout
from .batched_controls import per_row
from .kv_cache import round_up_to_power
from .model_runner import SlotDecoder
from .sampling import candidates, choose, draw
from .sampling_params import SamplingParams

MOST_CANDIDATES = 64  # likeliest tokens that are scored at most


@dataclass(frozen=True)
class Choice:
    """What one step decided.

    Attributes:
        tokens: drawn, -1 where logits, values or what a control made of them are NaN or leave none. Shape (B,), int64.
        logprobs: that the generator's logits give them, before temperature, truncation and control. Shape (B,).
        before: remaining tokens at the state in which they were drawn. Shape (B,).
        after: remaining tokens after them. Shape (B,).
        ids: of the candidates, the likeliest first. Shape (B, K), K = 0 where no row had to be scored.
        probs: of the base model, 0 where a row has fewer candidates. Shape (B, K).
        remaining: tokens that would follow each candidate. Shape (B, K).
        guided: what was drawn from. Shape (B, K).
    """

    tokens: Tensor
    logprobs: Tensor
    before: Tensor
    after: Tensor
    ids: Tensor
    probs: Tensor
    remaining: Tensor
    guided: Tensor


class Guide:
    """The length value model's side of guided decoding; its rows are those of the generator.

    Args:
        lenvm: in eval mode.
        fewest_rows: of the caches of both models, see `SlotCache`.
        compiled: see `SlotDecoder`; so many candidates are scored then that there are
            few shapes.

    Raises:
        ValueError: its layers keep no slots.
    """

    def __init__(self, lenvm: LengthValueModel, fewest_rows: int = 1, compiled: bool = False) -> None:
        self.lenvm = lenvm
        self.compiled = compiled
        self.decoder = SlotDecoder(lenvm.backbone, compiled)
        self.fewest_rows = fewest_rows
        self.cache = self.decoder.slots(fewest_rows)

    def moved(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs where the model is, in its dtype."""
        backbone = self.lenvm.backbone
        return {
            name: value.to(backbone.device, backbone.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }

    def score(self, feed: Tensor, ids: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Append the tokens chosen last, and say how much would follow each candidate for the next one.

        Args:
            feed: the token chosen last, of each row of the cache. Shape (B, 1).
            ids: candidates. Shape (B, K), K may be 0.
            ends: True = an end token, after which nothing follows. Shape (B, K).

        Returns:
            Remaining tokens after each candidate, exactly 0 after an end, shape (B, K); and before them, at the state
            that ``feed`` leads to, shape (B,).
        """
        count = ids.shape[1]
        device = self.lenvm.backbone.device
        within, depth = _star(count, device)
        tokens = torch.cat([feed, ids], dim=1).to(device, non_blocking=True)
        hidden = self.decoder.forward(self.cache, tokens, within, depth).last_hidden_state
        self.cache.crop(count)
        remaining = self.lenvm.remaining(self.lenvm.v_head(hidden)).to(ids.device)
        return remaining[:, 1:].masked_fill(ends, 0.0), remaining[:, 0]

    def choose(
        self,
        feed: Tensor,
        logits: Tensor,
        uniforms: Tensor,
        generated: Tensor,
        rules: "Rules",
        stop: Tensor,
        forbidden: Tensor | None,
    ) -> Choice:
        """Draw the next token of every row.

        Args:
            feed: the token chosen last. Shape (B, 1).
            logits: of the generator, after ``feed``. Shape (B, V).
            uniforms: one number in [0, 1) a row. Shape (B,), float64.
            generated: tokens written so far. Shape (B,).
            rules: of each row.
            stop: ids of end tokens. Shape (n,), int64.
            forbidden: ids that are never drawn. Shape (n,), int64.
        """
        most = rules.most_candidates
        if self.compiled:  # with the token chosen last, a power of two
            most = min(round_up_to_power(most + 1) - 1, MOST_CANDIDATES)
        ids, probs = candidates(logits, rules.drawings, most, forbidden)
        decides = rules.guided & ((probs > 0).sum(-1) != 1)  # NaN is passed on
        if logits.device.type == "cpu" and not self.compiled:  # as few as are needed; else one shape and no wait
            width = int(((probs > 0).sum(-1) * decides).amax()) if bool(decides.any()) else 0
            ids, probs = ids[:, : max(width, 1)], probs[:, : max(width, 1)]
        else:
            width = ids.shape[1]
        ends = torch.isin(ids, stop)
        remaining, before = self.score(feed, ids[:, :width], ends[:, :width])
        if not width:
            remaining = torch.where(ends, 0.0, (before - 1).clamp(min=0)[:, None])
        remaining = remaining.to(probs.dtype)
        guided = rules.control(probs, remaining, generated, self.lenvm.gamma) if width else probs
        guided = guided.masked_fill(probs <= 0, 0.0)  # whatever a control thinks of what truncation has left out
        place = torch.where(rules.greedy, guided.argmax(-1), choose(ids, guided, uniforms))[:, None]
        tokens = ids.gather(1, place)
        wide = logits.to(
            torch.promote_types(logits.dtype, torch.float32)
        )  # a vocabulary in float64 takes longer than its top-k
        logprobs = wide.gather(1, tokens).double() - wide.logsumexp(-1, keepdim=True).double()
        mass = guided.sum(-1, keepdim=True)
        sound = logprobs.isfinite() & mass.isfinite() & (mass > 0)
        tokens, logprobs = tokens.masked_fill(~sound, -1).squeeze(1), logprobs.squeeze(1)
        for part, drawing in rules.unguided:  # the very draws of the base model
            drawn = draw(logits[part], uniforms[part], drawing, forbidden)
            tokens[part], logprobs[part] = drawn
        after = torch.where(rules.guided, remaining.gather(1, place).squeeze(1), (before - 1).clamp(min=0))
        after = after.masked_fill(torch.isin(tokens, stop), 0.0)
        return Choice(tokens, logprobs, before, after, ids[:, :width], probs[:, :width], remaining[:, :width], guided)


class Rules:
    """How the rows of a batch are drawn: settings and controls, made ready once for many steps.

    Args:
        drawings: settings of each row; None for one that nothing is drawn for.
        controls: control of each row; None leaves it to the base model.
        device: of the logits.
    """

    def __init__(
        self,
        drawings: Sequence[SamplingParams | None],
        controls: Sequence[Control | None],
        device: torch.device | str = "cpu",
    ) -> None:
        self.drawings = [drawing or SamplingParams(top_k=1) for drawing in drawings]
        self.control = per_row(controls, device)
        self.guided = torch.tensor([control is not None for control in controls], device=device)
        self.greedy = torch.tensor([drawing.temperature == 0 for drawing in self.drawings], device=device)
        kept = [drawing.top_k or MOST_CANDIDATES for drawing in self.drawings]
        self.most_candidates = min(MOST_CANDIDATES, max(kept, default=1))
        groups: dict[SamplingParams, list[int]] = {}
        for row, (drawing, control) in enumerate(zip(drawings, controls, strict=True)):
            if control is None and drawing is not None:
                groups.setdefault(drawing, []).append(row)
        self.unguided = [(torch.tensor(rows, device=device), drawing) for drawing, rows in groups.items()]


@lru_cache(maxsize=64)
def _star(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    seen, depth = tree_layout([-1, *[0] * count])
    return seen.to(device), depth.to(device)
