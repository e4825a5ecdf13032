"""What a training step will take, before there is a weight: parameters, memory by part, tokens and operations.

The model is built from its config without memory (:mod:`~lenvm_lightning.tally`), and a real step is run on it: the
module's own forward, loss and backward under the precision of the recipe, with activation checkpointing where it is on,
and the optimizer's. What is counted is what these made. Only four things are arithmetic: weights in 4 bits, the states
of 8-bit optimizers, what a strategy divides among devices, and the pictures of a batch beyond its third.

The kernels are those of the CPU. On shapes that were compared, those of a GPU keep the same tensors for the backward
pass; what is not counted either way is in :data:`NOT_COUNTED`.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel

from . import checkpoint
from .adapters import LoRA, add_adapter
from .batch import LengthBatch
from .errors import RecipeError
from .module import LenVMModule
from .optimizers import build_optimizer
from .tally import MemoryTally
from .value_model import LengthValueModel, LenVMConfig

NOT_COUNTED = (
    "the device's context and libraries (about half a GiB on a GPU), workspaces inside kernels, memory lost to "
    "fragmentation, buffers of the network"
)
NF4_BITS = 4.127  # a weight, with its double-quantised scales
_BLOCKWISE = 2.03  # bytes a parameter of two 8-bit moments with their scales
_RUN_PICTURES = 2  # pictures of a batch that the step is really run with: each is the same, and takes a second
_BLOCKWISE_FROM = 4096  # parameters of a tensor below which bitsandbytes keeps float32 moments

# Kinds of memory, in the order they are shown.
WEIGHTS, GRADIENTS, STATES = "weights", "gradients", "optimizer states"
COPIES, LANGUAGE, VISION, HEAD = "weight copies", "language model", "vision tower", "value head"
RECOMPUTED, TEMPORARY, BATCH = "recomputed layer", "temporary", "batch"
BUCKETS, GATHERED = "communication buckets", "gathered layers"
KINDS = (
    WEIGHTS, GRADIENTS, STATES, COPIES, LANGUAGE, VISION, HEAD, RECOMPUTED, TEMPORARY, BATCH, BUCKETS, GATHERED
)  # fmt: skip

# The vision tower is part of the forward pass, and what checkpointing computes again part of the backward pass.
_WITHIN = {"vision": "forward", "recompute": "backward"}
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
        name = self.strategy.lower()
        if self.devices == 1:
            return 0
        if name.startswith("deepspeed"):
            return next((int(letter) for letter in name if letter.isdigit()), 2)
        return 3 if name.startswith(("fsdp", "fullyshard", "modelparallel")) else 0

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


@dataclass
class Plan:
    """Everything known of a training run before it starts; bytes and operations are those of one device."""

    settings: Settings
    parameters: dict[str, Part]
    steps: list[Step] = field(default_factory=list)


# -- the model ----------------------------------------------------------------------------------------------------------


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
    h = module.hparams
    config = checkpoint.load_config(h["backbone"], h["overrides"], trust_remote_code=h["trust_remote_code"])
    if h["keep_layers"] is not None:
        checkpoint.cut_layers(config, h["keep_layers"], h["backbone"])
    options = {"attn_implementation": h["attn_implementation"]} if h["attn_implementation"] else {}
    dtype = _PRECISIONS[precision][1] or getattr(torch, h["dtype"])
    gamma = 0.997 if h["gamma"] == "auto" else h["gamma"]
    with torch.device("meta") if fake else contextlib.nullcontext():
        backbone = AutoModel.from_config(config, dtype=dtype, trust_remote_code=h["trust_remote_code"], **options)
        if h["lora"]:
            add_adapter(backbone, LoRA(**h["lora"]))
        model = LengthValueModel(backbone, LenVMConfig(gamma, target=h["target"], dropout=h["head_dropout"]))
        module.model = model
        module._prepare_backbone(model)
    if fake:
        _make_fake(model, fake)
    model.train()
    if h["freeze_vision"]:
        for part in model.vision_modules():
            part.eval()
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


def _quantised(model: LengthValueModel) -> Iterator[nn.Linear]:
    """The matrices that 4-bit weights replace: those of the language model, adapters apart."""
    for name, module in model.backbone.get_decoder().named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name:
            yield module


# -- a step -------------------------------------------------------------------------------------------------------------


class StepTally:
    """A model under a tally, ready for steps.

    Args:
        module: from :func:`build`.
        settings: of the Trainer.
        fake: the mode it was built under.
    """

    def __init__(self, module: LenVMModule, settings: Settings, fake: FakeTensorMode | None) -> None:
        self.module, self.settings, self.fake = module, settings, fake
        self.tally = MemoryTally(fake)
        self.model = module._lenvm
        self.quantise = module.hparams["quantise"] is not None
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
            for linear in _quantised(self.model) if self.quantise else ():
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
        kind = self.module.hparams["optimizer"]
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
                for name in ("exp_avg", "exp_avg_sq"):
                    self.tally.own(state[name], STATES)
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
            mask[-1, -1] = (
                0  # without any padding transformers leaves the attention mask out, which training rarely sees
            )
        vision: dict[str, Any] = {}
        if shape.grid is not None and pictures:
            tower = config.vision_config
            width = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
            patches = shape.grid[0] * shape.grid[1] * shape.grid[2]
            ids[:pictures, : shape.image_tokens] = image_token
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
        memory = {phase: dict(kinds) for phase, kinds in tally.peaks.items()}
        tally.peaks[OPTIMIZER] = optimizer
        return Step(shape, {**memory, OPTIMIZER: dict(optimizer)}, dict(tally.flops))


def plan(module: LenVMModule, shapes: list[Shape], settings: Settings) -> Plan:
    """What training takes.

    Args:
        module: with the settings of the recipe, and without a model; it has one without memory afterwards.
        shapes: batches to look at.
        settings: of the Trainer.

    Raises:
        CheckpointError: no config of such a backbone.
        RecipeError: settings that cannot be planned.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model = build(module, fake, settings.precision)
    found = Plan(settings, parameters_by_part(model))
    ready = StepTally(module, settings, fake)
    ready.optimizer_step()
    picture: Step | None = None  # what one more picture adds
    for shape in shapes:
        pictures = min(shape.rows, _RUN_PICTURES)
        step = ready.run(shape, pictures)
        if shape.grid is not None and shape.rows > pictures:
            picture = picture or _add(ready.run(shape, pictures + 1), step, -1.0)
            step = _add(step, picture, shape.rows - pictures)
        found.steps.append(on_one_device(step, model, ready.quantise, settings))
    return found


