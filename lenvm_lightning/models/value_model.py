"""LengthValueModel: a headless transformers backbone, text or vision-language, and a scalar head on it.

Beside the scalar head, the value, there may be one that predicts the whole distribution of what remains.

The backbone has no vocabulary head: the logits over the vocabulary are the biggest tensor of a training step, and
nobody would read them.

`AutoModel.from_pretrained` of a value model directory gives its backbone, not this class, and that cannot be had
otherwise without losing the published layout. transformers chooses the class by `model_type` in `config.json`, which
names the backbone's architecture, so that every other tool loads the directory as the language model it comes from.
Registering this class for such a type would take over all models of it, and a type of our own would leave the
directory unreadable wherever this package is not installed; an `auto_map` would ship code with the weights, for people
to trust. So `LengthValueModel.from_pretrained` reads the directory, and tells a base model from a value model by the
head.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..distributions.length_distribution import LengthDistribution, lognormal
from ..errors import CheckpointError
from . import adapters
from .adapters import LoRA
from .backbone import (
    hidden_size,
    load_backbone,
    load_config,
    save_backbone,
    takes_argument,
    token_types,
    vision_modules,
)
from .hub_files import Source
from .lenvm_config import LenVMConfig
from .publishing import Publishing
from .value_head import LengthHead, ValueHead, keep_float32
from .value_head_io import (
    CONFIG_FILE,
    check_head,
    read_head,
    read_length_head,
    read_lenvm_config,
    writing_value_model,
)


class LengthValueModel(Publishing, nn.Module):
    """Predicts at every position how many tokens are still to come.

    Args:
        backbone: headless transformers model (`AutoModel`), text or vision-language.
        config: gamma, target and provenance.

    Example:
        >>> lenvm = LengthValueModel.from_pretrained("runs/text_lenvm/model")          # doctest: +SKIP
        >>> logits = lenvm(input_ids=ids, attention_mask=mask)                         # doctest: +SKIP
        >>> lenvm.remaining(logits)[:, -1]                                             # doctest: +SKIP
    """

    def __init__(self, backbone: PreTrainedModel, config: LenVMConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        self.v_head = ValueHead(hidden_size(backbone.config), config.dropout)
        self.length_rule = config.length_rule
        self.length_head: LengthHead | None = None
        if self.length_rule is not None:
            with torch.random.fork_rng(devices=[]):  # whatever else is drawn is what it would be without it
                self.length_head = LengthHead(hidden_size(backbone.config), self.length_rule.size)
        for head in self.heads():
            if backbone.dtype == torch.float64:
                head.double()
            head.to(backbone.device)  # bitsandbytes loads onto the GPU at once
        self._takes_token_types = takes_argument(backbone, "mm_token_type_ids")
        self.takes_positions = takes_argument(backbone, "position_ids")
        self.source: Source | None = None  # where it was loaded from
        self.in_step = False  # see `training.fsdp.keep_in_step`

    @classmethod
    def from_backbone(
        cls,
        source: str | os.PathLike[str],
        config: LenVMConfig,
        *,
        pretrained: bool = True,
        overrides: dict[str, Any] | None = None,
        keep_layers: int | None = None,
        expected_length: float | None = None,
        lora: LoRA | None = None,
        **backbone_options: Any,
    ) -> "LengthValueModel":
        """A value model with a fresh head.

        Args:
            source: hub id, directory, or the name of an embedded model (`tiny-text`, `tiny-vl`).
            config: gamma, target, provenance.
            pretrained: load the backbone's weights; False starts from its shape with random ones.
            overrides: entries of the backbone's config to change, nested for vision-language models;
                only without pretrained weights.
            keep_layers: start from only so many layers of the pretrained language model, the first ones.
            expected_length: typical remaining tokens; the fresh head starts by predicting it everywhere.
            lora: freeze the backbone and train adapters on its language model; None trains all of it.
            backbone_options: for `load_backbone` (dtype, attn_implementation,
                quantise, …).

        Raises:
            CheckpointError: no such model, weights or layers missing from it, adapters that fit nowhere.
        """
        backbone = load_backbone(
            source, pretrained=pretrained, overrides=overrides, keep_layers=keep_layers, **backbone_options
        )
        if config.backbone is None:
            config = dataclasses.replace(config, backbone=str(source))
        if lora is not None:
            adapters.add_adapter(backbone, lora)
            base = {"dtype": _name(backbone.dtype), "quantise": backbone_options.get("quantise")}
            base |= {"keep_layers": keep_layers, "digest": adapters.digest_of_frozen(backbone)}
            config = dataclasses.replace(config, base=base)
        model = cls(backbone, config)
        model.v_head.reset(config.rule.bias_for(expected_length) if expected_length else 0.0)
        if model.length_head is not None and model.length_rule is not None:
            with torch.random.fork_rng(devices=[]):
                model.length_head.reset(model.length_rule.start(expected_length or 1.0))
        return model

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        gamma: float | None = None,
        base: str | os.PathLike[str] | None = None,
        **backbone_options: Any,
    ) -> "LengthValueModel":
        """Load a trained value model: one of ours, or a published one; whole, or an adapter with a head.

        Args:
            source: directory, hub id, or the name of an embedded one.
            gamma: needed only where the checkpoint does not store it; a different one than stored is refused.
            base: where the weights under an adapter are, such as a copy in a directory; where the adapter says if None.
            backbone_options: for `load_backbone` (dtype, attn_implementation, …).

        Returns:
            The model, in eval mode.

        Raises:
            CheckpointError: no head, a head of the wrong width, a gamma that is nowhere, weights missing.
        """
        adapted = adapters.has_adapter(source)
        if not adapted:
            load_config(source, trust_remote_code=backbone_options.get("trust_remote_code", False))
        head = read_head(source)
        stored = read_lenvm_config(source)
        known = {field.name for field in dataclasses.fields(LenVMConfig)}
        stored = {key: value for key, value in stored.items() if key in known}
        if gamma is not None and stored.get("gamma", gamma) != gamma:
            raise CheckpointError(
                f"{str(source)!r} was trained with gamma={stored['gamma']}, but gamma={gamma} was asked for. "
                "Values mean nothing under another gamma: leave the argument out."
            )
        if gamma is None and "gamma" not in stored:
            raise CheckpointError(
                f"{str(source)!r} does not say which gamma it was trained with (looked for 'gamma' in "
                f"{CONFIG_FILE}). Ask its authors and pass it: "
                "LengthValueModel.from_pretrained(..., gamma=0.997)"
            )
        try:
            config = LenVMConfig(**{**stored, "gamma": stored.get("gamma", gamma)})
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{str(source)!r} cannot be used: {error} (looked in {CONFIG_FILE} and at the gamma that "
                "was given). Write there what it was trained with, or save the model again."
            ) from error
        if adapted:
            backbone = _load_adapted(source, base, config.base, backbone_options)
        else:
            backbone = load_backbone(source, **{"dtype": "auto", **backbone_options})
        model = cls(backbone, config)
        check_head(head, model.v_head.state_dict(), source)
        model.v_head.load_state_dict(head)
        if model.length_head is not None:
            model.length_head.load_state_dict(read_length_head(source, model.length_head.state_dict()))
        model.source = source
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike[str], processor: Any = None) -> None:
        """Write the published layout: a Hugging Face directory, `value_head.safetensors`, `lenvm_config.json`.

        A distributional head goes to `length_head.safetensors`, which other tools leave alone. A model with adapters
        writes these instead of whole weights, in PEFT's layout; see `save_merged`.

        Args:
            folder: directory to write into; created where missing.
            processor: tokenizer or processor to store beside the weights.
        """
        with self._writing(Path(folder), self.config, processor):
            if adapters.is_adapted(self.backbone):
                adapters.save_adapter(Path(folder), self.backbone, str(self.config.backbone))
            else:
                save_backbone(Path(folder), self.backbone)

    def save_merged(
        self, folder: str | os.PathLike[str], processor: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        """Write a directory of whole weights, with the adapters added to them.

        Args:
            folder: directory to write into; created where missing.
            processor: tokenizer or processor to store beside the weights.
            dtype: of the weights; that of the base where None. Of a base in four bits, float32 gives the values of
                training, anything less rounds what adapters have changed.
        """
        config = dataclasses.replace(self.config, base={})
        with self._writing(Path(folder), config, processor):
            save_backbone(Path(folder), adapters.merge(self.backbone, dtype))

    def _writing(self, folder: Path, config: LenVMConfig, processor: Any) -> AbstractContextManager[None]:
        length_head = self.length_head.state_dict() if self.length_head is not None else None
        return writing_value_model(folder, self.v_head.state_dict(), length_head, dataclasses.asdict(config), processor)

    def _apply(self, fn: Any, recurse: bool = True) -> "LengthValueModel":
        # Rotary frequencies are buffers that are not stored: halved, they would differ from those made on loading.
        derived = [(m, name, m._buffers[name]) for m in self.modules() for name in m._non_persistent_buffers_set]
        super()._apply(fn, recurse)
        for module, name, before in derived:
            after = module._buffers[name]
            if before is not None and after is not None and before.dtype == torch.float32:
                module._buffers[name] = keep_float32(before, after)
        return self

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, all_heads: bool = False, **inputs: Any
    ) -> Tensor:
        """Logits of every position.

        Args:
            input_ids: token ids. Shape (B, T).
            attention_mask: 1 = real token, 0 = padding. Shape (B, T).
            all_heads: True = the outputs of the distributional head, too, after the logit; `distribution` reads them.
            inputs: what else the backbone takes: `pixel_values`, `image_grid_thw`, `position_ids`,
                the cache (the mask then covers what is in there too), …

        Returns:
            Logits, shape (B, T), float32 or better; `value` and `remaining` read them. With `all_heads` shape
            (B, T, 1 + K), the logit first; K is 0 without a distributional head.
        """
        cache = inputs.get("cache", inputs.get("past_key_values"))  # transformers renames it
        inputs.setdefault("use_cache", cache is not None)
        has_images = any(name.startswith("pixel_values") and inputs[name] is not None for name in inputs)
        if inputs.get("position_ids") is None:
            if self._takes_token_types and has_images:
                # Such backbones (Qwen-VL) count positions themselves; without types as plain text, silently.
                inputs.setdefault("mm_token_type_ids", token_types(self.backbone.config, input_ids))
            elif self.takes_positions and (attention_mask is None or attention_mask.ndim == 2):
                inputs["position_ids"] = self._positions(input_ids, attention_mask, cache)
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        if has_images and cache is not None:
            cache.lenvm_offset = getattr(self.backbone, "rope_deltas", None)
        logits = self.v_head(hidden)
        if not all_heads:
            return logits
        heads = [logits[..., None]] + ([self.length_head(hidden)] if self.length_head is not None else [])
        return torch.cat(heads, dim=-1)

    def _positions(self, input_ids: Tensor, attention_mask: Tensor | None, cache: Any) -> Tensor | None:
        """Positions where transformers counts others: padding on the left, and text after images in a cache.

        Shape (B, T); None where it counts right.
        """
        offset = getattr(cache, "lenvm_offset", None)  # (b, 1): an image takes fewer positions than tokens
        if attention_mask is None:
            if cache is None or not self._takes_token_types:
                return None
            attention_mask = input_ids.new_ones(len(input_ids), cache.get_seq_length() + input_ids.shape[1])
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        if offset is None:
            return positions
        return positions + offset.repeat_interleave(len(positions) // len(offset), dim=0).to(positions.device)

    def value(self, logits: Tensor) -> Tensor:
        """Discounted value of each state, in [-1, 0]. Same shape as `logits`."""
        return self.config.rule.value(logits)

    def remaining(self, logits: Tensor) -> Tensor:
        """Predicted tokens still to come, EOS included. Same shape as `logits`."""
        return self.config.rule.remaining(logits)

    def distribution(self, outputs: Tensor) -> LengthDistribution:
        """How likely every number of remaining tokens is, as predicted; `quantile` is calibrated.

        A model that predicts one number has a log-normal distribution around it, as wide as its errors were on
        held-out completions.

        Args:
            outputs: of `forward(..., all_heads=True)`. Shape (..., 1 + K).

        Raises:
            CheckpointError: the model predicts one number, and nothing was held out in its training.
        """
        self.require_distribution()
        if self.length_rule is not None:
            return self.length_rule.distribution(outputs[..., 1:])
        assert self.config.intervals is not None
        return lognormal(self.remaining(outputs[..., 0]), self.config.intervals.spread)

    @property
    def says_how_sure(self) -> bool:
        """Whether it predicts distributions: it has a head for them, or was calibrated."""
        return self.length_rule is not None or self.config.intervals is not None

    def require_distribution(self) -> None:
        """Refuse a model that predicts one number and does not say how sure of it.

        Raises:
            CheckpointError: it has neither a distributional head nor a calibration.
        """
        if not self.says_how_sure:
            raise CheckpointError(
                f"{str(self.source or self.config.backbone)!r} predicts one number, and does not say how sure of it. "
                "Calibrate it on completions that it was not trained on: lenvm calibrate"
            )

    def quantile(self, outputs: Tensor, q: float, written: Tensor | int) -> Tensor:
        """Tokens that a share `q` of continuations stay within; see `quantiles`. Shape (...)."""
        return self.quantiles(outputs, (q,), written)[..., 0]

    def quantiles(self, outputs: Tensor, levels: Sequence[float], written: Tensor | int) -> Tensor:
        """Tokens that a share of continuations stay within, for several shares, as it held on held-out prompts.

        Args:
            outputs: of `forward(..., all_heads=True)`. Shape (..., 1 + K).
            levels: Q shares in (0, 1).
            written: tokens written at each state, 0 at the prompt boundary. Broadcasts with (...).

        Returns:
            Tokens, infinite where truncated completions left the level unknown; as predicted where fewer than 20
            prompts were held out. Shape (..., Q).

        Raises:
            CheckpointError: see `distribution`.
        """
        distribution, calibration = self.distribution(outputs), self.config.intervals
        if calibration is None:
            return distribution.quantiles(levels)
        return torch.stack([calibration.quantile(distribution, q, written) for q in levels], dim=-1)

    def heads(self) -> Iterator[nn.Module]:
        """The value head, and the distributional one where there is one."""
        return (head for head in (self.v_head, self.length_head) if head is not None)

    @property
    def gamma(self) -> float:
        """The discount it was trained with."""
        return self.config.gamma

    def recompute_activations(self) -> None:
        """Save memory by computing activations again in the backward pass; transformers does so in train mode only."""
        kwargs = {"use_reentrant": False}
        if hasattr(self.backbone, "activation_checkpointing_enable"):  # what newer releases call it
            self.backbone.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
        else:
            self.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        # That call also made all inputs want gradients, for the reentrant kind: they would flow through frozen towers.
        self.backbone.disable_input_require_grads()

    def vision_modules(self) -> Iterator[nn.Module]:
        """Vision tower and projector: whatever the backbone holds beside its language model; nothing for text."""
        return (module for _, module in vision_modules(self.backbone))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _load_adapted(
    source: Source, base: Source | None, trained: dict[str, Any], options: dict[str, Any]
) -> PreTrainedModel:
    """An adapter on its base, which is loaded as it was in training unless `options` say otherwise."""
    stored = {key: trained.get(key) for key in ("quantise", "keep_layers")}
    backbone = adapters.load_adapted(source, base, **{"dtype": trained.get("dtype", "auto"), **stored, **options})
    same = _name(backbone.dtype) == trained.get("dtype") and not set(options) & {"quantise", "keep_layers"}
    if same and trained.get("digest") not in (None, adapters.digest_of_frozen(backbone)):
        raise CheckpointError(
            f"the base model of the adapter in {str(source)!r} has changed since it was trained: values would mean "
            f"nothing. Put the old weights back, or name them in {adapters.ADAPTER_CONFIG}."
        )
    return backbone
