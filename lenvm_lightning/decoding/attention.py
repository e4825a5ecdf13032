"""Attention of new tokens over the rows of a `KVCache`: what each row holds is read once, and no further than it goes.

transformers' ``sdpa`` copies keys and values for every query head that shares them, and reads all rows as wide as the
longest. Here query heads that share a key are packed side by side, and rows of one width are read together, group by
group. In float32 and float64 on a CPU, `block_attention` computes each group, and gives a row the same bits whatever
stands beside it; everywhere else `packed_attention` does.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .kv_layout import COLUMNS, RowGroup

_NAME = "lenvm_row_attention"
_EXACT = (torch.float32, torch.float64)
_SCORES = 2**20  # computed at once by products: 4 MB, about what the cache of a core holds


def is_exact(model: PreTrainedModel) -> bool:
    """Whether `block_attention` computes a model's attention: the same bits in every batch."""
    return model.device.type == "cpu" and model.dtype in _EXACT


def is_row_attention(config: PreTrainedConfig) -> bool:
    """Whether a language model has `row_attention`."""
    return config._attn_implementation == _NAME


def set_row_attention(model: PreTrainedModel) -> None:
    """Let the language model of a model that uses ``sdpa``, and not its vision tower, use `row_attention`."""
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa":
        return
    names = [name for name in model.config.sub_configs if getattr(model.config, name) is config]
    model.set_attn_implementation({names[0]: _NAME} if names else _NAME)


