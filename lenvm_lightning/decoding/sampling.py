"""Sampling tokens: one uniform number a token, inverted through the distribution in the order of the token ids.

A row's token depends on its own logits and its own uniform alone, never on the rows beside it.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .sampling_params import SamplingParams

_BUCKET = 64  # tokens summed first: the search goes through buckets, then through one of them


def sample_tokens(
    logits: Tensor,
    uniforms: Tensor,
    params: SamplingParams,
    forbidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample one token a row.

    Args:
        logits: shape (B, V), any float dtype.
        uniforms: one number in [0, 1) a row, not read at temperature 0. Shape (B,), float64.
        params: of all rows; at temperature 0 the likeliest token is taken, the first of equals.
        forbidden: ids that are never sampled, whatever their logits. Shape (n,), int64.

    Returns:
        Token ids, -1 where the logits hold NaN or +inf or allow no token, shape (B,), int64; and the log-probability
        (nats) that the logits give each, before temperature, truncation and ``forbidden``, shape (B,), float64.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    probabilities = logits.softmax(-1)
    allowed = logits if forbidden is None else logits.index_fill(1, forbidden, -torch.inf)
    temperature = params.temperature
    if temperature == 0:
        ids = allowed.argmax(-1)
    else:
        kept = truncate(allowed if temperature == 1 else allowed / temperature, params)
        ids = invert(probabilities if kept is logits else kept.softmax(-1), uniforms)
    chosen = allowed.gather(1, ids[:, None])
    if temperature <= 1:
        logprob = probabilities.gather(1, ids[:, None]).double().log()
    else:  # what is sampled then can be too unlikely for a float32 probability
        logprob = chosen.double() - logits.logsumexp(-1, keepdim=True).double()
    sound = chosen.isfinite() & logprob.isfinite()
    return ids.masked_fill(~sound.squeeze(1), -1), logprob.squeeze(1)


class RowParams:
    """Sampling params of the rows of a batch as columns, made once for many steps.

    Args:
        params: of each row.
        device: of the logits.

    Attributes:
        params: of each row.
        temperature: 1 where a row is greedy: the likeliest token alone would leave a control nothing to choose among.
            Shape (B, 1), float64.
        top_k: 0 where all tokens are kept. Shape (B, 1), int64.
        top_p: shape (B, 1), float64.
        log_min_p: -inf where all tokens are kept. Shape (B, 1), float64.
        greedy: True = the likeliest token is taken. Shape (B,).
    """

    def __init__(self, params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> None:
        def column(numbers: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)[:, None]

        self.params = params
        self.temperature = column([one.temperature or 1.0 for one in params])
        self.top_k = column([one.top_k for one in params], torch.int64)
        self.top_p = column([one.top_p for one in params])
        self.log_min_p = column([math.log(one.min_p) if one.min_p else -math.inf for one in params])
        self.greedy = torch.tensor([one.temperature == 0 for one in params], device=device)
        self.some_keep_all = any(not one.top_k for one in params)


def candidates(logits: Tensor, rows: RowParams, most: int, forbidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The tokens that truncation leaves of each row, for a control to choose among.

    Truncation works as in `truncate`, each row by its own params.

    Args:
        logits: shape (B, V), any float dtype.
        rows: params of each row.
        most: likeliest tokens that are looked at.
        forbidden: ids that are never candidates. Shape (n,), int64.

    Returns:
        Ids, the likeliest first, shape (B, K), K <= ``most``, int64; and their probabilities, renormalised, 0 for
        tokens that are not kept, shape (B, K), float64: NaN where the logits hold NaN or +inf.
    """
    vocabulary = logits.shape[1]
    # 1. The likeliest tokens, and the rank of each.
    allowed = logits if forbidden is None else logits.index_fill(1, forbidden, -torch.inf)
    best, ids = allowed.topk(min(most, vocabulary), sorted=True)
    best = best.double() / rows.temperature
    rank = torch.arange(best.shape[1], device=logits.device)
    # 2. Their share of the mass of the tokens that top_k keeps; where it keeps all, of the whole vocabulary.
    top_k = torch.where(rows.top_k == 0, vocabulary, rows.top_k)
    log_mass = best.masked_fill(rank >= top_k, -torch.inf).logsumexp(-1, keepdim=True)
    if rows.some_keep_all:
        scaled = allowed.to(torch.promote_types(logits.dtype, torch.float32)) / rows.temperature.to(torch.float32)
        log_mass = torch.where(rows.top_k == 0, scaled.logsumexp(-1, keepdim=True).double(), log_mass)
    shares = (best - log_mass).exp()
    # 3. What top_k, top_p and min_p keep; the likeliest token always.
    mass_before = shares.cumsum(-1) - shares
    kept = (rank < top_k) & (mass_before < rows.top_p)
    kept &= best >= best[:, :1] + rows.log_min_p
    kept |= rank == 0
    return ids, best.masked_fill(~kept, -torch.inf).softmax(-1)


