"""AdamW, in float32 or with its moments in eight bits, and its schedule."""

from typing import Any, Literal

import torch

OptimizerKind = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]


def build_optimizer(
    kind: OptimizerKind, groups: list[dict[str, Any]], precision: Any, **options: Any
) -> torch.optim.Optimizer:
    """AdamW of the kind that is asked for.

    Args:
        kind: ``adamw``, or one of bitsandbytes', whose moments take a quarter of the memory; parameters of fewer than
            4,096 numbers keep theirs in float32.
        groups: parameters and their settings.
        precision: of the Trainer. Under ``16-mixed`` nothing is fused: a fused step undoes AMP's scale itself, and
            gradients could be neither divided by their tokens nor clipped before.
        options: learning rate, betas.
    """
    if kind == "adamw":
        optimizer = torch.optim.AdamW(groups, fused=precision != "16-mixed", **options)
        # Lightning refuses to clip before a step that undoes AMP's scale, for which it takes every fused one; under
        # bf16-mixed there is no scale to undo.
        optimizer._step_supports_amp_scaling = False
        return optimizer
    import bitsandbytes  # takes seconds, and only these need it

    optimizers = {"adamw_8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit}
    return optimizers[kind](groups, **options)


def warmup_and_cosine(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up from 0, then a cosine to 0 at the last of all ``steps``."""
    from transformers import get_cosine_schedule_with_warmup  # brings PEFT and bitsandbytes with it, which take seconds

    return get_cosine_schedule_with_warmup(optimizer, warmup, steps)