def _add(step: Step, other: Step, times: float) -> Step:
    """A step plus so many times another, in memory and operations."""
    memory = {
        phase: {kind: kinds.get(kind, 0.0) + times * other.memory[phase].get(kind, 0.0) for kind in KINDS}
        for phase, kinds in step.memory.items()
    }
    phases = {*step.flops, *other.flops}
    flops = {phase: int(step.flops.get(phase, 0) + times * other.flops.get(phase, 0)) for phase in phases}
    return Step(step.shape, memory, flops)


# -- devices ------------------------------------------------------------------------------------------------------------


def on_one_device(step: Step, model: LengthValueModel, quantise: bool, settings: Settings) -> Step:
    """What is left of a step on each device, with what dividing it costs.

    Args:
        step: as on a single device.
        model: whose step it is.
        quantise: its language model is in 4 bits.
        settings: with the number of devices and the strategy.
    """
    divided = (STATES, GRADIENTS, WEIGHTS)[: settings.stage]
    checkpointing = step.flops.get("recompute", 0) > 0
    memory: dict[str, dict[str, float]] = {}
    for phase, kinds in step.memory.items():
        here = {kind: nbytes / (settings.devices if kind in divided else 1) for kind, nbytes in kinds.items()}
        if phase == OPTIMIZER:
            here[TEMPORARY] = kinds.get(TEMPORARY, 0.0) / (settings.devices if divided else 1)
        elif settings.stage == 3:
            here[GATHERED] = _gathered_bytes(model)
            if checkpointing:
                here[COPIES] = 0.0  # of the layer at work only, and those are among the gathered
        if settings.devices > 1 and settings.strategy.startswith(("auto", "ddp")):
            here[BUCKETS] = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        if quantise and phase != OPTIMIZER:
            largest = max((linear.weight.numel() for linear in _quantised(model)), default=0)
            here[TEMPORARY] = here.get(TEMPORARY, 0.0) + largest * settings.computes_in.itemsize  # made 16 bits again
        name = _WITHIN.get(phase, phase)
        if sum(here.values()) > sum(memory.get(name, {}).values()):
            memory[name] = {kind: here[kind] for kind in KINDS if here.get(kind)}
    return Step(step.shape, memory, step.flops)


def _gathered_bytes(model: LengthValueModel) -> float:
    """Weights that are whole on each device under a sharded strategy that wraps every layer.

    Two layers, of which one is at work and the other fetched, with the gradient of one; and all that is in no layer.
    """
    layers = [
        [p.numel() * p.element_size() for p in layer.parameters()]
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList)
        for layer in stack
    ]
    sizes = [sum(layer) for layer in layers]
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    return 3 * max(sizes) + whole - sum(sizes)
