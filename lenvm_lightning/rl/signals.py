"""What a length value model says to a policy that is being trained: which tokens made a completion longer.

Reward of a token `r = -(1 - gamma)`, so that the return of a completion is its value `V = -(1 - gamma ** remaining)`.
Of a completion of n tokens, token i leads from state i to state i + 1; state 0 is the prompt boundary.

Beside that, what is done today, one number for a whole completion: `sequence_rewards`.
"""

import torch
from torch import Tensor


def length_td_errors(value: Tensor, mask: Tensor, ended: Tensor, gamma: float) -> Tensor:
    """How much longer each token made what was expected, as a one-step error of the value.

        delta_i = -(1 - gamma) + gamma * V_{i+1} - V_i

    V is 0 after an end. A truncated completion goes on: after its last token stands what the model predicts there.
    Below 0 a token made the completion longer than was expected, above 0 shorter; of a right model the mean is 0.

    Args:
        value: of each state, in [-1, 0]. Shape (B, T + 1). Treated as constants.
        mask: True = a token of the completion, the end token included; those of a row come first. Shape (B, T).
        ended: True = the completion ended by itself. Shape (B,).
        gamma: discount of the value model, in (0, 1).

    Returns:
        Shape (B, T), 0 where `mask` is False.

    Raises:
        ValueError: gamma outside (0, 1), shapes that do not fit, or a mask with holes.
    """
    if not 0.0 < gamma < 1.0:
        raise ValueError(f"gamma must lie in (0, 1), got {gamma!r}")
    before, after = _around_tokens(value, mask, ended)
    return (gamma * after - (1.0 - gamma) - before).masked_fill(~mask, 0.0)


def length_advantages(value: Tensor, mask: Tensor, ended: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates of the length (Schulman et al. 2016): `A_i = sum_k (gamma lam)^k delta_{i+k}`.

    Times `s` and added to the advantages of the task, s > 0 shortens: the objective is then the task's reward less
    what the tokens cost. `lam = 1` is the return of what was written less the value, `lam = 0` the error of one step.

    Args:
        value: see `length_td_errors`.
        mask: likewise.
        ended: likewise.
        gamma: likewise.
        lam: in [0, 1]: how far a token answers for what came after it.

    Returns:
        Shape (B, T), 0 where `mask` is False.

    Raises:
        ValueError: gamma outside (0, 1), lam outside [0, 1], shapes that do not fit, or a mask with holes.
    """
    if not 0.0 <= lam <= 1.0:
        raise ValueError(f"lam must lie in [0, 1], got {lam!r}")
    errors = length_td_errors(value, mask, ended, gamma)
    advantages = torch.zeros_like(errors)
    running = errors.new_zeros(len(errors))
    for i in range(errors.shape[1] - 1, -1, -1):
        running = errors[:, i] + gamma * lam * running
        advantages[:, i] = running
    return advantages.masked_fill(~mask, 0.0)


def potential_shaping(value: Tensor, mask: Tensor, discount: float = 1.0) -> Tensor:
    """Rewards that tell a policy of length at every token and leave its optimum where it is (Ng, Harada, Russell 1999).

        F_i = discount * Phi(s_{i+1}) - Phi(s_i)        Phi = V, and 0 after the last token, whatever ended it

    The discounted sum over a completion telescopes to `-Phi(s_0)`, which no token can change. So it takes a critic that
    does not learn meanwhile, and makes nothing shorter by itself.

    Args:
        value: of each state. Shape (B, T + 1). Treated as constants.
        mask: True = a token of the completion. Shape (B, T).
        discount: of the task's rewards, in (0, 1]: 1 where, as in GRPO, completions have one reward at their end. With
            another one than the task's, the optimum does move.

    Returns:
        Shape (B, T), 0 where `mask` is False.

    Raises:
        ValueError: discount outside (0, 1], shapes that do not fit, or a mask with holes.
    """
    if not 0.0 < discount <= 1.0:
        raise ValueError(f"discount must lie in (0, 1], got {discount!r}")
    before, after = _around_tokens(value, mask, torch.ones(len(mask), dtype=torch.bool, device=mask.device))
    return (discount * after - before).masked_fill(~mask, 0.0)


def _around_tokens(value: Tensor, mask: Tensor, ended: Tensor) -> tuple[Tensor, Tensor]:
    """Values before and after every token; 0 after the last of a completion that ended. Shape (B, T) each."""
    if value.shape != (mask.shape[0], mask.shape[1] + 1) or ended.shape != mask.shape[:1]:
        raise ValueError(
            f"value must have a state more than mask has tokens, and ended one entry a row; got {tuple(value.shape)}, "
            f"{tuple(mask.shape)} and {tuple(ended.shape)}"
        )
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError("mask must have the tokens of a row first, without holes: signals go from token to token")
    # One step of a long completion is about 1 - gamma, which half precision does not see beside a value.
    value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
    last = torch.zeros_like(mask)
    last[:, :-1] = mask[:, :-1] & ~mask[:, 1:]
    last[:, -1:] = mask[:, -1:]
    return value[:, :-1], value[:, 1:].masked_fill(last & ended[:, None], 0.0)
