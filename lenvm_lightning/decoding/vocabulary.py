"""Which ids end a completion, and which are never sampled."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models.processors import tokenizer_of
from ..models.value_model import LengthValueModel

SPARE_IDS = 1024  # by fewer rows may the embeddings of one vocabulary differ: they are padded to round numbers


def embedding_rows(model: Any) -> int:
    """Rows of the input embedding: tokens, and often a few spare ones."""
    return int(model.get_input_embeddings().weight.shape[0])


def stop_ids_of(generator: PreTrainedModel, processor: Any = None) -> frozenset[int]:
    """Ids that end a completion, from the first place that names any."""
    configs = (
        generator.generation_config,
        generator.config,
        generator.config.get_text_config(),
        tokenizer_of(processor),
    )
    for config in configs:
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, list | tuple) else [int(ids)])
    return frozenset()


def placeholder_ids(generator: PreTrainedModel, processor: Any = None) -> frozenset[int]:
    """Ids that stand for parts of images, videos and sounds."""
    names = [f"{kind}_token_{suffix}" for kind in ("image", "video", "audio") for suffix in ("id", "index")]
    found = (getattr(place, name, None) for place in (generator.config, processor) for name in names)
    return frozenset(token for token in found if isinstance(token, int))


def forbidden_ids(
    generator: PreTrainedModel, lenvm: LengthValueModel | None = None, processor: Any = None
) -> Tensor | None:
    """Ids that are never sampled: placeholders, and those that tokenizer or length value model do not know.

    Args:
        generator: with a vocabulary head.
        lenvm: the length value model beside it.
        processor: of the generator, or its tokenizer.

    Returns:
        On the generator's device, sorted. Shape (n,), int64; None where there are none.
    """
    size = generator.get_output_embeddings().weight.shape[0]
    ids = {token for token in placeholder_ids(generator, processor) if token < size}
    if processor is not None:
        ids |= set(range(len(tokenizer_of(processor)), size))
    if lenvm is not None:
        ids |= set(range(embedding_rows(lenvm.backbone), size))
    return torch.tensor(sorted(ids), device=generator.device) if ids else None
