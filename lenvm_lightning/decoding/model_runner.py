"""Decoding many sequences at once in `kv_cache`: prefill, and one step for all.

**New tokens.** Decoding a token and scoring K candidates are the same call: new tokens see what their row holds and, of
each other, what ``within`` says; what was only tried is cropped afterwards.

**The same bits.** On a CPU, in float32 and float64, `slot_attention` gives a row the same bits whatever the other
rows hold, however many there are and however they are laid out: it computes and sums in blocks of a fixed size. Other
matrix products keep that up for batches of `FEWEST_ROWS` rows and more (measured with MKL
on AVX-512; torch promises nothing), and prompts are padded to a width that is their own.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..models.backbone import cache_argument, takes_argument, token_types
from ..tree import KINDS, attention_kinds, step_mask
from .compiled import CompiledForward, packed_attention
from .kv_cache import COLUMNS, FEWEST_ROWS, SlotCache, Span, Step, round_up

PADDING = 64  # prompts are padded to multiples of this, so that some can be prefilled together
_ATTENTION = "lenvm_slots"


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    slot_spans: list[Span] | None = None,
    slot_packed: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over spans of slots; without spans, transformers' ``sdpa``.

    Query heads that share a key are packed, so that keys and values are read once and never repeated. Products are of
    blocks of `COLUMNS` columns, all of one shape whatever the spans, through numpy: its
    BLAS takes small matrices twice as fast as torch's.

    Args:
        module: the attention layer.
        query: shape (B, heads, T, head size), float32 or float64, on a CPU.
        key: lines of all rows, see `SlotLayer`. Shape (1, key-value heads, …, head size),
            or (B, key-value heads, width, head size) where there is one span.
        value: likewise.
        attention_mask: added to the scores: 0 or -inf. Shape (B, 1, T, columns of the widest span).
        scaling: of the scores.
        slot_spans: which rows lie where.
        slot_packed: compute `packed_attention`.
        kwargs: for ``sdpa``.

    Returns:
        Shape (B, T, heads, head size), and None for the weights.
    """
    if slot_packed and attention_mask is not None:
        return packed_attention(query, key, value, attention_mask, scaling), None
    if slot_spans is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    assert attention_mask is not None
    rows, heads, tokens, size = query.shape
    kept = key.shape[1]
    packed = (query * (size**-0.5 if scaling is None else scaling)).reshape(rows * kept, 1, -1, size)
    output = query.new_empty(rows, heads, tokens, value.shape[-1])
    keys, values = (lines.reshape(-1, COLUMNS, lines.shape[-1]).numpy() for lines in (key, value))
    outputs, queries = output.view(rows * kept, -1, value.shape[-1]).numpy(), packed.numpy()
    for span in slot_spans:
        count, blocks = (span.stop - span.start) * kept, span.width // COLUMNS
        part = slice(span.start * kept, span.stop * kept)
        shape = (count, blocks, COLUMNS)
        lines = slice(span.before * kept // COLUMNS, span.before * kept // COLUMNS + count * blocks)
        scores = query.new_empty(count, packed.shape[2], span.width)
        by_block = scores.view(count, -1, blocks, COLUMNS).transpose(1, 2)  # (…, blocks, group * T, COLUMNS)
        with np.errstate(all="ignore"):  # NaN is told where tokens are drawn
            np.matmul(queries[part], keys[lines].reshape(*shape, size).swapaxes(2, 3), out=by_block.numpy())
            mask = attention_mask[span.start : span.stop, :, None, :, : span.width]
            scores.view(span.stop - span.start, kept, -1, tokens, span.width).add_(mask)
            weights = scores.softmax(-1).view(count, -1, blocks, COLUMNS).transpose(1, 2)
            sums = np.matmul(weights.numpy(), values[lines].reshape(*shape, -1))
            np.add.reduce(sums, axis=1, out=outputs[part])  # one block after the other
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, slot_attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


class SlotDecoder:
    """A transformers model, with or without vocabulary head, whose sequences live in slots.

    Args:
        model: decoder of text, or of text and pictures. On a CPU its language model gets `slot_attention`.
        compiled: compile its forward of new tokens, see `decoding.compiled`; prompts are run as they are.

    Raises:
        ValueError: its layers are not all attention over keys and values, so that there is nothing to put into slots.
    """

    def __init__(self, model: PreTrainedModel, compiled: bool = False) -> None:
        config = model.config.get_text_config()
        self.kinds = attention_kinds(config)
        strange = [kind for kind in self.kinds if kind not in KINDS]
        if strange or model.config.is_encoder_decoder:
            raise ValueError(f"layers of kind {', '.join(strange) or 'encoder-decoder'} keep no slots")
        self.model: Any = model
        self._config = config
        self._dtype = model.dtype
        self._rope: list[Any] = [module for module in model.modules() if hasattr(module, "rope_deltas")]
        exact = model.device.type == "cpu" and self._dtype in (torch.float32, torch.float64)
        if (exact or compiled) and config._attn_implementation in ("sdpa", _ATTENTION):
            text = next((name for name in model.config.sub_configs if getattr(model.config, name) is config), None)
            model.set_attn_implementation({text: _ATTENTION} if text else _ATTENTION)
        # A few models have an sdpa of their own.
        self._tight = exact and not compiled and config._attn_implementation == _ATTENTION

        self._last_logits = {"logits_to_keep": 1} if takes_argument(model, "logits_to_keep") else {}
        self._cache_name = cache_argument(model)
        self._takes_types = takes_argument(model, "mm_token_type_ids")
        self._compiled = CompiledForward(model, self.kinds, self._cache_name, self._axes) if compiled else None

    def slots(self, fewest_rows: int = FEWEST_ROWS) -> SlotCache:
        """An empty cache of the kind that the model's attention reads; see `SlotCache`."""
        return SlotCache(tight=self._tight, fewest_rows=fewest_rows, static=self._compiled is not None)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Cache:
        """Run the beginnings of text sequences, of different lengths.

        Args:
            prompts: token ids, padded here to a common multiple of `PADDING`. On a CPU a row has the same bits
                in every batch that is padded to the same width.

        Returns:
            A cache for `SlotCache.fill`; its columns beyond a prompt's length hold nothing of use.
        """
        width = round_up(max(map(len, prompts)), PADDING)
        cache = DynamicCache()  # without the config, which would drop what has left a sliding window
        if not width:
            return cache
        ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=self.model.device)
        positions = torch.arange(width, device=ids.device).expand(len(prompts), -1)
        # Padding stands on the right, where no real token sees it: causal attention is enough.
        options = {self._cache_name: cache, "use_cache": True}
        self.model.base_model(input_ids=ids, position_ids=self._axes(positions), **options)
        return cache

    def prefill_inputs(self, inputs: dict[str, Any]) -> tuple[Any, Cache, list[int]]:
        """Run prompts with whatever their processor made of them, pictures included.

        Args:
            inputs: what the model takes: ``input_ids`` (B, T) among it, and ``attention_mask`` (B, T), 1 = real token,
                where there is padding, on either side.

        Returns:
            The model's output; the cache, padding included; and of each prompt the rope offset of what follows it.
        """
        for module in self._rope:  # of the prompts before, which would be used again
            module.rope_deltas = None
        cache = DynamicCache()
        mask = inputs.get("attention_mask")
        pictures = any(name.startswith("pixel_values") for name in inputs)
        positions = {}
        if mask is not None and not (self._rope and pictures):  # else the model counts them itself
            positions["position_ids"] = self._axes((mask.long().cumsum(-1) - 1).clamp(min=0))
        options = {self._cache_name: cache, "use_cache": True, **self._last_logits}
        if pictures and self._takes_types and "mm_token_type_ids" not in inputs:
            # Models that count positions in pictures would, without types, count them as text, silently.
            positions["mm_token_type_ids"] = token_types(self.model.config, inputs["input_ids"])
        output = self.model(**{**inputs, **positions}, **options)
        deltas = [module.rope_deltas.flatten().tolist() for module in self._rope if module.rope_deltas is not None]
        return output, cache, deltas[0] if deltas else [0] * len(inputs["input_ids"])

    @torch.inference_mode()
    def difference(self, ids: Sequence[int], inputs: dict[str, Any]) -> float:
        """Compare the token that follows a prompt by way of a slot with the model's own forward.

        Args:
            ids: the prompt, at least two tokens.
            inputs: for `prefill_inputs`; empty for text.

        Returns:
            Total variation of the two distributions, 0 to 1; NaN where the model's logits are.
        """
        all_ids = torch.tensor([list(ids)], device=self.model.device)
        output, prefix, offsets = self.prefill_inputs(inputs or {"input_ids": all_ids})
        if not inputs:
            prefix, offsets = self.prefill([ids[:-1]]), [0]
        slots = self.slots()
        slots.fill([0], prefix, [0], len(ids) - 1, offsets[0])
        feed = all_ids[:, -1:].expand(FEWEST_ROWS, 1)
        logits = self.forward(slots, feed).logits[0, -1]
        own, through_slot = (row.double().softmax(-1) for row in (output.logits[0, -1], logits))
        return float((own - through_slot).abs().sum() / 2)

    def forward(
        self, cache: SlotCache, input_ids: Tensor, within: Tensor | None = None, depth: Tensor | None = None
    ) -> Any:
        """Run new tokens of all rows; each sees its row, itself, and of the other new tokens those ``within`` names.

        Args:
            cache: of `slots`; all of its rows take part.
            input_ids: shape (B, T).
            within: True = the new token t (row) sees the new token s (column). Shape (T, T); causal where None.
            depth: tokens between the end of the row and each new token, from 0. Shape (T,); counted up where None.

        Returns:
            The model's output for the T new tokens.
        """
        step = cache.begin(input_ids.shape[1], input_ids.device)
        if depth is None:
            depth = torch.arange(input_ids.shape[1], device=input_ids.device)
        if self._compiled and cache.layers:  # which rows of a single token have yet to make
            if within is None:
                within = torch.ones(len(depth), len(depth), dtype=torch.bool, device=depth.device).tril()
            both = [layer.both for layer in cache.layers]
            keys, values = [keys for keys, _ in both], [values for _, values in both]
            return self._compiled(input_ids, step, within, depth, keys, values)
        masks = {kind: self._mask(step, kind, within, depth) for kind in self.kinds}
        options: dict[str, Any] = {"slot_spans": cache.spans} if self._tight else {}
        options[self._cache_name] = cache
        return self.model(
            input_ids=input_ids,
            position_ids=self._axes(step.positions[:, None] + depth),
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            use_cache=True,
            **options,
        )

    def _axes(self, positions: Tensor) -> Tensor:
        """Positions (B, T), or (3, B, T) for models that count time, height and width."""
        return positions.expand(3, *positions.shape) if self._rope else positions

    def _mask(self, step: Step, kind: str, within: Tensor | None, depth: Tensor) -> Tensor:
        """What is added to the scores of one kind of layer: 0 or -inf. Shape (B, 1, T, width)."""
        seen = step_mask(step.columns, step.width, within, depth, kind, self._config)
        mask = torch.zeros(seen.shape, dtype=self._dtype, device=seen.device)
        return mask.masked_fill_(~seen, -torch.inf).unsqueeze(1)
