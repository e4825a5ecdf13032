"""Prompts to what a model reads: chat template and token ids. Sampling and training both go through here."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from jinja2 import TemplateError
from PIL import Image

from ..errors import ChatTemplateError
from ..models.processors import tokenizer_of
from ..utils.time_limit import time_limit
from .record import IMAGE_MARK

_TEMPLATE_SECONDS = 10.0  # a template needs milliseconds; one that loops would need years


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

    Raises:
        ValueError: the chat template, the tokenizer or the processor refuses it; the text says why.
        ChatTemplateError: the chat template does not come to an end.
    """
    tokenizer = tokenizer_of(processor)
    if images:
        chat = [{"role": m["role"], "content": _parts(m["content"])} for m in messages]
        with _rendering():
            text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        with _refusals_told("the prompt cannot be encoded"):
            inputs = dict(processor(text=[text], images=[list(images)], add_special_tokens=False, return_tensors="pt"))
            return inputs.pop("input_ids")[0].tolist(), inputs
    if tokenizer.chat_template:
        with _rendering():
            text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    else:  # a base model: the bare text is its prompt
        text = "\n\n".join(m["content"] for m in messages)
    with _refusals_told("the prompt cannot be encoded"):
        return tokenizer(text, add_special_tokens=False)["input_ids"], {}


@contextlib.contextmanager
def _rendering() -> Iterator[None]:
    """Templates run in a sandbox, but they are programs of strangers, and loops have no end there."""
    try:
        with _refusals_told("the chat template refuses the prompt"), time_limit(_TEMPLATE_SECONDS):
            yield
    except TimeoutError as error:
        raise ChatTemplateError(
            f"the chat template of the model did not come to an end within {_TEMPLATE_SECONDS:g} seconds. Have a look "
            "at it, in chat_template.jinja or tokenizer_config.json of the model's folder."
        ) from error


@contextlib.contextmanager
def _refusals_told(what: str) -> Iterator[None]:
    """Whatever templates and processors of strangers raise, as one kind of error."""
    try:
        yield
    except TimeoutError:
        raise
    except Exception as error:
        text = str(error) if isinstance(error, ValueError | TemplateError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{what}: {text}") from error
