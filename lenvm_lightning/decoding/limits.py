"""Whether a prompt can be answered: known tokens, and room for what is asked. Asked before anything is computed."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ..guidance import AtMost, Control, innermost, target_of
from .vocabulary import embedding_rows, placeholder_ids


def context_window(models: Iterable[Any]) -> float:
    """Tokens that all of some models can read; infinity where none says."""
    texts = (model.config.get_text_config() for model in models)
    return min((getattr(text, "max_position_embeddings", None) or math.inf for text in texts), default=math.inf)


def why_unreadable(models: Sequence[Any], prompt_ids: Sequence[int], has_images: bool, processor: Any = None) -> str:
    """Why some models cannot read a prompt; empty where they can.

    Args:
        models: the generator first, then the length value model's backbone where there is one.
        prompt_ids: of the prompt.
        has_images: whether tensors of images come with it.
        processor: of the generator, or its tokenizer.
    """
    if not prompt_ids:
        return "the prompt is empty"
    known = min(embedding_rows(model) for model in models)
    unknown = next((token for token in prompt_ids if not 0 <= token < known), None)
    if unknown is not None:
        return f"the models know no token {unknown}, only {known:,} tokens"
    if not has_images and not placeholder_ids(models[0], processor).isdisjoint(prompt_ids):
        return "an image or video token of the model stands where there is no image (pixel_values)"
    return ""


def why_no_room(models: Iterable[Any], prompt_length: int, control: Control | None, max_tokens: int | None) -> str:
    """Why there is no room for what is asked; empty where there is.

    Args:
        models: as for `why_unreadable`.
        prompt_length: tokens of the prompt.
        control: of the length; its target needs room.
        max_tokens: that the completion may have; None where nobody says.
    """
    window = context_window(models)
    target = target_of(control)
    if target is not None and prompt_length + target > window:
        return (
            f"control {control}: a prompt of {prompt_length} tokens and a target of {target} pass the context window "
            f"of {window} tokens"
        )
    if max_tokens is not None and prompt_length + max_tokens > window:
        return (
            f"max_tokens={max_tokens}: with a prompt of {prompt_length} tokens that is more than the context window of "
            f"{window} tokens"
        )
    return "" if prompt_length < window else f"the prompt of {prompt_length} tokens fills the context window"


def contradiction(control: Control | None, max_tokens: int | None) -> str:
    """Why a control can never be followed within a limit; empty where it can, as a limit always can."""
    target = target_of(control)
    if target is None or max_tokens is None or max_tokens >= target or isinstance(innermost(control), AtMost):
        return ""
    return f"control {control} and max_tokens={max_tokens} contradict each other: raise max_tokens"
