"""The forwards of one model whose sequences live in a `KVCache`: prefill, and new tokens of all rows at once.

**New tokens.** Decoding a token and scoring K candidates are the same call: new tokens see what their row holds and, of
each other, what ``within`` says; what was only tried is cropped afterwards.

**The same bits.** On a CPU, in float32 and float64, attention gives a row the same bits whatever the other rows hold,
see `attention.block_attention`. Other matrix products keep that up for batches of `FEWEST_ROWS` rows and more (measured
with MKL on AVX-512; torch promises nothing), and prompts are padded to a width that is their own.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from ..models.backbone import cache_argument, takes_argument, token_types
from ..tree import KINDS, attention_kinds, step_mask
from .attention import is_exact, is_row_attention, set_row_attention
from .compiled import CompiledForward
from .kv_cache import FEWEST_ROWS, KVCache, Placement
from .kv_layout import round_up

_heard: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # see `ModelRunner._is_heard`
PADDING = 64  # prompts are padded to multiples of this, so that some can be prefilled together


class Prefill(NamedTuple):
    """Where a prompt is that a model has read, all tokens but the last.

    Attributes:
        cache: what the model returned.
        row: of the cache.
        start: column at which the prompt begins; padding stands before.
        offset: what its images add to the positions of what follows.
    """

    cache: Cache
    row: int = 0
    start: int = 0
    offset: int = 0


class ModelRunner:
    """A transformers model, with or without vocabulary head, whose sequences live in a `KVCache`.

    Args:
        model: decoder of text, or of text and images. Where its language model uses transformers' ``sdpa``, it gets
            `row_attention`.
        compiled: compile its forward of new tokens, see `compiled`; prompts are run as they are.

    Raises:
        ValueError: its layers are not all attention over keys and values, so that a `KVCache` cannot hold them.
    """

    def __init__(self, model: PreTrainedModel, compiled: bool = False) -> None:
        config = model.config.get_text_config()
        self.kinds = attention_kinds(config)
        unsupported = [kind for kind in self.kinds if kind not in KINDS]
        if unsupported or model.config.is_encoder_decoder:
            what = ", ".join(unsupported) or "encoder-decoder"
            raise ValueError(f"layers of kind {what} have no keys and values that a cache with rows could hold")
        self.model: Any = model
        self._config = config
        self._dtype = model.dtype
        self._rope: list[Any] = [module for module in model.modules() if hasattr(module, "rope_deltas")]
        set_row_attention(model)
        by_rows = is_row_attention(config)  # a few models have an sdpa of their own
        self.exact = by_rows and not compiled and is_exact(model)
        # On a GPU a group of its own would cost more launches than it saves columns.
        self._grouped = by_rows and not compiled and model.device.type == "cpu"
        self._packed = False
        self._last_logits = {"logits_to_keep": 1} if takes_argument(model, "logits_to_keep") else {}
        self._cache_name = cache_argument(model)
        self._takes_types = takes_argument(model, "mm_token_type_ids")
        self._compiled = CompiledForward(model, self.kinds, self._cache_name, self._axes) if compiled else None
        if self._grouped and not self._is_heard():
            self._grouped = self.exact = False
        self._packed = by_rows and not self._grouped

    @torch.no_grad()
    def _is_heard(self) -> bool:
        """Whether what `forward` says of rows gets as far as the attention; found out once for each model."""
        if self.model not in _heard:
            heard: list[bool] = []
            cache = self.new_cache(1)
            cache.lay_out([-1], [1])
            self.forward(cache, torch.zeros(1, 1, dtype=torch.int64, device=self.model.device), heard=heard)
            _heard[self.model] = bool(heard)
        return _heard[self.model]

    def new_cache(self, fewest_rows: int = FEWEST_ROWS) -> KVCache:
        """An empty cache of the kind that the model's attention reads; see `KVCache`."""
        return KVCache(grouped=self._grouped, fewest_rows=fewest_rows, static=self._compiled is not None)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Cache:
        """Run the beginnings of text sequences, of different lengths.

        Args:
            prompts: token ids, padded here to a common multiple of `PADDING`. On a CPU a row has the same bits in every
                batch that is padded to the same width.

        Returns:
            A cache for `KVCache.fill`; its columns beyond a prompt's length hold nothing of use.
        """
        width = round_up(max(map(len, prompts)), PADDING)
        cache = DynamicCache()  # without the config, which would drop what has left a sliding window
        if not width:
            return cache
        padded = [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]
        ids = torch.tensor(padded, device=self.model.device)
        positions = torch.arange(width, device=ids.device).expand(len(prompts), -1)
        # Padding stands on the right, where no real token sees it: causal attention is enough.
        options = {self._cache_name: cache, "use_cache": True}
        self.model.base_model(input_ids=ids, position_ids=self._axes(positions), **options)
        return cache

    def prefill_inputs(self, inputs: dict[str, Any]) -> tuple[Any, Cache, list[int]]:
        """Run prompts with whatever their processor made of them, images included.

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
        images = any(name.startswith("pixel_values") for name in inputs)
        positions = {}
        if mask is not None and not (self._rope and images):  # else the model counts them itself
            positions["position_ids"] = self._axes((mask.long().cumsum(-1) - 1).clamp(min=0))
        options = {self._cache_name: cache, "use_cache": True, **self._last_logits}
        if images and self._takes_types and "mm_token_type_ids" not in inputs:
            # Models that count positions in images would, without types, count them as text, silently.
            positions["mm_token_type_ids"] = token_types(self.model.config, inputs["input_ids"])
        output = self.model(**{**inputs, **positions}, **options)
        deltas = [module.rope_deltas.flatten().tolist() for module in self._rope if module.rope_deltas is not None]
        return output, cache, deltas[0] if deltas else [0] * len(inputs["input_ids"])

    @property
    def leaves_out(self) -> bool:
        """Whether `forward` can leave out new tokens, so that each row has as many as it needs."""
        return self._grouped

    def forward(
        self,
        cache: KVCache,
        input_ids: Tensor,
        within: Tensor | None = None,
        depth: Tensor | None = None,
        present: Tensor | None = None,
        **told: Any,
    ) -> Any:
        """Run new tokens of all rows; each sees its row, itself, and of the other new tokens those ``within`` names.

        Args:
            cache: of `new_cache`; all of its rows take part.
            input_ids: shape (B, T).
            within: True = the new token t (row) sees the new token s (column). Shape (T, T); causal where None.
            depth: tokens between the end of the row and each new token, from 0. Shape (T,); counted up where None.
            present: False = a token that no other sees and nobody asks for, which is left out; only where `leaves_out`.
                Shape (B, T).
            told: what else the attention is told.

        Returns:
            The model's output for the new tokens, shape (B, T, …); where some are left out, for those that are there,
            row after row, shape (1, N, …).
        """
        placement = cache.append(input_ids.shape[1], input_ids.device, present)
        if depth is None:
            depth = torch.arange(input_ids.shape[1], device=input_ids.device)
        if self._compiled and cache.layers:  # which rows of a single token have yet to make
            if within is None:
                within = torch.ones(len(depth), len(depth), dtype=torch.bool, device=depth.device).tril()
            keys = [layer.both[0] for layer in cache.layers]
            values = [layer.both[1] for layer in cache.layers]
            return self._compiled(input_ids, placement, within, depth, keys, values)
        masks = {kind: self._mask(placement, kind, within, depth) for kind in self.kinds}
        options: dict[str, Any] = {self._cache_name: cache, **told}
        if self._grouped:
            options["row_groups"] = cache.layout.row_groups
        if self._packed:
            options["packed_queries"] = True
        positions = placement.positions[:, None] + depth
        if placement.kept is not None:
            options["kept"] = placement.kept
            input_ids, positions = (of_all.flatten()[placement.kept][None] for of_all in (input_ids, positions))
        return self.model(
            input_ids=input_ids,
            position_ids=self._axes(positions),
            attention_mask=masks if len(masks) > 1 else masks[self.kinds[0]],
            use_cache=True,
            **options,
        )

    def _axes(self, positions: Tensor) -> Tensor:
        """Positions (B, T), or (3, B, T) for models that count time, height and width."""
        return positions.expand(3, *positions.shape) if self._rope else positions

    def _mask(self, placement: Placement, kind: str, within: Tensor | None, depth: Tensor) -> Tensor:
        """What is added to the scores of one kind of layer: 0 or -inf. Shape (B, 1, T, width)."""
        seen = step_mask(placement.columns, placement.width, within, depth, kind, self._config)
        mask = torch.zeros(seen.shape, dtype=self._dtype, device=seen.device)
        return mask.masked_fill_(~seen, -torch.inf).unsqueeze(1)


def moved_to(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """Tensors on a model's device, those with floating point in its dtype; whatever else there is is left out."""
    moved = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            moved[name] = value.to(model.device, model.dtype if value.is_floating_point() else None)
    return moved
