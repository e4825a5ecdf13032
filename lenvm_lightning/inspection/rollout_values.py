"""A length value model over prompts and what was sampled for them: what it predicts at every state."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from datamodules.batch_planning import plan_batches
from datamodules.collate import Collator

from ..decoding.arguments import reads_images
from ..decoding.limits import context_window
from ..errors import reason_of
from ..models.backbone import token_types
from ..models.processors import tokenizer_of
from ..models.value_model import LengthValueModel
from ..rollouts.generators.interface import Prompt
from ..rollouts.prompting import encode_prompt
from ..rollouts.record import IMAGE_MARK
from ..utils.images import open_image

_WINDOW = 256  # completions sorted by length together: enough to meet others like them, few enough to hold images of


@torch.inference_mode()
def values_of(
    lenvm: LengthValueModel,
    processor: Any,
    completions: Iterable[tuple[Prompt, Sequence[int]]],
    batch_tokens: int = 8192,
    window: int = _WINDOW,
    all_heads: bool = False,
) -> Iterator[tuple[int, Tensor | str]]:
    """Read prompts and completions with a length value model.

    Args:
        lenvm: in eval mode.
        processor: tokenizer, or processor of a vision-language model.
        completions: prompts, with or without images, and the generated ids, EOS included; without any id only the
            prompt boundary is read. The completions of a prompt share its work where they give the same object.
        batch_tokens: padded tokens of a batch; a longer completion gets one of its own.
        window: completions that are read, sorted by length, before the next are looked at.
        all_heads: True = the outputs of the distributional head, too.

    Yields:
        The number of a completion, from 0, and its logits: float32 on the CPU, shape (L + 1,), from s_0 (the last
        prompt token) to s_L (the last generated one); or why there are none. With `all_heads` shape (L + 1, 1 + K).
        Any order within a window.
    """
    pad = tokenizer_of(processor).pad_token_id
    collate = Collator(0 if pad is None else pad, getattr(processor, "image_processor", None))
    numbered = enumerate(completions)
    while part := list(itertools.islice(numbered, window)):
        prompts: dict[int, dict[str, Any] | str] = {}
        rows: list[dict[str, Any]] = []
        for number, (prompt, ids) in part:
            if id(prompt) not in prompts:  # the window keeps it alive, so the number stays its own
                prompts[id(prompt)] = _encode(lenvm, processor, prompt)
            row = _row(lenvm, prompts[id(prompt)], ids, number)
            if isinstance(row, str):
                yield number, row
            else:
                rows.append(row)
        for some in ([row for row in rows if not row["images"]], [row for row in rows if row["images"]]):
            for batch in plan_batches([len(row["input_ids"]) for row in some], batch_tokens, seed=None):
                yield from _read(lenvm, collate, [some[i] for i in batch], all_heads)


def _encode(lenvm: LengthValueModel, processor: Any, prompt: Prompt) -> dict[str, Any] | str:
    """Ids and opened images of a prompt, or why it cannot be read."""
    try:
        marks = sum(message["content"].count(IMAGE_MARK) for message in prompt.messages)
        if prompt.images and not reads_images(lenvm.backbone):
            return "the prompt has images, but the length value model reads text only"
        if marks != len(prompt.images):
            return f"{marks} {IMAGE_MARK} marks in the prompt but {len(prompt.images)} images"
        images = [open_image(image) for image in prompt.images]
        ids = encode_prompt(processor, prompt.messages, images)[0]
    except (ValueError, TypeError, KeyError, IndexError) as error:
        return reason_of(error)
    if not images and _holds_image_token(lenvm, ids):
        return "an image or video token of the model stands where there is no image"
    return {"ids": ids, "images": images} if ids else "the prompt is empty"


def _row(
    lenvm: LengthValueModel, prompt: dict[str, Any] | str, ids: Sequence[int], number: int
) -> dict[str, Any] | str:
    """A row as the collator takes it, or why there is none."""
    if isinstance(prompt, str):
        return prompt
    known = lenvm.backbone.get_input_embeddings().num_embeddings
    row = [*prompt["ids"], *ids]
    if not 0 <= min(row) <= max(row) < known:
        return (
            f"token id {max(row) if max(row) >= known else min(row)} is not among the {known} of the length value model"
        )
    window = context_window([lenvm.backbone])
    if len(row) > window:
        return f"{len(row):,} tokens are more than the context window of {window:,} tokens"
    if _holds_image_token(lenvm, ids):
        return "the completion has an image or video token of the model"
    return {
        "input_ids": row,
        "prompt_length": len(prompt["ids"]),
        "length": len(ids),
        "censored": False,
        "images": prompt["images"],
        "prompt_index": 0,
        "row": number,
    }


def _holds_image_token(lenvm: LengthValueModel, ids: Sequence[int]) -> bool:
    return bool(token_types(lenvm.backbone.config, torch.as_tensor(ids, dtype=torch.int64)).any())


def _read(
    lenvm: LengthValueModel, collate: Collator, rows: list[dict[str, Any]], all_heads: bool
) -> Iterator[tuple[int, Tensor]]:
    batch = collate(rows)
    device, dtype = lenvm.backbone.device, lenvm.backbone.dtype
    vision = {
        name: x.to(device, dtype if x.is_floating_point() else None)
        for name, x in batch["vision"].items()
        if isinstance(x, Tensor)
    }
    ids, present = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    outputs = lenvm(ids, present, all_heads=all_heads, **vision).float().cpu()
    for number, mask, row in zip(batch["row"].tolist(), batch["mask"], outputs, strict=True):
        yield number, row[mask]
