"""The batch: what DataModules emit and modules read. Tokens and counts, never values; gamma is not known here."""

from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor

LayoutKind = Literal["rows", "packed", "shared"]


class Layout(NamedTuple):
    """How a batch is meant to be computed; plain numbers, which stay on the host so that planning waits for no device.

    Attributes:
        kind: `packed`: rows one after the other, no padding between; `shared`: a prompt once for its completions.
        lengths: tokens of each row.
        prompt_lengths: tokens of each row's prompt.
        prompts: number of each row's prompt within the batch, in order of first appearance. Rows of the same number
            have equal prompt tokens and images.
    """

    kind: LayoutKind
    lengths: list[int]
    prompt_lengths: list[int]
    prompts: list[int]


class LengthBatch(TypedDict):
    """Sequences with the number of tokens that remain at every state.

    Attributes:
        input_ids: prompt and completion, padded on the right. Shape (B, T), int64.
        attention_mask: 1 = real token, 0 = padding. Shape (B, T), int64.
        remaining: tokens still to come at each state, 0 at EOS and where `mask` is False. Shape (B, T), int64.
            In a truncated completion it counts to the cut.
        mask: True = a state with a known count: from the last prompt token to the last token kept. Shape (B, T).
        censored: True = the completion was truncated: it hit its token limit. Shape (B,).
        prompt_index: number of the row's prompt within its split. Shape (B,), int64.
        row: number of the row within its split. Shape (B,), int64.
        vision: tensors of the image processor (pixel_values, image_grid_thw, …); empty without images. Of every row,
            or, where the layout is `shared`, of every prompt once.
        layout: how to compute it; rows of the same width where it is missing.
    """

    input_ids: Tensor
    attention_mask: Tensor
    remaining: Tensor
    mask: Tensor
    censored: Tensor
    prompt_index: Tensor
    row: Tensor
    vision: dict[str, Any]
    layout: NotRequired[Layout]


def label_states(prompt_length: int, kept: int, length: int, total: int) -> tuple[Tensor, Tensor]:
    """Remaining tokens and mask of one row.

    State t (t = 0 … kept) sits at position `prompt_length - 1 + t` and has `length - t` tokens to come: labels
    depend on the completion alone, so cutting the prompt or the completion shifts none of them.

    Args:
        prompt_length: tokens of the prompt in the row, >= 1.
        kept: tokens of the completion in the row.
        length: tokens of the whole completion, >= kept.
        total: width T to pad to.

    Returns:
        `remaining` (T,) int64 and `mask` (T,) bool.
    """
    remaining = torch.zeros(total, dtype=torch.int64)
    mask = torch.zeros(total, dtype=torch.bool)
    states = slice(prompt_length - 1, prompt_length + kept)
    remaining[states] = torch.arange(length, length - kept - 1, -1)
    mask[states] = True
    return remaining, mask
