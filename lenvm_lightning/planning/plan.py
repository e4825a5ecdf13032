"""What training will take, before there is a weight: parameters, memory by part, tokens and operations.

Each kind of batch gets a dry run of a step (`dry_run`). What a strategy divides among devices, and the images of a
batch beyond its third, are arithmetic. What is not counted is in `NOT_COUNTED`.
"""

from dataclasses import dataclass, field

from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_layers import GradientCheckpointingLayer

from ..models.value_model import LengthValueModel
from ..training.module import LenVMModule
from ..training.strategies import stage_of
from .dry_run import DryRun, DryRunStep
from .memory_kinds import (
    BACKWARD,
    BUCKETS,
    COPIES,
    FORWARD,
    GATHERED,
    GRADIENTS,
    IN_VISION_TOWER,
    KINDS,
    MASTER,
    OPTIMIZER,
    RECOMPUTE,
    STATES,
    TEMPORARY,
    WEIGHTS,
)
from .planned_model import Part, build, parameters_by_part, quantised_matrices
from .settings import BatchShape, PlanSettings

NOT_COUNTED = (
    "the device's context and libraries (about half a GiB on a GPU), workspaces inside kernels, memory lost to "
    "fragmentation, buffers of the network"
)
_RUN_IMAGES = 2  # images of a batch that the step is really run with: each is the same, and takes a second
# The vision tower is part of the forward pass, and what checkpointing computes again part of the backward pass.
_WITHIN = {IN_VISION_TOWER: FORWARD, RECOMPUTE: BACKWARD}


@dataclass
class Plan:
    """Everything known of a training run before it starts; bytes and operations are those of one device."""

    settings: PlanSettings
    parameters: dict[str, Part]
    steps: list[DryRunStep] = field(default_factory=list)


def plan(module: LenVMModule, shapes: list[BatchShape], settings: PlanSettings) -> Plan:
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
    model = build(module, fake, settings)
    found = Plan(settings, parameters_by_part(model))
    dry_run = DryRun(module, settings, fake)
    dry_run.optimizer_step()
    one_more_image: DryRunStep | None = None  # what it adds
    for shape in shapes:
        images = min(shape.rows, _RUN_IMAGES)
        step = dry_run.run(shape, images)
        if shape.grid is not None and shape.rows > images:
            if one_more_image is None:
                one_more_image = _add(dry_run.run(shape, images + 1), step, -1.0)
            step = _add(step, one_more_image, shape.rows - images)
        found.steps.append(on_one_device(step, model, dry_run.quantise, settings))
    return found


def _add(step: DryRunStep, other: DryRunStep, times: float) -> DryRunStep:
    """A step plus so many times another, in memory and operations."""
    memory = {}
    for phase, kinds in step.memory.items():
        added = other.memory[phase]
        memory[phase] = {kind: kinds.get(kind, 0.0) + times * added.get(kind, 0.0) for kind in KINDS}
    phases = {*step.flops, *other.flops}
    flops = {phase: int(step.flops.get(phase, 0) + times * other.flops.get(phase, 0)) for phase in phases}
    return DryRunStep(step.shape, memory, flops)


# -- devices ----------------------------------------------------------------------------------------------------------


def on_one_device(step: DryRunStep, model: LengthValueModel, quantise: bool, settings: PlanSettings) -> DryRunStep:
    """What is left of a step on each device, with what dividing it costs.

    Args:
        step: as on a single device.
        model: whose step it is.
        quantise: its language model is in 4 bits.
        settings: with the number of devices and the strategy.
    """
    divided = (STATES, GRADIENTS, WEIGHTS)[: settings.stage]
    checkpointing = step.flops.get(RECOMPUTE, 0) > 0
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
            largest = max((linear.weight.numel() for linear in quantised_matrices(model)), default=0)
            here[TEMPORARY] = here.get(TEMPORARY, 0.0) + largest * settings.computes_in.itemsize  # made 16 bits again
        name = _WITHIN.get(phase, phase)
        if sum(here.values()) > sum(memory.get(name, {}).values()):
            memory[name] = {kind: here[kind] for kind in KINDS if here.get(kind)}
    return DryRunStep(step.shape, memory, step.flops)


def _held_by_deepspeed(here: dict[str, float], model: LengthValueModel, settings: PlanSettings) -> None:
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
