"""The expected length of completions, before anything is generated."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..call import sees
from ..rollouts.generation import Prompt
from ..rollouts.prompting import encode_prompt, open_image
from ..value_model import LengthValueModel


@torch.inference_mode()
def predict_lengths(
    lenvm: LengthValueModel, processor: Any, prompts: Iterable[Prompt], batch: int = 16
) -> Iterator[tuple[Prompt, float | str]]:
    """Predict at the prompt boundary, s_0.

    Args:
        lenvm: in eval mode.
        processor: tokenizer, or processor of a vision-language model.
        prompts: with or without pictures.
        batch: text prompts that go through the model together.

    Yields:
        Each prompt, in order, with the tokens that its completion is expected to have, the end included: the length
        that the mean value stands for, at most the mean length; or why there is no prediction.
    """
    waiting: list[tuple[Prompt, list[int] | str]] = []
    for prompt in prompts:
        try:
            pictures = [open_image(image) for image in prompt.images]
            ids, inputs = encode_prompt(processor, prompt.messages, pictures)
            if not ids:
                raise ValueError("the prompt is empty")
            if pictures and not sees(lenvm.backbone):
                raise ValueError("the prompt has pictures, but the length value model reads text only")
            found: list[int] | float | str = _of_one(lenvm, ids, inputs) if inputs else ids
        except (ValueError, TypeError, KeyError) as error:
            found = str(error)
        if isinstance(found, float):
            yield from _of_texts(lenvm, waiting)
            waiting = []
            yield prompt, found
            continue
        waiting.append((prompt, found))
        if len(waiting) == batch:
            yield from _of_texts(lenvm, waiting)
            waiting = []
    yield from _of_texts(lenvm, waiting)


def _of_one(lenvm: LengthValueModel, ids: list[int], inputs: dict[str, Any]) -> float:
    device, dtype = lenvm.backbone.device, lenvm.backbone.dtype
    moved = {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in inputs.items()}
    moved["attention_mask"] = torch.ones(1, len(ids), dtype=torch.int64, device=device)
    return float(lenvm.remaining(lenvm(torch.tensor([ids], device=device), **moved))[0, -1])


def _of_texts(
    lenvm: LengthValueModel, waiting: list[tuple[Prompt, list[int] | str]]
) -> Iterator[tuple[Prompt, float | str]]:
    rows = [ids for _, ids in waiting if isinstance(ids, list)]
    lengths: Iterator[float] = iter(())
    if rows:
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=lenvm.backbone.device)
        last = torch.tensor([len(row) - 1 for row in rows], device=ids.device)
        logits = lenvm(ids, (torch.arange(width, device=ids.device) <= last[:, None]).long())
        lengths = iter(lenvm.remaining(logits.gather(1, last[:, None])).squeeze(1).tolist())
    for prompt, found in waiting:
        yield prompt, found if isinstance(found, str) else next(lengths)
