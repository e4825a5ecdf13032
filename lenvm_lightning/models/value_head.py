"""What reads hidden states: the value head, one logit a state, and a distributional head beside it.

Both are two linear layers that compute in float32 or better whatever the backbone or autocast use.
"""

from typing import Any

import torch
from torch import Tensor, nn

_LENGTH_HEAD_WIDTH = 256  # at most: enough for 32 bins, and a sixth of a value head of width 1536


class _Float32Head(nn.Module):
    """A head that stays in float32 where the model around it is cast; `keep_float32` says why."""

    def _apply(self, fn: Any, recurse: bool = True) -> "_Float32Head":
        # `model.bfloat16()` and Lightning's bf16-true would halve the head too; values need float32's digits.
        return super()._apply(lambda tensor: keep_float32(tensor, fn(tensor)), recurse)


class ValueHead(_Float32Head):
    """`W2 · SiLU(W1 · h + b1) + b2`, one logit a position, always computed in float32 or better.

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
        """Start over: predictions close to the constant whose logit is `bias`."""
        self.fc.reset_parameters()
        nn.init.normal_(self.summary.weight, std=0.1 * self.fc.in_features**-0.5)
        nn.init.constant_(self.summary.bias, bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., H) to logits (...), float32 whatever the backbone or autocast use."""
        with torch.autocast(hidden.device.type, enabled=False):
            x = hidden.to(self.fc.weight.dtype)
            x = nn.functional.silu(self.fc(self.dropout(x)))
            return self.summary(self.dropout(x)).squeeze(-1)


class LengthHead(_Float32Head):
    """`W2 · SiLU(W1 · h + b1) + b2`, several outputs a position: what `distributions.heads` reads distributions from.

    Args:
        hidden_size: width H of the backbone's last hidden state.
        outputs: K of them.
    """

    def __init__(self, hidden_size: int, outputs: int) -> None:
        super().__init__()
        width = min(hidden_size, _LENGTH_HEAD_WIDTH)
        self.fc = nn.Linear(hidden_size, width, dtype=torch.float32)
        self.out = nn.Linear(width, outputs, dtype=torch.float32)
        self.detached = False  # True = the backbone does not learn from its loss

    def reset(self, bias: Tensor) -> None:
        """Start over: outputs close to `bias` (K,) everywhere."""
        self.fc.reset_parameters()
        nn.init.normal_(self.out.weight, std=0.1 * self.fc.out_features**-0.5)
        with torch.no_grad():
            self.out.bias.copy_(bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., H) to outputs (..., K)."""
        with torch.autocast(hidden.device.type, enabled=False):
            x = hidden.detach() if self.detached else hidden
            return self.out(nn.functional.silu(self.fc(x.to(self.fc.weight.dtype))))


def keep_float32(before: Tensor, after: Tensor) -> Tensor:
    """`after`, but with the digits of `before` where it was cast to half precision."""
    return before.to(after.device, torch.float32) if after.dtype in (torch.bfloat16, torch.float16) else after
