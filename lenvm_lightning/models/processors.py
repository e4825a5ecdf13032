"""Processors of vision-language models and tokenizers of text models, from a directory, the hub or an embedded name."""

from typing import Any

from transformers import AutoProcessor

from ..errors import CheckpointError
from .hub_files import Source, first_line, resolve


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer inside a processor, or the processor itself where it is one."""
    return getattr(processor, "tokenizer", processor)


def load_processor(source: Source, **options: Any) -> Any:
    """Processor of a vision-language model, or tokenizer of a text model.

    Raises:
        CheckpointError: neither can be read from there.
    """
    try:
        processor = AutoProcessor.from_pretrained(resolve(source), **options)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no tokenizer or processor could be read from {str(source)!r}: {first_line(error)}"
        ) from error
    tokenizer = tokenizer_of(processor)
    if len(tokenizer) <= len(tokenizer.get_added_vocab()):
        raise CheckpointError(  # transformers makes an empty tokenizer then, which finds no token in any text
            f"no tokenizer or processor could be read from {str(source)!r}: there is no vocabulary (looked for "
            "tokenizer.json). Copy the tokenizer files of the base model there, or name another place for them."
        )
    return processor
