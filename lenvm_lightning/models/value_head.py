"""The value head: two linear layers that turn a hidden state into one logit, always in float32 or better."""

from typing import Any

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """``W2 · SiLU(W1 · h + b1) + b2``, one logit a position, always computed in float32 or better.

    Args:
        hidden_size: width H of the backbone's last hidden state.
        dropout: dropout probability before each linear layer.
    """

    def __init__(self, hidden_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc = nn.Linear(hidden_size, hidden_size, dtype=torch.float32)
        self.summary = nn.Linear(hidden_size, 1, dtype=torch.float32)
        self.dropout = nn.Dropout(dropout)

    def reset(self, bias: float) -> None:
        """Start over: predictions close to the constant whose logit is ``bias``."""
        self.fc.reset_parameters()
        nn.init.normal_(self.summary.weight, std=0.1 * self.fc.in_features**-0.5)
        nn.init.constant_(self.summary.bias, bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., H) to logits (...), float32 whatever the backbone or autocast use."""
        with torch.autocast(hidden.device.type, enabled=False):
            x = hidden.to(self.fc.weight.dtype)
            x = nn.functional.silu(self.fc(self.dropout(x)))
            return self.summary(self.dropout(x)).squeeze(-1)

    def _apply(self, fn: Any, recurse: bool = True) -> "ValueHead":
        # `model.bfloat16()` and Lightning's bf16-true would halve the head too; values need float32's digits.
        return super()._apply(lambda tensor: keep_float32(tensor, fn(tensor)), recurse)


def keep_float32(before: Tensor, after: Tensor) -> Tensor:
    """``after``, but with the digits of ``before`` where it was cast to half precision."""
    return before.to(after.device, torch.float32) if after.dtype in (torch.bfloat16, torch.float16) else after
