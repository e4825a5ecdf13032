"""A training step rehearsed on tensors that have shapes and no memory, and what each of its parts would take.

The model is built from its config alone, and a real step is run on it: the module's own forward, loss and backward pass
under the precision of the recipe, with activation checkpointing where it is on, and the optimizer's. What is counted is
what these made (`planning.memory_tracker`). Only weights in 4 bits and the states of 8-bit optimizers are
arithmetic.

The kernels are those of the CPU. On shapes that were compared, those of a GPU keep as much for the backward pass.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel

from ..batch import LengthBatch
from ..errors import CheckpointError, RecipeError
from ..models.adapters import add_adapter
from ..models.backbone import cut_layers, load_config
from ..models.hub_files import first_line
from ..models.value_model import LengthValueModel, LenVMConfig
from ..training.build import prepare_for_training, set_train_mode
from ..training.module import LenVMModule
from ..training.optimizers import build_optimizer
from ..training.strategies import stage_of
from .memory_tracker import MemoryTally

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # a weight, the scale that 64 share, the scale that 256 of those share
_BLOCKWISE = 2 * (1 + 4 / 256)  # bytes a parameter of two 8-bit moments, each 256 of them with a scale
_BLOCKWISE_FROM = 4096  # parameters of a tensor below which bitsandbytes keeps float32 moments

# Kinds of memory, in the order they are shown.
WEIGHTS, GRADIENTS, STATES = "weights", "gradients", "optimizer states"
COPIES, LANGUAGE, VISION, HEAD = "weight copies", "language model", "vision tower", "value head"
RECOMPUTED, TEMPORARY, BATCH = "recomputed layer", "temporary", "batch"
BUCKETS, GATHERED, MASTER = "communication buckets", "gathered layers", "DeepSpeed's copy of its share"
KINDS = (
    WEIGHTS, GRADIENTS, STATES, COPIES, LANGUAGE, VISION, HEAD, RECOMPUTED, TEMPORARY, BATCH, BUCKETS, GATHERED, MASTER
)  # fmt: skip

OPTIMIZER = "optimizer step"

_PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {  # dtype of autocast, dtype of the weights
    "32": (None, None), "32-true": (None, None), "64": (None, torch.float64), "64-true": (None, torch.float64),
    "bf16": (torch.bfloat16, None), "bf16-mixed": (torch.bfloat16, None), "16": (torch.float16, None),
    "16-mixed": (torch.float16, None), "bf16-true": (None, torch.bfloat16), "16-true": (None, torch.float16),
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A batch.

    Attributes:
        name: what kind of batch it is, for people.
        rows: sequences.
        length: tokens of each.
        grid: patches of the picture that each row has: times, rows, columns; None for text.
        image_tokens: tokens of a row that stand for its picture.
    """

    name: str
    rows: int
    length: int
    grid: tuple[int, int, int] | None = None
    image_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens, padding included."""
        return self.rows * self.length


@dataclass(frozen=True)
class Settings:
    """How the Trainer runs a step.

    Attributes:
        precision: of the Trainer.
        accumulate: batches of an optimizer step on each device.
        devices: in all machines together.
        strategy: of the Trainer, by name.
        gpu: optimizers update all weights at once there, which takes memory; on a CPU one after the other.

    Raises:
        RecipeError: a precision that cannot be planned.
    """

    precision: str = "32-true"
    accumulate: int = 1
    devices: int = 1
    strategy: str = "auto"
    gpu: bool = True

    def __post_init__(self) -> None:
        if self.precision not in _PRECISIONS:
            raise RecipeError(
                f"trainer.precision {self.precision!r} cannot be planned; there are {', '.join(_PRECISIONS)}"
            )

    @property
    def stage(self) -> int:
        """What is divided among devices: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too."""
        return stage_of(self.strategy) if self.devices > 1 else 0

    @property
    def computes_in(self) -> torch.dtype:
        """What matrices are multiplied in."""
        autocast, weights = _PRECISIONS[self.precision]
        return autocast or weights or torch.float32


@dataclass
class Part:
    """Parameters of a part of the model."""

    trained: int = 0
    frozen: int = 0


@dataclass
class Step:
    """What a batch and the optimizer step after it take on one device.

    Attributes:
        shape: the batch.
        memory: at the fullest moment of each phase (forward, backward, optimizer step), bytes of each kind.
        flops: floating-point operations of a batch, by phase; ``recompute`` is what checkpointing computes again.
    """

    shape: Shape
    memory: dict[str, dict[str, float]]
    flops: dict[str, int]

    @property
    def fullest(self) -> str:
        """The phase with the most memory."""
        return max(self.memory, key=lambda phase: sum(self.memory[phase].values()))

    @property
    def peak(self) -> float:
        """The most memory there is, in bytes."""
        return sum(self.memory[self.fullest].values())


# -- the model --------------------------------------------------------------------------------------------------------


def build(module: LenVMModule, fake: FakeTensorMode | None, precision: str = "32-true") -> LengthValueModel:
    """Give a module the model it would train, with weights that mean nothing.

    Args:
        module: with its settings, and without a model.
        fake: the mode to build it under, without memory; None for real tensors.
        precision: of the Trainer, which may say what the weights are.

    Returns:
        The model, in the modes that training sets.

    Raises:
        CheckpointError: no config of such a backbone.
    """
    settings, wanted = module.settings, module.settings.backbone
    config = load_config(wanted.source, wanted.overrides, trust_remote_code=wanted.trust_remote_code)
    if wanted.keep_layers is not None:
        cut_layers(config, wanted.keep_layers, wanted.source)
    options = {"attn_implementation": wanted.attn_implementation} if wanted.attn_implementation else {}
    dtype = _PRECISIONS[precision][1] or getattr(torch, wanted.dtype)
    gamma = 0.997 if settings.gamma == "auto" else settings.gamma
    with torch.device("meta") if fake else contextlib.nullcontext():
        try:
            backbone = AutoModel.from_config(config, dtype=dtype, trust_remote_code=wanted.trust_remote_code, **options)
        except ImportError as error:  # attention kernels that are not installed here
            raise CheckpointError(f"{wanted.source!r} cannot be rehearsed here: {first_line(error)}") from error
        if settings.lora:
            add_adapter(backbone, settings.lora)
            for name, parameter in backbone.named_parameters():
                if ".lora_" in name:  # float32, unless the Trainer casts everything
                    parameter.data = parameter.data.to(_PRECISIONS[precision][1] or torch.float32)
            for part in backbone.modules():  # on four bits, PEFT leaves casting to autocast
                if wanted.quantise and hasattr(part, "cast_input_dtype_enabled"):
                    part.cast_input_dtype_enabled = False
        model = LengthValueModel(
            backbone, LenVMConfig(gamma, target=settings.loss.target, dropout=settings.head_dropout)
        )
        module.model = model
        prepare_for_training(model, wanted)
    if fake:
        _make_fake(model, fake)
    set_train_mode(model, wanted)
    return model


def _make_fake(model: nn.Module, fake: FakeTensorMode) -> None:
    """Put tensors that claim to be on a CPU in the place of those on meta, shared ones shared again."""
    made: dict[int, Any] = {}
    with fake:
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        new = torch.empty_like(tensor, device="cpu")
                        is_weight = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_weight else new
                    held[name] = made[id(tensor)]


def parameters_by_part(model: LengthValueModel) -> dict[str, Part]:
    """Parameters, trained and frozen: language model, embeddings, vision tower with projector, adapters, head."""
    parts = {name: Part() for name in (LANGUAGE, "embeddings", VISION, "adapters", HEAD)}
    embeddings = {id(p) for p in model.backbone.get_input_embeddings().parameters()}
    vision = {id(p) for part in model.vision_modules() for p in part.parameters()}
    for name, parameter in model.named_parameters():
        key = id(parameter)
        kind = (
            HEAD if name.startswith("v_head.")
            else "adapters" if ".lora_" in name
            else "embeddings" if key in embeddings
            else VISION if key in vision
            else LANGUAGE
        )  # fmt: skip
        if parameter.requires_grad:
            parts[kind].trained += parameter.numel()
        else:
            parts[kind].frozen += parameter.numel()
    return {name: part for name, part in parts.items() if part.trained or part.frozen}


def quantised(model: LengthValueModel) -> Iterator[nn.Linear]:
    """The matrices that 4-bit weights replace: those of the language model, adapters apart."""
    for name, module in model.backbone.get_decoder().named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name:
            yield module


# -- a step -----------------------------------------------------------------------------------------------------------


class Rehearsal:
    """A model under a tally, ready for steps.

    Args:
        module: from `build`.
        settings: of the Trainer.
        fake: the mode it was built under.
    """

    def __init__(self, module: LenVMModule, settings: Settings, fake: FakeTensorMode | None) -> None:
        self.module, self.settings, self.fake = module, settings, fake
        self.tally = MemoryTally(fake)
        self.model = module.lenvm
        self.quantise = module.settings.backbone.quantise is not None
        self._convert_weights()
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: self.tally.own(p.grad, GRADIENTS))
        for buffer in self.model.buffers():
            self.tally.own(buffer, WEIGHTS)
        for part in self.model.vision_modules():
            self.tally.watch(part, VISION, phase="vision")
        self.tally.watch(self.model.v_head, HEAD)
        self.tally.watch_recomputing(self.model, RECOMPUTED, "recompute")
        self._states: list[Any] = []

    def _convert_weights(self) -> None:
        bits = {}
        with self.fake or contextlib.nullcontext():
            for linear in quantised(self.model) if self.quantise and self.fake else ():
                # It is multiplied as it is: nothing is cast, and what is kept for the backward pass are its 4 bits.
                weight = linear.weight.detach().to(self.settings.computes_in)
                linear.weight = nn.Parameter(weight, requires_grad=False)
                bits[id(linear.weight)] = linear.weight.numel() * NF4_BITS / 8
        for parameter in self.model.parameters():
            self.tally.own_weights(parameter, bits.get(id(parameter)))

    def optimizer_step(self) -> None:
        """Fill gradients and optimizer states, as after the first step of training, and take another step."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        with self.fake or contextlib.nullcontext():
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
                self.tally.own(parameter.grad, GRADIENTS)
        kind = self.module.settings.optimizer.kind
        if kind != "adamw":
            self._hold_8bit_states(trained)
            return
        groups = [{"params": [p for p in trained if p.ndim >= 2]}, {"params": [p for p in trained if p.ndim < 2]}]
        optimizer = build_optimizer(kind, groups, self.settings.precision, lr=0.0)
        for group in optimizer.param_groups:
            group["foreach"] = self.settings.gpu and not group["fused"]  # the default there
        for _ in range(2):
            self.tally.peaks.pop(OPTIMIZER, None)
            with self.tally, self.tally.making(TEMPORARY, OPTIMIZER):
                optimizer.step()
            for state in optimizer.state.values():
                for value in (value for name, value in state.items() if name != "step"):
                    self.tally.own(value, STATES)
        self._states.append(optimizer)

    def _hold_8bit_states(self, trained: list[nn.Parameter]) -> None:
        sizes = [p.numel() * (_BLOCKWISE if p.numel() >= _BLOCKWISE_FROM else 8) for p in trained]
        states = torch.empty(1, device="meta")
        self.tally.own(states, STATES, sum(sizes))
        self._states.append(states)
        self.tally.peaks[OPTIMIZER] = self.tally.now.copy()

    def batch(self, shape: Shape, pictures: int) -> LengthBatch:
        """A batch of a shape, of which so many rows have a picture. Rows have no padding, but for one token."""
        config = self.model.backbone.config
        image_token = getattr(config, "image_token_id", None)
        ids = torch.full((shape.rows, shape.length), 1 if image_token == 0 else 0)
        mask = torch.ones_like(ids)
        if shape.rows > 1:
            mask[-1, -1] = 0  # without any padding transformers makes no attention mask, which training rarely sees
        vision: dict[str, Any] = {}
        if shape.grid is not None and pictures:
            tower = config.vision_config
            width = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
            patches = shape.grid[0] * shape.grid[1] * shape.grid[2]
            ids[:pictures, : shape.image_tokens] = config.image_token_id
            _, dtype = _PRECISIONS[self.settings.precision]
            with self.fake or contextlib.nullcontext():
                vision["pixel_values"] = torch.zeros(pictures * patches, width, dtype=dtype)
            vision["image_grid_thw"] = torch.tensor([shape.grid] * pictures)
        remaining = torch.arange(shape.length - 1, -1, -1).repeat(shape.rows, 1)
        batch = LengthBatch(
            input_ids=ids,
            attention_mask=mask,
            remaining=remaining,
            mask=mask.bool(),
            censored=torch.zeros(shape.rows, dtype=torch.bool),
            prompt_index=torch.zeros(shape.rows, dtype=torch.int64),
            row=torch.arange(shape.rows),
            vision=vision,
        )
        for value in (*batch.values(), *vision.values()):
            if isinstance(value, Tensor):
                self.tally.own(value, BATCH)
        return batch

    def run(self, shape: Shape, pictures: int) -> Step:
        """Forward and backward pass of one batch, with gradients and optimizer states in place."""
        tally, module = self.tally, self.module
        optimizer = tally.peaks[OPTIMIZER]
        tally.peaks, tally.flops = {}, Counter()
        batch = self.batch(shape, pictures)
        autocast, _ = _PRECISIONS[self.settings.precision]
        with tally:
            casting = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
            with tally.making(LANGUAGE, "forward"), casting:
                logits = module(batch)
                with tally.making(HEAD):
                    loss = module.loss_sum(logits, batch)[0]
            if self.settings.accumulate == 1:  # the Trainer does so after the forward pass
                for parameter in self.model.parameters():
                    parameter.grad = None
            with tally.making(TEMPORARY, "backward"):
                loss.backward()
        memory: dict[str, dict[str, float]] = {phase: dict(kinds) for phase, kinds in tally.peaks.items()}
        tally.peaks[OPTIMIZER] = optimizer
        return Step(shape, memory | {OPTIMIZER: dict(optimizer)}, dict(tally.flops))
