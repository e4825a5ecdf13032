"""Token ids of texts, for servers that give text only: made with the model's own tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import GenerationConfig

from ....errors import CheckpointError, GeneratorError
from ....models.hub_files import resolve
from ....models.processors import load_processor, tokenizer_of
from .backends import Backend


@dataclass(frozen=True)
class TextEncoding:
    """How token ids are made of a text, where a server gives text only.

    Attributes:
        encode: ids of a text, without special tokens.
        eos: the id that ends a completion.
        ends: all ids that end one, by the model's generation configuration.
        vocabulary: how many ids there are.
    """

    encode: Callable[[str], list[int]]
    eos: int
    ends: list[int]
    vocabulary: int


def load_encoding(source: str, backend: Backend) -> TextEncoding:
    """The encoding of a model's own tokenizer.

    Args:
        source: directory, Hugging Face id or embedded name.
        backend: of the server, for messages.

    Raises:
        GeneratorError: there is no tokenizer, or one without an end-of-sequence token.
    """
    try:
        processor = load_processor(source)
    except CheckpointError as error:
        raise GeneratorError(
            f"a server of kind {backend.name!r} returns text only, so ids are made with the model's own tokenizer, "
            f"and there is none in {source!r}: {error} Give it as processor=... (a directory or a Hugging Face id)."
        ) from error
    tokenizer = tokenizer_of(processor)
    eos = tokenizer.eos_token_id
    if eos is None:
        raise GeneratorError(f"the tokenizer in {source!r} has no end-of-sequence token")
    return TextEncoding(
        lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]),
        eos,
        _end_ids(source, eos),
        len(tokenizer),
    )


def _end_ids(source: str, eos: int) -> list[int]:
    """Ids that end a completion by the model's generation configuration; its tokenizer's alone where it has none."""
    try:
        ids = GenerationConfig.from_pretrained(resolve(source)).eos_token_id
    except (OSError, ValueError):
        ids = None
    return ids if isinstance(ids, list) else [eos if ids is None else ids]