def sample_candidates(ids: Tensor, weights: Tensor, uniforms: Tensor) -> Tensor:
    """Place of the candidate in whose share of the cumulative distribution, in the order of ids, each uniform falls.

    The same token as `sample_tokens` takes where the weights are those of the kept tokens.

    Args:
        ids: shape (B, K).
        weights: probabilities, or any multiple of them. Shape (B, K), float64.
        uniforms: in [0, 1). Shape (B,), float64.

    Returns:
        Shape (B,), int64; never a place of weight 0 unless the whole row is 0 or holds NaN.
    """
    order = ids.argsort(-1)
    mass = weights.gather(1, order)
    place, _ = _locate(mass, uniforms * mass.sum(-1))
    return order.gather(1, place[:, None]).squeeze(1)


def truncate(logits: Tensor, params: SamplingParams) -> Tensor:
    """Logits with -inf for tokens that are not kept; the settings work as in transformers, in this order.

    Tokens as likely as the last one kept are kept too.

    Args:
        logits: after temperature. Shape (B, V).
        params: top_k, top_p (of the tokens that top_k keeps) and min_p; the temperature is not read.

    Returns:
        Shape (B, V); the very tensor where all are kept.
    """
    top_k, top_p, min_p = params.top_k, params.top_p, params.min_p
    least: Tensor | None = None  # smallest logit kept, (B, 1)
    if top_k or top_p < 1:
        best = _likeliest(logits, min(top_k or logits.shape[-1], logits.shape[-1]))
        least = best[:, :1]
        if top_p < 1:
            mass = best.softmax(-1).cumsum(-1, dtype=torch.float64)
            # A token is kept while those before it, which stand behind it here, have not reached top_p.
            first = torch.searchsorted(mass, (1 - top_p) * mass[:, -1:], right=True)
            least = best.gather(1, first.clamp(max=best.shape[-1] - 1))
    if min_p > 0:
        near = logits.amax(-1, keepdim=True) + math.log(min_p)
        least = near if least is None else torch.maximum(least, near)
    return logits if least is None else logits.masked_fill(logits < least, -torch.inf)


def _likeliest(logits: Tensor, count: int) -> Tensor:
    """The ``count`` largest of each row, the largest last. Shape (B, count)."""
    if logits.device.type == "cpu":  # numpy's vector instructions sort values several times as fast as torch does
        values, first = logits.numpy(), logits.shape[-1] - count
        best = np.partition(values, first, axis=-1)[:, first:] if first else values
        return torch.from_numpy(np.sort(best, axis=-1))
    return logits.topk(count, sorted=True).values.flip(-1)


def invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The token in whose share of the cumulative distribution, in the order of ids, each uniform falls.

    Args:
        weights: probabilities, or any multiple of them. Shape (B, V).
        uniforms: in [0, 1). Shape (B,), float64.

    Returns:
        Ids; never one of weight 0 unless the whole row is 0 or holds NaN. Shape (B,), int64.
    """
    size = weights.shape[-1]
    buckets = F.pad(weights, (0, -size % _BUCKET)) if size % _BUCKET else weights
    buckets = buckets.unflatten(-1, (-1, _BUCKET))
    mass = buckets.sum(-1).double()  # (B, V / bucket)
    bucket, left = _locate(mass, uniforms * mass.sum(-1))
    inside = buckets.gather(1, bucket[:, None, None].expand(-1, 1, _BUCKET)).squeeze(1).double()
    place, _ = _locate(inside, left)
    return (bucket * _BUCKET + place).clamp(max=size - 1)


def _locate(mass: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """First entry with a cumulative mass above ``target``, and what of the target is left there. Shapes (B,)."""
    end = mass.cumsum(-1)
    # Sums in another order round differently: a target beyond the end means the last entry that has any mass.
    target = torch.minimum(target, end[:, -1].nextafter(torch.zeros_like(target)))
    index = torch.searchsorted(end, target[:, None], right=True).clamp(max=mass.shape[-1] - 1)
    start = end.gather(1, index) - mass.gather(1, index)
    return index.squeeze(1), (target - start.squeeze(1)).clamp(min=0)
