"""Decoding many sequences at once in :mod:`slots <lenvm_lightning.slots>`: prefill, and one step for all.

**New tokens.** Decoding a token and scoring K candidates are the same call: new tokens see what their row holds and, of
each other, what ``within`` says; what was only tried is cropped afterwards.

**Spans.** A cache is as wide as its longest row, and with a long tail of lengths most of what attention reads is
padding. On a CPU, where that reading is what attention costs, rows are kept in the order of their lengths, and
attention runs over spans of rows, each as wide as its own longest.

**The same bits.** On a CPU, :func:`slot_attention` gives a row the same bits whatever the other rows hold, however many
there are and however wide the cache is: it sums in blocks of a fixed size. Matrix products keep that up for batches of
:data:`~lenvm_lightning.slots.FEWEST_ROWS` rows and more (measured with MKL; torch promises nothing).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .slots import FEWEST_ROWS, SlotCache, Span, Step, round_up

_BLOCK = 128  # columns summed at once
_ATTENTION = "lenvm_slots"
_KINDS = ("full_attention", "sliding_attention", "chunked_attention")


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    slot_spans: list[Span] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over spans of slots; without spans, transformers' ``sdpa``.

    Query heads that share a key are packed, so that keys and values are read once and never repeated.

    Args:
        module: the attention layer.
        query: shape (B, heads, T, head size).
        key: shape (B, key-value heads, columns, head size).
        value: likewise.
        attention_mask: added to the scores: 0 or -inf. Shape (B, 1, T, columns).
        scaling: of the scores.
        slot_spans: which columns which rows read.
        kwargs: for ``sdpa``.

    Returns:
        Shape (B, T, heads, head size), and None for the weights.
    """
    if slot_spans is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    assert attention_mask is not None
    rows, heads, tokens, size = query.shape
    kept = key.shape[1]
    half = query.dtype in (torch.bfloat16, torch.float16)
    packed = (query * (size**-0.5 if scaling is None else scaling)).reshape(rows * kept, -1, size)
    output = query.new_empty(rows * kept, packed.shape[1], value.shape[-1])
    for span in slot_spans:
        count, width = span.stop - span.start, span.width
        keys, values = (t.narrow(0, span.start, count).flatten(0, 1).narrow(1, 0, width) for t in (key, value))
        part = packed.narrow(0, span.start * kept, count * kept)
        scores = torch.bmm(part, keys.transpose(1, 2))
        mask = attention_mask.narrow(0, span.start, count).narrow(3, 0, width)
        scores.view(count, kept, -1, tokens, width).add_(mask.unsqueeze(2))
        weights = scores.softmax(-1, dtype=torch.float32 if half else None).to(value.dtype)
        summed = output.narrow(0, span.start * kept, count * kept)
        # Not in one product: how it splits a sum over all columns, and so how that rounds, depends on their number.
        torch.bmm(weights.narrow(2, 0, min(_BLOCK, width)), values.narrow(1, 0, min(_BLOCK, width)), out=summed)
        for start in range(_BLOCK, width, _BLOCK):
            size = min(_BLOCK, width - start)
            summed.baddbmm_(weights.narrow(2, start, size), values.narrow(1, start, size))
    return output.view(rows, heads, tokens, -1).transpose(1, 2), None


