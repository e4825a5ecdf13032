"""What the head regresses on (targets) and how errors count (losses): the paper's choice and its ablations.

To change the paper's loss, add a name to `LossKind` and a line to `token_losses`; its test is
`tests/maths/test_objectives.py`.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .censoring import CensoredKind
from .values import inverse_softplus, logit_to_remaining, logit_to_value, remaining_to_value, softplus

TargetKind = Literal["discounted", "length", "normalised", "log_length"]
LossKind = Literal["mse", "huber", "relative_huber", "bce", "absolute"]
WeightKind = Literal["token", "completion"]

# What the prompt boundary counts of its completion under `weight: completion`. Every completion passes it, so it must
# weigh the same in all: divided by their lengths, it would teach the length of the short ones.
_START_SHARE = 1 / 16


@dataclass(frozen=True)
class LossConfig:
    """What the head learns: targets, and how errors count.

    Attributes:
        target: what the head regresses on, see `LengthTarget`.
        kind: how an error counts, see `token_losses`.
        weight: what counts alike in the loss, every `token` or every `completion`, see `state_weights`.
        lam: lambda of the lambda-returns; 1 is the closed form. Below 1 only with the discounted target.
        censored: what completions that hit their token limit teach, see `censoring.treat_censored`.
    """

    target: TargetKind = "discounted"
    kind: LossKind = "mse"
    weight: WeightKind = "token"
    lam: float = 1.0
    censored: CensoredKind = "anchored"

    def problems(self) -> list[str]:
        """What is wrong with the settings, in words, all at once."""
        found = []
        if not 0.0 <= self.lam <= 1.0:
            found.append(f"loss.lam must lie between 0 and 1, got {self.lam}")
        if self.lam != 1.0 and self.target != "discounted":
            found.append(f"loss.lam {self.lam} needs target: discounted, whose rewards add up; got {self.target}")
        if self.kind == "bce" and self.target not in ("discounted", "normalised"):
            found.append(f"loss.kind: bce needs a target between 0 and 1, which {self.target} is not")
        for name, kinds in (
            ("target", TargetKind),
            ("kind", LossKind),
            ("weight", WeightKind),
            ("censored", CensoredKind),
        ):
            if getattr(self, name) not in get_args(kinds):
                found.append(f"loss.{name} must be one of {', '.join(get_args(kinds))}; got {getattr(self, name)}")
        return found


@dataclass(frozen=True)
class LengthTarget:
    """A way to write a remaining length as a number a head can regress on.

    | kind | target of `remaining` r | prediction of logit z |
    |---|---|---|
    | discounted | `-(1 - gamma ** r)` | `-sigmoid(z)` |
    | length | `r` | `softplus(z)` |
    | normalised | `min(r / scale, 1)` | `sigmoid(z)` |
    | log_length | `log1p(r)` | `softplus(z)` |

    Attributes:
        kind: which row of the table.
        gamma: discount, in (0, 1); also turns the remaining lengths of the other kinds into values.
        scale: tokens at which `normalised` reaches 1.
    """

    kind: TargetKind
    gamma: float
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(TargetKind):
            raise ValueError(f"target must be one of {', '.join(get_args(TargetKind))}; got {self.kind!r}")
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale!r}")

    def of(self, remaining: Tensor) -> Tensor:
        """Target of states with `remaining` tokens to come. Any shape; float32 or better."""
        if self.kind == "discounted":
            return remaining_to_value(remaining, self.gamma)
        r = remaining if remaining.dtype == torch.float64 else remaining.float()
        if self.kind == "length":
            return r
        if self.kind == "normalised":
            return (r / self.scale).clamp(max=1.0)
        if self.kind == "log_length":
            return torch.log1p(r)
        raise self._unknown()

    def predict(self, logit: Tensor) -> Tensor:
        """Prediction of the target from a head logit. Any shape; float32 or better."""
        if self.kind == "discounted":
            return logit_to_value(logit)
        if self.kind == "normalised":
            return -logit_to_value(logit)
        if self.kind in ("length", "log_length"):
            return softplus(logit)
        raise self._unknown()

    def remaining(self, logit: Tensor) -> Tensor:
        """Remaining tokens implied by a head logit. Any shape, >= 0."""
        if self.kind == "discounted":
            return logit_to_remaining(logit, self.gamma)
        prediction = self.predict(logit)
        if self.kind == "length":
            return prediction
        if self.kind == "normalised":
            return prediction * self.scale
        if self.kind == "log_length":
            return torch.expm1(prediction)
        raise self._unknown()

    def value(self, logit: Tensor) -> Tensor:
        """Discounted value implied by a head logit, in [-1, 0]. Any shape."""
        if self.kind == "discounted":
            return logit_to_value(logit)
        return remaining_to_value(self.remaining(logit), self.gamma)

    def bias_for(self, remaining: float) -> float:
        """Logit that predicts `remaining` tokens: where a fresh head starts, so that step 1 is no shock."""
        r = torch.tensor(float(remaining), dtype=torch.float64, device="cpu")  # also where models get no memory
        target = self.of(r)
        if self.kind == "discounted":
            return float(torch.logit(-target, eps=1e-6))
        if self.kind == "normalised":
            return float(torch.logit(target, eps=1e-6))
        if self.kind in ("length", "log_length"):
            return float(inverse_softplus(target))
        raise self._unknown()

    def _unknown(self) -> NotImplementedError:
        return NotImplementedError(f"target {self.kind!r} does not say what to do here")  # a new one that is half there


def token_losses(logit: Tensor, target: Tensor, remaining: Tensor, kind: LossKind, rule: LengthTarget) -> Tensor:
    """Loss of every state, without reduction.

    Args:
        logit: head output. Shape (B, T).
        target: regression target as `rule.of` or lambda-returns give it. Shape (B, T).
        remaining: tokens to come, 0 at the EOS state. Shape (B, T).
        kind: `mse` (half the squared error), `huber` (delta 1), `relative_huber` (the error is first divided
            by max(|target|, |target of one token|); the EOS state stays absolute), `bce` (on the size of the target),
            `absolute` (its best prediction is the target of the median length, not the mean target).
        rule: the target rule that made `target`.

    Returns:
        Losses, shape (B, T), float32 or better.

    Raises:
        ValueError: unknown kind, or `bce` for a target that is not a probability.
    """
    if kind == "bce":
        if rule.kind not in ("discounted", "normalised"):
            raise ValueError(f"loss 'bce' needs a target between 0 and 1 in size, which {rule.kind!r} is not")
        logit = logit if logit.dtype == torch.float64 else logit.float()
        return F.binary_cross_entropy_with_logits(logit, target.abs().to(logit.dtype), reduction="none")
    error = rule.predict(logit) - target
    if kind == "relative_huber":
        one_token = float(rule.of(torch.ones((), dtype=torch.float64)).abs())
        error = error / torch.where(remaining == 0, 1.0, target.abs().clamp(min=one_token))
    if kind in ("huber", "relative_huber"):
        return F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=1.0)
    if kind == "mse":
        return 0.5 * error.square()
    if kind == "absolute":
        return error.abs()
    raise ValueError(f"loss must be one of {', '.join(get_args(LossKind))}; got {kind!r}")


def state_weights(remaining: Tensor, mask: Tensor, kind: WeightKind) -> Tensor:
    """How much every state counts in the mean loss.

    `token` lets all states count alike, the paper's choice: the loss is that of a random token, and the model learns
    the lengths of all completions that may follow a state. `completion` lets all completions count alike, whatever
    their length: the loss of a random moment of a random completion, as in errors at 25, 50 and 75% of completions. A
    length is known in the future only, so predictions then lean towards the short completions that may follow a state.

    Args:
        remaining: tokens to come as the batch labels them, whole length at the prompt boundary. Shape (B, T).
        mask: True = state with a count. Shape (B, T).
        kind: `token` or `completion`.

    Returns:
        Weights, 0 where `mask` is False. Shape (B, T), float64. With `completion` those of a row that is there to
        its end add up to 1.

    Raises:
        ValueError: unknown kind.
    """
    if kind == "token":
        return mask.double()
    if kind == "completion":
        length = torch.where(mask, remaining, 0).amax(dim=1, keepdim=True).double()
        later = (1.0 - _START_SHARE) / length.clamp(min=1.0)
        return torch.where(remaining == length, _START_SHARE, later) * mask
    raise ValueError(f"weight must be one of {', '.join(get_args(WeightKind))}; got {kind!r}")
