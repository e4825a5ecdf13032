"""AdamW, in float32 or with its moments in eight bits, for weights of half precision too, and its schedule."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

OptimizerKind = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]

_HALF = (torch.bfloat16, torch.float16)


class CompensatedAdamW(torch.optim.AdamW):
    """AdamW whose steps are not lost on weights in half precision (``bf16-true``).

    A step of the learning rate's size is usually smaller than the distance of neighbouring bfloat16 numbers, and
    would be rounded away. What rounding takes from a weight w is kept, likewise in half precision, as its *rest* r,
    and the next step is AdamW's own on w + r in float32, with moments in float32 (Kahan summation of the steps, as in
    Zamirai et al. 2020, arXiv:2010.06192). Only one weight at a time is in float32. Weights in float32 have no rest.

    Args:
        groups: parameters and their settings.
        options: of AdamW; all but the variants that need other states (``amsgrad``, ``capturable``).
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; what the closure returned, as every optimizer does."""
        with torch.enable_grad():
            result = None if closure is None else closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step_of(weight, weight.grad, group)
        return result

    def _step_of(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        halved = weight.dtype in _HALF
        if not state:
            state["step"] = torch.zeros((), device=weight.device if group["fused"] else "cpu")
            state["exp_avg"] = torch.zeros_like(weight, dtype=torch.float32 if halved else None)
            state["exp_avg_sq"] = torch.zeros_like(weight, dtype=torch.float32 if halved else None)
            if halved:
                state["rest"] = torch.zeros_like(weight)
        exact = weight.float().add_(state["rest"]) if halved else weight
        adamw(
            [exact], [gradient.to(exact.dtype)], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
            fused=group["fused"], foreach=False, amsgrad=False, maximize=False, eps=group["eps"],
            beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
        )  # fmt: skip
        if halved:
            weight.copy_(exact)
            state["rest"].copy_(exact.sub_(weight))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; moments stay in float32, where torch would cast them to the precision of their weights."""
        super().load_state_dict(state_dict)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, weight in zip(numbers, weights, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                there = self.state[weight][name]
                self.state[weight][name] = value.to(there.device, copy=True)


def build_optimizer(
    kind: OptimizerKind, groups: list[dict[str, Any]], precision: Any, **options: Any
) -> torch.optim.Optimizer:
    """AdamW of the kind that is asked for.

    Args:
        kind: ``adamw``, or one of bitsandbytes', whose moments take a quarter of the memory; parameters of fewer than
            4,096 numbers keep theirs in float32. Where weights are in half precision, ``adamw`` compensates.
        groups: parameters and their settings.
        precision: of the Trainer. Under ``16-mixed`` nothing is fused: a fused step undoes AMP's scale itself, and
            gradients could be neither divided by their tokens nor clipped before.
        options: learning rate, betas.
    """
    if kind == "adamw":
        halved = any(weight.dtype in _HALF for group in groups for weight in group["params"])
        adam = CompensatedAdamW if halved else torch.optim.AdamW
        optimizer = adam(groups, fused=precision != "16-mixed", **options)
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
