"""Rollouts to token ids: chat template, image tokens, limits. One row a completion, or the reason why there is none."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lenvm_lightning.decoding.segments import tokens_until
from lenvm_lightning.models.processors import tokenizer_of
from lenvm_lightning.rollouts import prompting
from lenvm_lightning.rollouts.held_out import role_of
from lenvm_lightning.rollouts.record import Rollout
from lenvm_lightning.utils.images import MAX_IMAGE_PIXELS, open_image


@dataclass(frozen=True)
class Limits:
    """What of a rollout becomes a row.

    Attributes:
        until: text whose first occurrence ends the segment that is learned; None takes the whole completion.
        max_length: tokens of prompt and completion together; what is longer loses the end of its completion.
        max_prompt_length: tokens of the prompt; a longer text prompt loses its beginning, one with images is refused.
        max_pixels: pixels of an image; larger ones are scaled down, keeping their shape. None: as the processor does.
        max_image_pixels: pixels of an image file above which it is refused unread.
    """

    max_length: int = 4096
    max_prompt_length: int | None = None
    max_pixels: int | None = None
    max_image_pixels: int = MAX_IMAGE_PIXELS
    until: str | None = None

    @property
    def prompt(self) -> int:
        """Tokens a prompt may have: by default half of the row."""
        return self.max_prompt_length or self.max_length // 2


def load_image(path: str, limits: Limits) -> Image.Image:
    """Open an image as RGB, scaled down to at most `max_pixels`.

    Raises:
        ValueError: missing, unreadable or oversized; the text says which.
    """
    image = open_image(path, limits.max_image_pixels)
    width, height = image.size
    if limits.max_pixels and width * height > limits.max_pixels:
        scale = (limits.max_pixels / (width * height)) ** 0.5
        image = image.resize((max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.BICUBIC)
    return image


def encode_prompt(processor: Any, rollout: Rollout, images: list[Image.Image]) -> list[int]:
    """Token ids of the prompt up to where the generator began to write, just as it was given them."""
    return prompting.encode_prompt(processor, rollout.messages, images)[0]


def encode_completion(tokenizer: Any, rollout: Rollout) -> list[int]:
    """Generated ids, EOS included: the recorded ones, or the text's with EOS unless it was truncated.

    Raises:
        ValueError: nothing was generated, or an id that the vocabulary does not have.
    """
    ids = rollout.token_ids
    if ids is None:
        ids = tokenizer(rollout.completion, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError("empty completion")
        if not rollout.censored:
            ids = [*ids, tokenizer.eos_token_id]
    if not ids:
        raise ValueError("empty completion")
    if max(ids) >= len(tokenizer):
        raise ValueError(
            f"token id {max(ids)} is outside the vocabulary of {len(tokenizer)}: "
            "the rollouts come from a generator with another tokenizer"
        )
    return ids


def _may_end(tokenizer: Any, token: int) -> bool:
    """Whether a token may end a completion: a model can have more ends than its tokenizer names, all special ones."""
    return token == tokenizer.eos_token_id or token in tokenizer.all_special_ids


def encode_rollout(
    processor: Any, rollout: Rollout, limits: Limits, prompts: dict[str, list[int]]
) -> tuple[dict[str, Any], list[str]]:
    """One row of the table.

    Args:
        processor: tokenizer, or processor of a vision-language model.
        rollout: what to encode.
        limits: what becomes of it.
        prompts: token ids of prompts met before, by content; filled here, so that the completions of one prompt
            load its images once.

    Returns:
        The row: `input_ids`, `prompt_length` (tokens of the prompt in it), `length` (tokens of the whole
        completion, EOS included, or of its segment), `censored`, `prompt_id`, `split`, `images`; and notes on limits.

    Raises:
        ValueError: the rollout cannot be used; the text says why.
    """
    if rollout.images and not hasattr(processor, "image_processor"):
        raise ValueError("the rollout has images, but the model reads text only: use datamodules.VisionRollouts")
    # 1. Token ids.
    completion = encode_completion(tokenizer_of(processor), rollout)
    prompt = _encode_prompt_once(processor, rollout, limits, prompts)
    marks = {getattr(processor, f"{kind}_token_id", None) for kind in ("image", "video")} - {None}
    if not marks.isdisjoint(completion if rollout.images else prompt + completion):
        raise ValueError("an image or video token of the model stands where there is no image")
    notes = []
    if rollout.split and role_of(rollout.split) is None:
        notes.append(f"split {rollout.split!r} is neither train nor test: it counts as train")
    if rollout.token_ids and not rollout.censored and not _may_end(tokenizer_of(processor), completion[-1]):
        notes.append(f"it counts as ended by itself, but its last token, {completion[-1]}, is no end of sequence")
    completion, censored = learned_part(completion, rollout.censored, limits.until, tokenizer_of(processor))
    # 2. A prompt that is too long loses its beginning, what is too long even so the end of its completion.
    if len(prompt) > limits.prompt:
        if rollout.images:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens with its images, more than max_prompt_length {limits.prompt}"
            )
        notes.append(f"prompt of {len(prompt)} tokens truncated to its last {limits.prompt}")
        prompt = prompt[-limits.prompt :]
    room = limits.max_length - len(prompt)
    if len(completion) > room:
        notes.append(f"completion of {len(completion)} tokens is longer than the limit, its last "
                     f"{len(completion) - room} are left out (labels keep the whole length)")  # fmt: skip
    row = {
        "input_ids": prompt + completion[:room],
        "prompt_length": len(prompt),
        "length": len(completion),
        "censored": censored,
        "prompt_id": rollout.prompt_id,
        "split": rollout.split or "",
        "images": rollout.images,
        "image_stamps": [stamp(path) for path in rollout.images],
        "sampling": str(sorted(rollout.sampling.items())) if rollout.sampling else "",
        "generator": rollout.generator or "",
    }
    return row, notes


def learned_part(completion: list[int], censored: bool, until: str | None, tokenizer: Any) -> tuple[list[int], bool]:
    """What is learned of a completion, and whether that was truncated: a segment that has ended was not.

    States behind a segment are left out of the row, so that none of them can be supervised.
    """
    length = None if until is None else tokens_until(completion, until, tokenizer)
    return (completion, censored) if length is None else (completion[:length], False)


def _encode_prompt_once(processor: Any, rollout: Rollout, limits: Limits, prompts: dict[str, list[int]]) -> list[int]:
    """Token ids of a prompt, from `prompts` where it was met before.

    Raises:
        ValueError: it is empty, or one of its images cannot be read.
    """
    key = json.dumps([rollout.messages, rollout.images])
    if key not in prompts:
        images = [load_image(path, limits) for path in rollout.images]
        prompts[key] = encode_prompt(processor, rollout, images)
    if not prompts[key]:
        raise ValueError("empty prompt")
    return prompts[key]


def stamp(path: str) -> str:
    """Size and time of a file, to notice that it changed since it was tokenised; empty where there is none."""
    try:
        status = Path(path).stat()
    except (OSError, ValueError):  # a name with a null byte is a ValueError
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"
