"""In which order a client sends a batch of prompts whose lengths it expects.

**Shortest first** answers most requests soonest: the mean latency is least where every request waits for those before
it. **Longest first** ends the whole batch soonest, for no long answer is left to run alone at the end. Both help where
more is asked than is written side by side, and not otherwise.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..distributions.length_distribution import LengthDistribution

First = Literal["shortest", "longest"]


def start_order(
    lengths: Sequence[float] | Tensor | LengthDistribution, first: First = "shortest", quantile: float | None = None
) -> list[int]:
    """The numbers of prompts, in the order to send them.

    Args:
        lengths: expected tokens of each prompt's answer, shape (N,), or their distributions, of N states.
        first: see the module.
        quantile: of distributions, the level in (0, 1) of the length that counts; their means where None.

    Returns:
        Each of 0 … N - 1 once; those of the same length as they came.

    Raises:
        ValueError: a length is no number, there is more than one dimension, or a quantile of what has none.

    Example:
        >>> prompts, expected = ["a story", "a word", "a page"], [120.0, 3.0, 80.0]
        >>> [prompts[k] for k in start_order(expected)]
        ['a word', 'a page', 'a story']
        >>> start_order(expected, "longest")
        [0, 2, 1]
    """
    if isinstance(lengths, LengthDistribution):
        if quantile is not None and not 0.0 < quantile < 1.0:
            raise ValueError(f"quantile={quantile:g} is none: between 0 and 1")
        tokens = lengths.mean() if quantile is None else lengths.quantile(quantile)
    elif quantile is not None:
        raise ValueError("quantile: expected lengths have none; give distributions, or leave it out")
    else:
        tokens = torch.as_tensor(lengths, dtype=torch.float64)
    if tokens.ndim != 1:
        raise ValueError(f"lengths of shape {tuple(tokens.shape)}: one number a prompt is needed")
    wrong = tokens.isnan().nonzero()[:, 0].tolist()
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(tokens)} lengths are no numbers, the first is that of prompt {wrong[0]}"
        )
    return torch.argsort(tokens, descending=first == "longest", stable=True).tolist()
