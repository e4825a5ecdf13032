"""Processors of vision-language models and tokenizers of text models, from a directory, the hub or an embedded name."""

from typing import Any

from transformers import AutoProcessor

from ..errors import CheckpointError
from ..utils.reading import first_line
from .hub_files import Source, asks_for_trust, must_be_trusted, resolve

_FILES = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer inside a processor, or the processor itself where it is one."""
    return getattr(processor, "tokenizer", processor)


def load_processor(source: Source, *, trust_remote_code: bool = False) -> Any:
    """Processor of a vision-language model, or tokenizer of a text model.

    Args:
        source: directory, hub id or embedded name.
        trust_remote_code: run code that comes with it. transformers would ask at the terminal where nothing is said.

    Raises:
        CheckpointError: neither can be read from there, or it is code that is not trusted.
    """
    try:
        processor = AutoProcessor.from_pretrained(resolve(source), trust_remote_code=trust_remote_code)
        tokenizer = tokenizer_of(processor)
        empty = len(tokenizer) <= len(tokenizer.get_added_vocab())
    except Exception as error:  # a file of a wrong form may end in anything
        if not trust_remote_code and asks_for_trust(error, source, _FILES):
            raise must_be_trusted(source, "code for its tokenizer or processor") from error
        raise CheckpointError(
            f"no tokenizer or processor could be read from {str(source)!r}: {first_line(error)}"
        ) from error
    if empty:
        raise CheckpointError(  # transformers makes an empty tokenizer then, which finds no token in any text
            f"no tokenizer or processor could be read from {str(source)!r}: there is no vocabulary (looked for "
            "tokenizer.json). Copy the tokenizer files of the base model there, or name another place for them."
        )
    return processor
