"""Attention over row groups: what ``sdpa`` computes row by row; where it is promised, the same bits in every layout."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, DynamicCache, Qwen2Config

from lenvm_lightning.decoding import attention
from lenvm_lightning.decoding.attention import block_attention, grouped_attention, packed_attention
from lenvm_lightning.decoding.kv_cache import KVCache
from lenvm_lightning.decoding.kv_layout import cut_row_groups
from lenvm_lightning.decoding.model_runner import ModelRunner

# -- one function beside another --------------------------------------------------------------------------------------

WIDTHS = [256, 256, 96, 64, 64, 64, 32, 32]


def inputs(dtype, kept, group, tokens, size=16):
    """Queries, keys and values as lines, and a mask that lets every row see a part of its columns."""
    random = torch.Generator().manual_seed(0)
    groups = cut_row_groups(WIDTHS)
    lines = sum((one.stop - one.start) * one.width for one in groups) * kept
    query = torch.randn(len(WIDTHS), kept * group, tokens, size, generator=random).to(dtype)
    key, value = torch.randn(2, 1, kept, lines // kept, size, generator=random).to(dtype)
    seen = torch.rand(len(WIDTHS), 1, tokens, max(WIDTHS), generator=random) < 0.7
    seen[..., 0] = True
    return query, key, value, torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf), groups


def row_by_row(query, key, value, mask, groups, scaling):
    """Transformers' way: keys and values repeated for every query head."""
    kept, size = key.shape[1], key.shape[-1]
    result, start = [], 0
    for row in range(len(WIDTHS)):
        [width] = [one.width for one in groups if one.start <= row < one.stop]
        own = [lines.reshape(-1, size)[start : start + kept * width].view(kept, width, size) for lines in (key, value)]
        start += kept * width
        repeated = [one.repeat_interleave(query.shape[1] // kept, 0) for one in own]
        result.append(
            scaled_dot_product_attention(query[row], *repeated, attn_mask=mask[row, :, :, :width], scale=scaling)
        )
    return torch.stack(result)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(("kept", "group"), [(2, 3), (1, 4), (3, 1)])
@pytest.mark.parametrize(
    ("attend", "dtype", "tolerance"),
    [
        (block_attention, torch.float64, 1e-12),
        (block_attention, torch.float32, 2e-6),
        (grouped_attention, torch.float64, 1e-12),
        (grouped_attention, torch.bfloat16, 2e-2),
    ],
)
@torch.inference_mode()
def test_every_row_sees_its_own_columns(attend, dtype, tolerance, kept, group, tokens):
    query, key, value, mask, groups = inputs(dtype, kept, group, tokens)
    assert len(groups) > 1
    for scaling in (None, 0.3):
        expected = row_by_row(query, key, value, mask, groups, scaling)
        found = attend(query, key, value, mask, scaling, groups)
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@torch.inference_mode()
def test_packed_queries_are_those_of_repeated_keys():
    random = torch.Generator().manual_seed(0)
    query = torch.randn(3, 6, 4, 8, generator=random, dtype=torch.float64)
    key, value = torch.randn(2, 3, 2, 20, 8, generator=random, dtype=torch.float64)
    mask = torch.zeros(3, 1, 4, 20, dtype=torch.float64)
    mask[1, :, 2, 7:] = -torch.inf
    repeated = [kept.repeat_interleave(3, 1) for kept in (key, value)]
    expected = scaled_dot_product_attention(query, *repeated, attn_mask=mask)
    torch.testing.assert_close(packed_attention(query, key, value, mask), expected, rtol=0, atol=1e-12)


@torch.inference_mode()
def test_products_of_a_few_rows_at_once_are_those_of_all(monkeypatch):
    """In bfloat16 on a CPU, scores are computed in parts that fit into the cache of a core."""
    query, key, value, mask, groups = inputs(torch.bfloat16, 2, 3, 5)
    whole = grouped_attention(query, key, value, mask, None, groups)
    monkeypatch.setattr(attention, "_SCORES", 1)  # a row at a time
    torch.testing.assert_close(grouped_attention(query, key, value, mask, None, groups), whole, rtol=0, atol=1e-2)


@torch.inference_mode()
def test_rows_in_bfloat16_are_no_wider_than_what_they_hold():
    """Prompts of very different lengths side by side say what each says on its own, but for what bfloat16 rounds."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=500, intermediate_size=96, **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    runner = ModelRunner(model)
    cache = runner.new_cache(1)
    prompts = [torch.randint(500, (length,)).tolist() for length in (900, 60, 40, 40, 7)]
    cache.lay_out([-1] * len(prompts), [len(prompt) + 1 for prompt in prompts])
    for row, prompt in enumerate(prompts):
        cache.fill([row], runner.prefill([prompt[:-1]]), [0], len(prompt) - 1)
    logits = runner.forward(cache, torch.tensor([[prompt[-1]] for prompt in prompts])).logits[:, -1]
    assert len(cache.layout.row_groups) > 1
    assert cache.layout.widths[-1] < 200
    for row, prompt in enumerate(prompts):
        own = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(logits[row], own, rtol=0, atol=0.05)


# -- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kept", "group", "size"), [(2, 2, 32), (2, 7, 64), (8, 4, 64), (4, 1, 16), (1, 10, 128)])
@torch.inference_mode()
def test_bits_do_not_depend_on_the_layout(kept, group, size):
    """Twelve rows, laid out tightly, widely, in other orders, and some of them alone."""
    generator = torch.Generator().manual_seed(0)
    rows, longest = 12, 700
    lengths = [1, 31, 32, 33, 64, 100, 250, 255, 256, 400, 511, longest]
    query = torch.randn(rows, kept * group, 1, size, generator=generator)
    prefix, new = torch.randn(2, rows, kept, longest, size, generator=generator), torch.randn(2, rows, kept, 1, size)

    def attend(which, widths):
        cache, held = KVCache(grouped=True, fewest_rows=1), DynamicCache()
        held.update(*prefix, 0)
        cache.lay_out([-1] * len(which), widths)
        for row, source in enumerate(which):
            cache.fill([row], held, [source], lengths[source])
        step = cache.append(1)
        extra = [0] * (cache.rows - len(which))
        key, value = cache.update(*new[:, which + extra], 0)
        mask = torch.where(torch.arange(step.width) <= step.columns, 0.0, -torch.inf)[:, None, None]
        output = block_attention(query[which + extra], key, value, mask, None, cache.layout.row_groups)
        return output[: len(which)], len(cache.layout.row_groups)

    every = list(range(rows))[::-1]
    tight, groups = attend(every, [lengths[row] + 1 for row in every])
    assert groups > 1
    for width in (736, 768, 1024, 1536):
        wide, groups = attend(every, [width] * rows)
        assert groups == 1
        assert torch.equal(wide, tight)
    shuffled = [7, 2, 11, 0, 5, 10, 1, 3, 9, 8, 6, 4]
    assert torch.equal(attend(shuffled, [lengths[row] + 200 for row in shuffled])[0], tight[[11 - r for r in shuffled]])
    for some in ([3], [9, 2], [0, 11, 4]):
        assert torch.equal(attend(some, [lengths[row] + 1 for row in some])[0], tight[[11 - row for row in some]])
    expected = torch.stack(
        [
            scaled_dot_product_attention(
                query[row],
                torch.cat([prefix[0, row, :, : lengths[row]], new[0, row]], 1).repeat_interleave(group, 0),
                torch.cat([prefix[1, row, :, : lengths[row]], new[1, row]], 1).repeat_interleave(group, 0),
            )
            for row in every
        ]
    )
    torch.testing.assert_close(tight, expected, rtol=0, atol=2e-6)
