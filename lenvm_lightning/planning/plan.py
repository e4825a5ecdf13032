"""What training will take, before there is a weight: parameters, memory by part, tokens and operations.

A step is rehearsed (`planning.dry_run`) for each kind of batch. What a strategy divides among devices,
and the pictures of a batch beyond its third, are arithmetic. What is not counted is in `NOT_COUNTED`.
"""

from dataclasses import dataclass, field

from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_layers import GradientCheckpointingLayer

from ..models.value_model import LengthValueModel
from ..training.module import LenVMModule
from ..training.strategies import stage_of
from .dry_run import (
    BUCKETS,
    COPIES,
    GATHERED,
    GRADIENTS,
    KINDS,
    MASTER,
    OPTIMIZER,
    STATES,
    TEMPORARY,
    WEIGHTS,
    Part,
    Rehearsal,
    Settings,
    Shape,
    Step,
    build,
    parameters_by_part,
    quantised,
)

NOT_COUNTED = (
    "the device's context and libraries (about half a GiB on a GPU), workspaces inside kernels, memory lost to "
    "fragmentation, buffers of the network"
)
_RUN_PICTURES = 2  # pictures of a batch that the step is really run with: each is the same, and takes a second
# The vision tower is part of the forward pass, and what checkpointing computes again part of the backward pass.
_WITHIN = {"vision": "forward", "recompute": "backward"}


@dataclass
class Plan:
    """Everything known of a training run before it starts; bytes and operations are those of one device."""

    settings: Settings
    parameters: dict[str, Part]
    steps: list[Step] = field(default_factory=list)


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
    ready = Rehearsal(module, settings, fake)
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


# -- devices ----------------------------------------------------------------------------------------------------------


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
        if settings.strategy.startswith("deepspeed"):
            _held_by_deepspeed(here, model, settings)
        if settings.devices > 1 and settings.strategy.startswith(("auto", "ddp")):
            here[BUCKETS] = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        if quantise and phase != OPTIMIZER:
            largest = max((linear.weight.numel() for linear in quantised(model)), default=0)
            here[TEMPORARY] = here.get(TEMPORARY, 0.0) + largest * settings.computes_in.itemsize  # made 16 bits again
        name = _WITHIN.get(phase, phase)
        if sum(here.values()) > sum(memory.get(name, {}).values()):
            memory[name] = {kind: here[kind] for kind in KINDS if here.get(kind)}
    return Step(step.shape, memory, step.flops)


def _held_by_deepspeed(here: dict[str, float], model: LengthValueModel, settings: Settings) -> None:
    """Change what a device holds: weights that stages 1 and 2 step are copies, and some kinds may lie on the host."""
    stage = stage_of(settings.strategy)
    if stage < 3:
        here[MASTER] = sum(4.0 * p.numel() for p in model.parameters() if p.requires_grad) / settings.devices
    if "offload" in settings.strategy:
        for kind in (STATES, MASTER, WEIGHTS) if stage == 3 else (STATES, MASTER):
            here.pop(kind, None)


def _gathered_bytes(model: LengthValueModel) -> float:
    """Weights that are whole on each device under a sharded strategy that wraps every layer.

    Two layers, of which one is at work and the other fetched, with the gradient of one; and all that is in no layer.
    """
    layers = [
        [p.numel() * p.element_size() for p in layer.parameters()]
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer)
    ]
    sizes = [sum(layer) for layer in layers]
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    return 3 * max(sizes, default=0) + whole - sum(sizes)
