"""AdamW, in float32 or with its moments in eight bits, for weights in bfloat16 too, and its schedule."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from ..errors import CheckpointError

OptimizerKind = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]


@dataclass(frozen=True)
class OptimizerConfig:
    """How the head and the backbone learn.

    Attributes:
        kind: `adamw`, fused where that can be, and compensated for weights in bfloat16; `adamw_8bit` keeps moments in
            eight bits, a quarter of the memory; `paged_adamw_8bit` moves them to the host where a GPU is full.
        lr: peak learning rate.
        weight_decay: AdamW's, on matrices only.
        betas: AdamW's.
        warmup_steps: optimizer steps of linear warm-up; a number below 1 is a share of all steps.
    """

    kind: OptimizerKind = "adamw"
    lr: float = 2e-5
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: float = 50

    def problems(self) -> list[str]:
        """What is wrong with the settings, in words, all at once."""
        found = []
        if self.kind not in get_args(OptimizerKind):
            found.append(f"optimizer.kind must be one of {', '.join(get_args(OptimizerKind))}; got {self.kind}")
        if not 0 < self.lr < math.inf:
            found.append(f"optimizer.lr must be positive and finite, got {self.lr}")
        for name in ("weight_decay", "warmup_steps"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                found.append(f"optimizer.{name} must be at least 0 and finite, got {value}")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            found.append(f"optimizer.betas must lie between 0 and 1, got {tuple(self.betas)}")
        return found


class CompensatedAdamW(torch.optim.AdamW):
    """AdamW whose steps are not lost on weights in bfloat16 (`bf16-true`).

    A step of the learning rate's size is usually smaller than the distance of neighbouring bfloat16 numbers, and
    would be rounded away. Here each weight w is the nearest bfloat16 to a float32 number of which the other 16 bits
    are kept as its *rest*; steps are AdamW's own on that number, with moments in float32. So training takes the steps
    that float32 weights would take, bit for bit. Weights of other types are stepped as by AdamW.

    Args:
        groups: parameters and their settings.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, as in AdamW.
        fused: AdamW's own fused kernel; one weight at a time is whole in any case.
    """

    def __init__(
        self,
        groups: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        fused: bool = True,
    ) -> None:
        super().__init__(groups, lr, betas, eps, weight_decay, fused=fused)

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
        halved = weight.dtype == torch.bfloat16
        if not state:
            digits = torch.float32 if halved else weight.dtype
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device if group["fused"] else "cpu")
            state["exp_avg"] = torch.zeros_like(weight, dtype=digits)
            state["exp_avg_sq"] = torch.zeros_like(weight, dtype=digits)
            if halved:
                state["rest"] = torch.zeros_like(weight, dtype=torch.int16)
        weight, gradient, first, second = map(_local_shard, (weight, gradient, state["exp_avg"], state["exp_avg_sq"]))
        exact = join(weight, _local_shard(state["rest"])) if halved else weight
        adamw(
            [exact], [gradient.to(exact.dtype)], [first], [second], [], [state["step"]],
            fused=group["fused"], foreach=False, amsgrad=False, maximize=False, eps=group["eps"],
            beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
        )  # fmt: skip
        if halved:
            for kept, part in zip((weight, _local_shard(state["rest"])), split(exact), strict=True):
                kept.copy_(part)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; moments stay in float32, where torch would cast them to the precision of their weights.

        Raises:
            CheckpointError: states of another optimizer.
        """
        super().load_state_dict(state_dict)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, weight in zip(numbers, weights, strict=True):
            stored = state_dict["state"].get(number, {})
            if stored and ("rest" in stored) != (weight.dtype == torch.bfloat16):
                raise CheckpointError(
                    "the checkpoint holds states of an AdamW that was not compensated, or of weights in another "
                    "precision: go on with the precision and the version that it was written with"
                )
            for name, value in stored.items():
                self.state[weight][name] = value.to(self.state[weight][name].device, copy=True)


def split(exact: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 number as the nearest bfloat16 (away from zero where two are as near), and the rest in int16."""
    bits = exact.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def join(nearest: Tensor, rest: Tensor) -> Tensor:
    """The float32 number that was `split`."""
    return ((nearest.view(torch.int16).to(torch.int32) << 16) + rest).view(torch.float32)


def _local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor, in the same memory; else the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def build_optimizer(
    kind: OptimizerKind, groups: list[dict[str, Any]], precision: Any, **options: Any
) -> torch.optim.Optimizer:
    """AdamW of the kind that is asked for.

    Args:
        kind: `adamw`, or one of bitsandbytes', whose moments take a quarter of the memory; parameters of fewer than
            4,096 numbers keep theirs in float32. Where weights are in bfloat16, `adamw` compensates.
        groups: parameters and their settings.
        precision: of the Trainer. Under `16-mixed` nothing is fused: a fused step undoes AMP's scale itself, and
            gradients could be neither divided by their tokens nor clipped before.
        options: learning rate, betas.
    """
    if kind == "adamw":
        halved = any(weight.dtype == torch.bfloat16 for group in groups for weight in group["params"])
        adam = CompensatedAdamW if halved else torch.optim.AdamW
        optimizer = adam(groups, fused=precision != "16-mixed", **options)
        # Lightning refuses to clip before a step that undoes AMP's scale, for which it takes every fused one; under
        # bf16-mixed there is no scale to undo.
        optimizer._step_supports_amp_scaling = False
        return optimizer
    import bitsandbytes  # takes seconds, and only these need it

    optimizers = {"adamw_8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit}
    return optimizers[kind](groups, **options)


def optimizer_and_schedule(
    config: OptimizerConfig, parameters: Iterable[Tensor], precision: Any, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW without decay on biases and norms, and linear warm-up, then a cosine to 0 at the last step.

    Args:
        config: checked settings.
        parameters: of the model; those that are not trained are left out.
        precision: of the Trainer.
        steps: optimizer steps of the whole training.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = build_optimizer(config.kind, groups, precision, lr=config.lr, betas=tuple(config.betas))
    warmup = int(config.warmup_steps if config.warmup_steps >= 1 else config.warmup_steps * steps)
    return optimizer, warmup_and_cosine(optimizer, min(warmup, steps), steps)


def precision_warning(config: OptimizerConfig, precision: str) -> str | None:
    """A warning of a precision of the Trainer in which the optimizer learns little; None where nothing is known."""
    if precision == "16-true":
        return "precision: 16-true: small gradients become 0 in float16; use 16-mixed or bf16-true"
    if precision == "bf16-true" and config.kind != "adamw":
        return (
            f"precision: bf16-true with optimizer.kind: {config.kind} rounds most steps of a learning rate like "
            f"{config.lr:g} away: use optimizer.kind: adamw, which keeps what rounding takes"
        )
    return None


def warmup_and_cosine(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up from 0, then a cosine to 0 at the last of all `steps`."""
    from transformers import get_cosine_schedule_with_warmup  # brings PEFT and bitsandbytes with it, which take seconds

    return get_cosine_schedule_with_warmup(optimizer, warmup, steps)
