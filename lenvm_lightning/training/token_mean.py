"""From the gradient of a sum to that of the mean over every supervised token of an optimizer step."""

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from .deepspeed import ZeRO

# Losses are summed over thousands of tokens; this power of two keeps the sum, and its float16 gradients, in range.
# It is exact, and undone where the gradients are divided by the number of tokens.
SUM_SCALE = 2.0**-10


def divide_by_tokens(module: L.LightningModule, tokens: Tensor | float) -> None:
    """Divide the gradients by the number (or weight) of supervised states of all micro-batches on all ranks, in place.

    To be called after AMP has unscaled them and before they are clipped, by all ranks. Lightning has divided by
    `accumulate_grad_batches`, even in a short last window, and the strategy has averaged over ranks.

    Args:
        module: whose losses were sums, times `SUM_SCALE`.
        tokens: those of this rank since the last step.
    """
    trainer = module.trainer
    tokens = torch.as_tensor(tokens, dtype=torch.float64, device=module.device)
    if trainer.world_size > 1:
        dist.all_reduce(tokens)
    factor = trainer.world_size * trainer.accumulate_grad_batches / (SUM_SCALE * or_one(tokens))
    if isinstance(trainer.strategy, ZeRO):  # which holds the gradients itself
        trainer.strategy.scale_gradients(float(factor))
        return
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor.to(parameter.grad.dtype))


def or_one(weight: Tensor) -> Tensor:
    """A total weight to divide by; it is 0 for no state at all, and so is what it divides."""
    return torch.where(weight > 0, weight, 1.0)
