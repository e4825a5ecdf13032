"""A dry run of a training step: on tensors that have shapes and no memory, and what each of its parts would take.

The model is built from its config alone (`planned_model`), and a real step is run on it: the module's own forward, loss
and backward pass under the precision of the recipe, with activation checkpointing where it is on, and the optimizer's.
What is counted is what these made (`memory_tracker`). Only weights in 4 bits and the states of 8-bit optimizers are
arithmetic.

The kernels are those of the CPU. On shapes that were compared, those of a GPU keep as much for the backward pass.
"""

import contextlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..batch import LengthBatch
from ..training.module import LenVMModule
from ..training.optimizers import build_optimizer
from .memory_kinds import (
    BACKWARD,
    BATCH,
    FORWARD,
    GRADIENTS,
    HEAD,
    IN_VISION_TOWER,
    LANGUAGE,
    OPTIMIZER,
    RECOMPUTE,
    RECOMPUTED,
    STATES,
    TEMPORARY,
    VISION,
    WEIGHTS,
)
from .memory_tracker import MemoryTracker
from .planned_model import quantised_matrices
from .settings import BatchShape, PlanSettings

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # a weight, the scale of 64 of them, the scale of 256 of those scales
_BLOCKWISE = 2 * (1 + 4 / 256)  # bytes a parameter of two 8-bit moments, each 256 of them with a scale
_BLOCKWISE_FROM = 4096  # parameters of a tensor below which bitsandbytes keeps float32 moments
_FLOAT32_MOMENTS = 8  # bytes a parameter of two


@dataclass
class DryRunStep:
    """What a batch and the optimizer step after it take on one device.

    Attributes:
        shape: the batch.
        memory: at the fullest moment of each phase (forward, backward, optimizer step), bytes of each kind.
        flops: floating-point operations of a batch, by phase; `recompute` is what checkpointing computes again.
    """

    shape: BatchShape
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


class DryRun:
    """A model under a memory tracker, ready for steps.

    Args:
        module: from `build`.
        settings: of the Trainer.
        fake: the mode it was built under.
    """

    def __init__(self, module: LenVMModule, settings: PlanSettings, fake: FakeTensorMode | None) -> None:
        self.module = module
        self.settings = settings
        self.fake = fake
        self.tracker = MemoryTracker(fake)
        self.model = module.lenvm
        self.quantise = module.settings.backbone.quantise is not None
        self._own_weights()
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: self.tracker.own(p.grad, GRADIENTS))
        for buffer in self.model.buffers():
            self.tracker.own(buffer, WEIGHTS)
        for part in self.model.vision_modules():
            self.tracker.watch(part, VISION, phase=IN_VISION_TOWER)
        for head in self.model.heads():
            self.tracker.watch(head, HEAD)
        self.tracker.watch_recomputing(self.model, RECOMPUTED, RECOMPUTE)
        self._states: list[Any] = []

    def _own_weights(self) -> None:
        """Tell the tracker of all weights; fake ones of 4 bits take as much as real ones would."""
        nbytes: dict[int, float] = {}
        if self.quantise and self.fake:
            with self.fake:
                for linear in quantised_matrices(self.model):
                    # It is multiplied as it is: nothing is cast, and what is kept for the backward pass are its 4 bits.
                    weight = linear.weight.detach().to(self.settings.computes_in)
                    linear.weight = nn.Parameter(weight, requires_grad=False)
                    nbytes[id(linear.weight)] = linear.weight.numel() * NF4_BITS / 8
        for parameter in self.model.parameters():
            self.tracker.own_weights(parameter, nbytes.get(id(parameter)))

    def optimizer_step(self) -> None:
        """Fill gradients and optimizer states, as after the first step of training, and take another step."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        with self.fake or contextlib.nullcontext():
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
                self.tracker.own(parameter.grad, GRADIENTS)
        kind = self.module.settings.optimizer.kind
        if kind != "adamw":
            self._hold_8bit_states(trained)
            return
        matrices = [parameter for parameter in trained if parameter.ndim >= 2]
        others = [parameter for parameter in trained if parameter.ndim < 2]
        groups = [{"params": matrices}, {"params": others}]
        optimizer = build_optimizer(kind, groups, self.settings.precision, lr=0.0)
        for group in optimizer.param_groups:
            group["foreach"] = self.settings.gpu and not group["fused"]  # the default there
        for _ in range(2):  # the first step makes the states, the second is one of all others
            self.tracker.peaks.pop(OPTIMIZER, None)
            with self.tracker, self.tracker.making(TEMPORARY, OPTIMIZER):
                optimizer.step()
            for state in optimizer.state.values():
                for name, value in state.items():
                    if name != "step":
                        self.tracker.own(value, STATES)
        self._states.append(optimizer)

    def _hold_8bit_states(self, trained: list[nn.Parameter]) -> None:
        """Stand-ins for the states of bitsandbytes, whose kernels take no tensors without memory."""
        nbytes = 0.0
        for parameter in trained:
            each = _BLOCKWISE if parameter.numel() >= _BLOCKWISE_FROM else _FLOAT32_MOMENTS
            nbytes += parameter.numel() * each
        states = torch.empty(1, device="meta")
        self.tracker.own(states, STATES, nbytes)
        self._states.append(states)
        self.tracker.peaks[OPTIMIZER] = self.tracker.now.copy()

    def batch(self, shape: BatchShape, images: int) -> LengthBatch:
        """A batch of a shape, of which so many rows have an image. Rows have no padding, but for one token."""
        config = self.model.backbone.config
        image_token = getattr(config, "image_token_id", None)
        ids = torch.full((shape.rows, shape.length), 1 if image_token == 0 else 0)
        mask = torch.ones_like(ids)
        if shape.rows > 1:
            mask[-1, -1] = 0  # without any padding transformers makes no attention mask, which training rarely sees
        vision: dict[str, Any] = {}
        if shape.grid is not None and images:
            ids[:images, : shape.image_tokens] = config.image_token_id
            vision = self._images_of(shape.grid, images)
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
                self.tracker.own(value, BATCH)
        return batch

    def _images_of(self, grid: tuple[int, int, int], images: int) -> dict[str, Tensor]:
        """What an image processor would give for some images of one size."""
        tower = self.model.backbone.config.vision_config
        width = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
        patches = grid[0] * grid[1] * grid[2]
        with self.fake or contextlib.nullcontext():
            pixels = torch.zeros(images * patches, width, dtype=self.settings.weight_dtype)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([grid] * images)}

    def run(self, shape: BatchShape, images: int) -> DryRunStep:
        """Forward and backward pass of one batch, with gradients and optimizer states in place."""
        tracker, module = self.tracker, self.module
        optimizer = tracker.peaks[OPTIMIZER]
        tracker.peaks, tracker.flops = {}, Counter()
        batch = self.batch(shape, images)
        autocast = self.settings.autocast
        with tracker:
            casting = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
            with tracker.making(LANGUAGE, FORWARD), casting:
                logits = module(batch)
                with tracker.making(HEAD):
                    loss = module.loss_sum(logits, batch)[0]
            if self.settings.accumulate == 1:  # the Trainer does so after the forward pass
                for parameter in self.model.parameters():
                    parameter.grad = None
            with tracker.making(TEMPORARY, BACKWARD):
                loss.backward()
        memory: dict[str, dict[str, float]] = {phase: dict(kinds) for phase, kinds in tracker.peaks.items()}
        tracker.peaks[OPTIMIZER] = optimizer
        return DryRunStep(shape, memory | {OPTIMIZER: dict(optimizer)}, dict(tracker.flops))
