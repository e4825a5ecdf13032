"""Prompts as an OpenAI-compatible server takes them: messages with images as data URLs."""

import base64
import io
from typing import Any

from PIL import Image

from ....utils.images import open_image, opened
from ...record import IMAGE_MARK
from ..interface import Prompt


def chat_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """Messages of a prompt, its images in the place of their marks.

    Raises:
        ValueError: an image cannot be read, there are more or fewer marks than images, or a text holds half a
            character, which no request can carry.
    """
    marks = sum(message["content"].count(IMAGE_MARK) for message in prompt.messages)
    if marks != len(prompt.images):
        raise ValueError(f"{marks} {IMAGE_MARK} marks in the prompt but {len(prompt.images)} images")
    for message in prompt.messages:
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt holds half a character (a lone surrogate) at {error.start}") from None
    if not prompt.images:
        return [dict(message) for message in prompt.messages]
    urls = iter([image_url(opened(image)) for image in prompt.images])
    messages = []
    for message in prompt.messages:
        parts: list[dict[str, Any]] = []
        for number, text in enumerate(message["content"].split(IMAGE_MARK)):
            if number:
                parts.append({"type": "image_url", "image_url": {"url": next(urls)}})
            if text:
                parts.append({"type": "text", "text": text})
        # Only users show images; servers want plain text from everybody else.
        plain = message["role"] != "user" and IMAGE_MARK not in message["content"]
        messages.append({"role": message["role"], "content": message["content"] if plain else parts})
    return messages


def image_url(image: Image.Image | str) -> str:
    """An image, opened or as a path, as the data URL of an RGB PNG.

    Raises:
        ValueError: it cannot be opened; see `open_image`.
    """
    buffer = io.BytesIO()
    open_image(image).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
