"""Rows are freed, filled, moved and wiped, and hold what they held."""

import torch
from pairs import random_ids
from rows import feed, next_logits, start
from tiny_generators import build

from lenvm_lightning.decoding.kv_cache import FEWEST_ROWS, KVCache
from lenvm_lightning.decoding.kv_layout import round_up_to_power
from lenvm_lightning.decoding.model_runner import ModelRunner


@torch.inference_mode()
def test_a_row_with_nan_is_wiped(exact):
    cache = exact.new_cache()
    start(exact, cache, 0, random_ids(30))
    for layer in cache.layers:
        layer.keys[0] = torch.nan
        layer.values[0] = torch.nan
    logits = exact.forward(cache, feed(cache, {0: [1]})).logits[:, -1]
    assert logits[0].isnan().all()
    assert logits[1:].isfinite().all()
    cache.free(0, wipe=True)
    ids = random_ids(5)
    start(exact, cache, 0, ids)
    logits = exact.forward(cache, feed(cache, {0: ids})).logits[0, -1]
    torch.testing.assert_close(logits, next_logits(exact.model, ids), rtol=0, atol=1e-12)


def test_a_layout_moves_what_rows_hold(exact):
    cache = exact.new_cache(fewest_rows=8)
    lengths = [100, 5, -1, 70, 3, 200, -1, 64, 33]
    with torch.inference_mode():
        for row, length in enumerate(lengths):
            if length >= 0:
                start(exact, cache, row, random_ids(length + 1, row))
        held = {row: [kept[:, :length].clone() for layer in cache.layers for kept in layer.row(row)]
                for row, length in enumerate(lengths) if length >= 0}  # fmt: skip
        order = [5, 0, 3, -1, 7, 8, -1, 4]
        cache.lay_out(order, [230, 150, 100, 90, 64, 60, 40, 40])
        assert cache.lengths == [200, 100, 70, -1, 64, 33, -1, 3]
        for row, old in enumerate(order):
            width = cache.layout.widths[row]
            assert width >= [230, 150, 100, 90, 64, 60, 40, 40][row]
            rows = [kept for layer in cache.layers for kept in layer.row(row)]
            assert all(kept.shape[1] == width for kept in rows)
            if old < 0:
                assert not any(kept.any() for kept in rows)
            else:
                for kept, before in zip(rows, held[old], strict=True):
                    assert torch.equal(kept[:, : lengths[old]], before)
    assert all(layer.keys.shape[0] == 2 * sum(cache.layout.widths) for layer in cache.layers)


@torch.inference_mode()
def test_one_span_for_other_attentions():
    """Where the attention knows no row groups, all rows are of one width; keys are then as any cache returns them."""
    model = build("tiny-text", torch.float64)
    model.set_attn_implementation("eager")
    decoder, sequences = ModelRunner(model), {0: random_ids(9, 1), 1: random_ids(70, 2)}
    cache = decoder.new_cache()
    for row, ids in sequences.items():
        start(decoder, cache, row, ids)
    cache.lay_out([1, 0], [80, 20])
    assert [(group.start, group.stop) for group in cache.layout.row_groups] == [(0, FEWEST_ROWS)]
    sequences = {0: sequences[1], 1: sequences[0]}
    for _ in range(3):
        logits = decoder.forward(cache, feed(cache, sequences)).logits[:, -1]
        for row, ids in sequences.items():
            torch.testing.assert_close(
                logits[row], next_logits(model, ids), rtol=0, atol=1e-6
            )  # eager rounds its softmax to float32
            ids.append(int(logits[row].argmax()))


def test_few_rows_are_filled_up(exact):
    """Batches of fewer rows than these round otherwise, at least with MKL."""
    cache = exact.new_cache()
    cache.lay_out([-1], [5])
    assert cache.rows == FEWEST_ROWS


def test_static_caches_are_powers_of_two():
    assert [round_up_to_power(count) for count in (0, 1, 2, 3, 5, 8, 9)] == [1, 1, 2, 4, 8, 8, 16]
    KVCache(static=True).lay_out([], [])
    cache = KVCache(static=True, fewest_rows=1)
    for rows, width, expected in ((1, 3, (1, 256)), (3, 256, (4, 256)), (5, 257, (8, 512)), (2, 10, (2, 512))):
        cache.lay_out([*range(min(rows, cache.rows)), *[-1] * (rows - cache.rows)][:rows], [width] * rows)
        cache.lengths[0] = max(cache.lengths[0], 257 if rows == 5 else 3)
        assert (cache.rows, cache.layout.widths[0]) == expected