def row_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    row_groups: list[RowGroup] | None = None,
    packed_queries: bool = False,
    kept: Tensor | None = None,
    heard: list[bool] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of new tokens over rows of a cache; of whole prompts, which have none yet, transformers' ``sdpa``.

    Args:
        module: the attention layer.
        query: shape (B, heads, T, head size); where some tokens are left out, (1, heads, N, head size).
        key: lines of all rows, see `KVCacheLayer`. Shape (1, key-value heads, …, head size), or (B, key-value heads,
            width, head size) where there is one row group.
        value: likewise.
        attention_mask: added to the scores: 0 or -inf. Shape (B, 1, T, columns of the widest row).
        scaling: of the scores.
        row_groups: which rows lie where.
        packed_queries: there is one row group, and everything has the shapes that `packed_attention` takes.
        kept: which of the B * T tokens there are, see `Placement`; None = all.
        heard: gets an entry: a few families do not hand on to their attention what a step is told.
        kwargs: for ``sdpa``.

    Returns:
        Shape (B, T, heads, head size) or (1, N, heads, head size), and None for the weights.
    """
    if heard is not None:
        heard.append(True)
    if attention_mask is None or not (row_groups or packed_queries):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if kept is not None:
        query = _with_gaps(query, kept, *attention_mask.shape[::2])
    if not row_groups:
        output = packed_attention(query, key, value, attention_mask, scaling)
    elif query.dtype in _EXACT:
        output = block_attention(query, key, value, attention_mask, scaling, row_groups)
    else:
        output = grouped_attention(query, key, value, attention_mask, scaling, row_groups)
    output = output.transpose(1, 2)
    if kept is not None:
        return output.flatten(0, 1)[kept][None], None
    return output.contiguous(), None


def _with_gaps(query: Tensor, kept: Tensor, rows: int, tokens: int) -> Tensor:
    """Queries (1, heads, N, head size) at their places among those of all tokens. Shape (B, heads, T, head size)."""
    _, heads, _, size = query.shape
    whole = query.new_zeros(rows * tokens, heads, size)
    whole[kept] = query[0].transpose(0, 1)
    return whole.view(rows, tokens, heads, size).transpose(1, 2)


AttentionInterface.register(_NAME, row_attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float | None = None
) -> Tensor:
    """Attention of few new tokens, query heads that share a key packed, so that keys and values are never repeated.

    Args:
        query: shape (B, heads, T, head size).
        key: shape (B, key-value heads, width, head size).
        value: likewise.
        attention_mask: added to the scores: 0 or -inf. Shape (B, 1, T, width).
        scaling: of the scores.

    Returns:
        Shape (B, heads, T, head size).
    """
    rows, heads, tokens, size = query.shape
    kept = key.shape[1]
    packed = query.reshape(rows, kept, -1, size)
    if query.device.type == "cpu" and query.dtype not in _EXACT:
        output = _by_products(packed, key, value, attention_mask, size**-0.5 if scaling is None else scaling)
        return output.reshape(rows, heads, tokens, -1)
    mask = attention_mask.repeat(1, 1, heads // kept, 1)
    output = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(rows, heads, tokens, -1)


def _by_products(queries: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scale: float) -> Tensor:
    """Attention as it is defined, two products of matrices.

    Of few queries in bfloat16, torch's ``sdpa`` takes up to twice as long on a CPU core. Scores are rounded to
    bfloat16, as by transformers' ``eager`` attention.

    Args:
        queries: those that share a key packed. Shape (B, key-value heads, group * T, head size).
        key: shape (B, key-value heads, width, head size).
        value: likewise.
        attention_mask: shape (B, 1, T, width).
        scale: of the scores.

    Returns:
        Shape (B * key-value heads, group * T, head size).
    """
    rows, kept, packed, _ = queries.shape
    tokens, width = attention_mask.shape[2:]
    mask = attention_mask.float()[:, :, None]
    output = value.new_empty(rows * kept, packed, value.shape[-1])
    step = max(1, _SCORES // (kept * packed * width))
    for start in range(0, rows, step):
        some = slice(start, start + step)
        scores = torch.bmm(queries[some].flatten(0, 1), key[some].flatten(0, 1).transpose(1, 2))
        by_token = scores.view(-1, kept, packed // tokens, tokens, width)
        weights = torch.add(mask[some], by_token, alpha=scale).softmax(-1).view(scores.shape)
        of_some = slice(start * kept, (start + step) * kept)
        torch.bmm(weights.to(value.dtype), value[some].flatten(0, 1), out=output[of_some])
    return output


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None,
    row_groups: list[RowGroup],
) -> Tensor:
    """`packed_attention` of each row group, and no wider than the group is. Arguments as of `row_attention`.

    Returns:
        Shape (B, heads, T, head size).
    """
    kept, size = key.shape[1], key.shape[-1]
    key_lines, value_lines = key.reshape(-1, size), value.reshape(-1, value.shape[-1])
    outputs = []
    for group in row_groups:
        rows = slice(group.start, group.stop)
        count = group.stop - group.start
        lines = slice(group.before * kept, (group.before + count * group.width) * kept)
        group_keys = key_lines[lines].view(count, kept, group.width, -1)
        group_values = value_lines[lines].view(count, kept, group.width, -1)
        mask = attention_mask[rows, :, :, : group.width]
        outputs.append(packed_attention(query[rows], group_keys, group_values, mask, scaling))
    return torch.cat(outputs)


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None,
    row_groups: list[RowGroup],
) -> Tensor:
    """What `grouped_attention` computes, with the same bits for a row whatever the others hold.

    Products are of blocks of `COLUMNS` columns, all of one shape whatever the groups, and blocks are added one after
    the other; through numpy, whose BLAS takes small matrices twice as fast as torch's. On a CPU, in float32 or float64.
    Arguments as of `row_attention`.

    Returns:
        Shape (B, heads, T, head size).
    """
    rows, heads, tokens, size = query.shape
    kept_heads = key.shape[1]
    scale = size**-0.5 if scaling is None else scaling
    queries = (query * scale).reshape(rows * kept_heads, 1, -1, size).numpy()  # (B * kv heads, 1, group * T, size)
    key_blocks = key.reshape(-1, COLUMNS, size).numpy()
    value_blocks = value.reshape(-1, COLUMNS, value.shape[-1]).numpy()
    output = query.new_empty(rows, heads, tokens, value.shape[-1])
    outputs = output.view(rows * kept_heads, -1, value.shape[-1]).numpy()
    with np.errstate(all="ignore"):  # NaN is told where tokens are sampled
        for group in row_groups:
            # 1. The blocks of the group's rows: (rows * kv heads, blocks, COLUMNS, size).
            group_heads = (group.stop - group.start) * kept_heads
            blocks = group.width // COLUMNS
            of_group = slice(group.start * kept_heads, group.stop * kept_heads)
            first_block = group.before * kept_heads // COLUMNS
            taken = slice(first_block, first_block + group_heads * blocks)
            shape = (group_heads, blocks, COLUMNS)
            group_keys = key_blocks[taken].reshape(*shape, size)
            group_values = value_blocks[taken].reshape(*shape, -1)
            # 2. Scores, written block by block into one tensor (rows * kv heads, group * T, width).
            scores = query.new_empty(group_heads, queries.shape[2], group.width)
            score_blocks = scores.view(group_heads, -1, blocks, COLUMNS).transpose(1, 2)
            np.matmul(queries[of_group], group_keys.swapaxes(2, 3), out=score_blocks.numpy())
            mask = attention_mask[group.start : group.stop, :, None, :, : group.width]
            scores.view(group.stop - group.start, kept_heads, -1, tokens, group.width).add_(mask)
            # 3. Weighted sums of each block, added one block after the other.
            weights = scores.softmax(-1).view(group_heads, -1, blocks, COLUMNS).transpose(1, 2)
            sums = np.matmul(weights.numpy(), group_values)
            np.add.reduce(sums, axis=1, out=outputs[of_group])
    return output
