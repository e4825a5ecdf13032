"""Prompts to what a model reads: chat template and token ids. Sampling and training both go through here."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..models.processors import tokenizer_of
from .record import IMAGE_MARK


def _parts(content: str) -> list[dict[str, str]]:
    """Split a message at its image marks into the content list that chat templates of image models take."""
    parts: list[dict[str, str]] = []
    for number, text in enumerate(content.split(IMAGE_MARK)):
        if number:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def encode_prompt(
    processor: Any, messages: Sequence[dict[str, str]], images: Sequence[Image.Image]
) -> tuple[list[int], dict[str, Any]]:
    """Token ids of a prompt up to where the generator begins to write, and the tensors of its images.

    Args:
        processor: tokenizer, or processor of a vision-language model; without a chat template the bare text is the
            prompt.
        messages: chat messages; ``<image>`` marks an image.
        images: the images, RGB, in the order of their marks.

    Returns:
        Ids, image tokens expanded by the processor; and whatever else the processor made for the model
        (``pixel_values``, ``image_grid_thw``, …), a batch of one. Empty without images.
    """
    tokenizer = tokenizer_of(processor)
    if images:
        chat = [{"role": m["role"], "content": _parts(m["content"])} for m in messages]
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        inputs = dict(processor(text=[text], images=[list(images)], add_special_tokens=False, return_tensors="pt"))
        return inputs.pop("input_ids")[0].tolist(), inputs
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    else:  # a base model: the bare text is its prompt
        text = "\n\n".join(m["content"] for m in messages)
    return tokenizer(text, add_special_tokens=False)["input_ids"], {}