AttentionInterface.register(_ATTENTION, slot_attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


class SlotDecoder:
    """A transformers model, with or without vocabulary head, whose sequences live in slots.

    Args:
        model: decoder of text, or of text and pictures. On a CPU its language model gets :func:`slot_attention`.

    Raises:
        ValueError: its layers are not all attention over keys and values, so that there is nothing to put into slots.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self.kinds = _kinds(config)
        strange = [kind for kind in self.kinds if kind not in _KINDS]
        if strange or model.config.is_encoder_decoder:
            raise ValueError(f"layers of kind {', '.join(strange) or 'encoder-decoder'} keep no slots")
        self.model: Any = model
        self._config = config
        self._dtype = model.dtype
        self._rope: list[Any] = [module for module in model.modules() if hasattr(module, "rope_deltas")]
        self.spans = model.device.type == "cpu" and config._attn_implementation in ("sdpa", _ATTENTION)
        if self.spans:
            text = next((name for name in model.config.sub_configs if getattr(model.config, name) is config), None)
            model.set_attn_implementation({text: _ATTENTION} if text else _ATTENTION)
            self.spans = config._attn_implementation == _ATTENTION  # a few models have sdpa of their own

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Cache:
        """Run the beginnings of text sequences, of different lengths.

        Args:
            prompts: token ids, padded here to a common multiple of :data:`COLUMNS`. On a CPU a row has the same bits
                in every batch padded to the same width.

        Returns:
            A cache for :meth:`SlotCache.fill`; its columns beyond a prompt's length hold nothing of use.
        """
        width = round_up(max(map(len, prompts)))
        cache = DynamicCache()  # without the config, which would drop what has left a sliding window
        if not width:
            return cache
        ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=self.model.device)
        positions = torch.arange(width, device=ids.device).expand(len(prompts), -1)
        # Padding stands on the right, where no real token sees it: causal attention is enough.
        self.model.base_model(input_ids=ids, position_ids=self._axes(positions), past_key_values=cache, use_cache=True)
        return cache

    def prefill_inputs(self, inputs: dict[str, Any]) -> tuple[Any, Cache, int]:
        """Run one prompt with whatever its processor made of it, pictures included.

        Args:
            inputs: what the model takes, ``input_ids`` (1, T) among it; no padding.

        Returns:
            The model's output, the cache, and the rope offset of the tokens that follow.
        """
        for module in self._rope:  # of the prompt before, which would be used again
            module.rope_deltas = None
        cache = DynamicCache()
        output = self.model(**inputs, past_key_values=cache, use_cache=True)
        deltas = [int(module.rope_deltas.max()) for module in self._rope if module.rope_deltas is not None]
        return output, cache, max(deltas, default=0)

    @torch.inference_mode()
    def difference(self, ids: Sequence[int], inputs: dict[str, Any]) -> float:
        """Compare the token that follows a prompt by way of a slot with the model's own forward.

        Args:
            ids: the prompt, at least two tokens.
            inputs: for :meth:`prefill_inputs`; empty for text.

        Returns:
            Total variation of the two distributions, 0 to 1; NaN where the model's logits are.
        """
        all_ids = torch.tensor([list(ids)], device=self.model.device)
        output, prefix, offset = self.prefill_inputs(inputs or {"input_ids": all_ids})
        if not inputs:
            prefix, offset = self.prefill([ids[:-1]]), 0
        slots = SlotCache()
        slots.fill([0], prefix, [0], len(ids) - 1, offset)
        feed = all_ids[:, -1:].expand(FEWEST_ROWS, 1)
        logits = self.forward(slots, feed).logits[0, -1]
        own, through_slot = (row.double().softmax(-1) for row in (output.logits[0, -1], logits))
        return float((own - through_slot).abs().sum() / 2)

    def forward(
        self, cache: SlotCache, input_ids: Tensor, within: Tensor | None = None, depth: Tensor | None = None
    ) -> Any:
        """Run new tokens of all rows; each sees its row, itself, and of the other new tokens those ``within`` names.

        Args:
            cache: the slots; rows up to the last one in use take part.
            input_ids: shape (B, T).
            within: True = the new token t (row) sees the new token s (column). Shape (T, T); causal where None.
            depth: tokens between the end of the row and each new token, from 0. Shape (T,); counted up where None.

        Returns:
            The model's output for the T new tokens.
        """
        step = cache.begin(input_ids.shape[1], input_ids.device, self.spans)
        if depth is None:
            depth = torch.arange(input_ids.shape[1], device=input_ids.device)
        masks = {kind: self._mask(step, kind, within, depth) for kind in self.kinds}
        options = {"slot_spans": step.spans} if self.spans else {}
        return self.model(
            input_ids=input_ids,
            position_ids=self._axes(step.positions[:, None] + depth),
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            past_key_values=cache,
            use_cache=True,
            **options,
        )

    def _axes(self, positions: Tensor) -> Tensor:
        """Positions (B, T), or (3, B, T) for models that count time, height and width."""
        return positions.expand(3, *positions.shape) if self._rope else positions

    def _mask(self, step: Step, kind: str, within: Tensor | None, depth: Tensor) -> Tensor:
        """What is added to the scores of one kind of layer: 0 or -inf. Shape (B, 1, T, width)."""
        columns = torch.arange(step.width, device=step.columns.device)
        start = step.columns[:, :1, None]  # (B, 1, 1)
        places = start + depth[:, None]  # (B, T, 1)
        if within is None:
            seen = columns <= step.columns[:, :, None]
        else:
            tokens = within.shape[0]
            seen = (columns < start).expand(-1, tokens, -1).clone()
            seen.scatter_(2, step.columns[:, None].expand(-1, tokens, -1), within.expand(step.rows, -1, -1))
        if kind == "sliding_attention":
            seen &= (columns > places - self._config.sliding_window) | (columns >= start)
        elif kind == "chunked_attention":
            chunk = self._config.attention_chunk_size
            seen &= (columns // chunk == places // chunk) | (columns >= start)
        mask = torch.zeros(seen.shape, dtype=self._dtype, device=seen.device)
        return mask.masked_fill_(~seen, -torch.inf).unsqueeze(1)


def _kinds(config: PreTrainedConfig) -> list[str]:
    """Kinds of attention among the layers, each once; told as transformers' own caches tell them."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        windows = {"sliding_window": "sliding_attention", "attention_chunk_size": "chunked_attention"}
        kinds = [kind for name, kind in windows.items() if getattr(config, name, None) is not None][:1]
    return list(dict.fromkeys(kinds or ["full_attention"]))
