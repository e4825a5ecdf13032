"""What a value model is built on: the settings of its backbone. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

DtypeKind = Literal["float32", "bfloat16", "float16", "float64"]
QuantiseKind = Literal["nf4"]


@dataclass(frozen=True)
class BackboneConfig:
    """The transformers model under the value head, and how it is loaded.

    A plain string stands for the source alone: `backbone: tiny-text` is `backbone: {source: tiny-text}`.

    Attributes:
        source: hub id, directory, or embedded name (`tiny-text`, `tiny-vl`).
        pretrained: start from the backbone's weights; False from random ones of its shape.
        overrides: entries of the backbone's config to change; only with `pretrained: false`.
        keep_layers: start from only so many layers of the pretrained language model, the first ones, for a value
            model that is shallower than its generator; None keeps all.
        dtype: type of the weights; the Trainer's `precision` decides what is computed in.
        attn_implementation: attention kernels of transformers; its own choice where None.
        trust_remote_code: run modelling code that comes with the backbone.
        quantise: `nf4` keeps the frozen language model in four bits (QLoRA) and computes in `dtype`; needs lora.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        freeze_vision: leave vision tower and projector as they are.
    """

    source: str
    pretrained: bool = True
    overrides: dict[str, Any] | None = None
    keep_layers: int | None = None
    dtype: DtypeKind = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    quantise: QuantiseKind | None = None
    gradient_checkpointing: bool = False
    freeze_vision: bool = True

    def problems(self) -> list[str]:
        """What is wrong with the settings, in words, all at once."""
        found = []
        if self.pretrained and self.overrides:
            found.append("backbone.overrides change the shape of the backbone, so they need pretrained: false")
        if self.keep_layers is not None and self.keep_layers < 1:
            found.append(f"backbone.keep_layers must be at least 1, got {self.keep_layers}")
        if self.keep_layers is not None and not self.pretrained:
            found.append(
                "backbone.keep_layers cuts pretrained weights; with pretrained: false set the layers in overrides"
            )
        if self.dtype not in get_args(DtypeKind):
            found.append(f"backbone.dtype must be one of {', '.join(get_args(DtypeKind))}; got {self.dtype}")
        if self.quantise is not None and self.quantise not in get_args(QuantiseKind):
            found.append(f"backbone.quantise must be {', '.join(get_args(QuantiseKind))} or null; got {self.quantise}")
        if self.quantise is not None and self.dtype == "float64":
            found.append(
                f"backbone.quantise: {self.quantise} computes in float32, bfloat16 or float16; dtype is float64"
            )
        return found
