"""What a generator gives to the tokens of a text that is there already: log-probabilities, and the likeliest ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from ..models.backbone import cache_argument

_AT_ONCE = 2**26  # logits of a piece of the text, in numbers: 256 MB in float32


@dataclass(frozen=True)
class ReadToken:
    """A token of a text.

    Attributes:
        token_id: the token.
        logprob: (nats) given the tokens before it; None for the first.
        likeliest: ids and log-probabilities of the tokens that were likeliest in its place, the best first.
    """

    token_id: int
    logprob: float | None
    likeliest: tuple[tuple[int, float], ...] = ()


@torch.inference_mode()
def read_back(model: PreTrainedModel, ids: Sequence[int], likeliest: int = 0) -> list[ReadToken]:
    """Read a text with a generator, piece by piece: logits of all its tokens at once may not fit into memory.

    Args:
        model: decoder with a vocabulary head, in eval mode.
        ids: of the text, at least one.
        likeliest: so many are told for each token.

    Returns:
        One for each id. Log-probabilities are of the whole vocabulary, before temperature and truncation.
    """
    cache = DynamicCache(config=model.config.get_text_config())
    name = cache_argument(model)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    piece = max(1, _AT_ONCE // vocabulary)
    read = [ReadToken(ids[0], None)]
    for start in range(0, len(ids) - 1, piece):
        fed = torch.tensor([ids[start : min(start + piece, len(ids) - 1)]], device=model.device)
        logprobs = model(input_ids=fed, use_cache=True, **{name: cache}).logits[0].float().log_softmax(-1)
        following = torch.tensor(ids[start + 1 : start + 1 + len(logprobs)], device=model.device)
        best = logprobs.topk(min(likeliest, logprobs.shape[1]))
        own = logprobs.gather(1, following[:, None])[:, 0].tolist()
        for token, logprob, ids_of, numbers in zip(
            following.tolist(), own, best.indices.tolist(), best.values.tolist(), strict=True
        ):
            read.append(ReadToken(token, logprob, tuple(zip(ids_of, numbers, strict=True))))
    return read
