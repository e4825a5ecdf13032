import itertools

import pytest
import torch
from tiny_generators import build
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
)

from lenvm_lightning.decoding import SlotDecoder, slot_attention
from lenvm_lightning.slots import COLUMNS, FEWEST_ROWS, SlotCache, Span, cut_spans, round_up
from lenvm_lightning.value_model import LengthValueModel, LenVMConfig


@pytest.fixture(scope="module")
def exact():
    """A text model in float64."""
    return SlotDecoder(build("tiny-text", torch.float64))


def random_ids(count, seed=0):
    return torch.randint(2000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def start(decoder, cache, row, ids):
    """Fill a row with all but the last of the ids."""
    cache.fill([row], decoder.prefill([ids[:-1]]), [0], len(ids) - 1)


def feed(cache, sequences):
    """The last token of the sequence of each row."""
    ids = torch.zeros(cache.used, 1, dtype=torch.long)
    for row, sequence in sequences.items():
        ids[row, 0] = sequence[-1]
    return ids


def next_logits(model, ids):
    """What the whole sequence gives, without any cache."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


# -- rows -------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_every_step_gives_what_the_whole_sequence_gives(exact):
    """Rows of different lengths; one ends and its slot is used again, rows are sorted, the cache grows."""
    cache = SlotCache()
    sequences = {row: random_ids(length, row) for row, length in enumerate((5, 63, 64, 65, 130, 1))}
    for row, ids in sequences.items():
        start(exact, cache, row, ids)
    for step in range(75):
        if step == 3:
            cache.free(1)
            sequences[1] = random_ids(20, 99)
            start(exact, cache, 1, sequences[1])
        if step == 6:
            order = cache.sort()
            sequences = {row: sequences[old] for row, old in enumerate(order) if old in sequences}
            assert cache.lengths[:6] == sorted(cache.lengths[:6], key=round_up, reverse=True)
        logits = exact.forward(cache, feed(cache, sequences)).logits[:, -1]
        for row, ids in sequences.items():
            if step in (0, 3, 4, 7, 30, 74):
                torch.testing.assert_close(logits[row], next_logits(exact.model, ids), rtol=0, atol=1e-12)
            ids.append(int(logits[row].argmax()))
    assert cache.lengths[:6] == [len(sequences[row]) - 1 for row in range(6)]


@torch.inference_mode()
def test_float32():
    decoder = SlotDecoder(build("tiny-text"))
    cache, ids = SlotCache(), random_ids(100)
    start(decoder, cache, 0, ids)
    for _ in range(40):
        logits = decoder.forward(cache, feed(cache, {0: ids})).logits[0, -1]
        difference = logits.log_softmax(-1) - next_logits(decoder.model, ids).log_softmax(-1)
        assert difference.abs().max() < 1e-5
        ids.append(int(logits.argmax()))


@torch.inference_mode()
def test_prompts_of_a_batch_and_completions_of_a_prompt(exact):
    prompts = [random_ids(length, length) for length in (7, 40, 64)]
    cache = SlotCache()
    prefix = exact.prefill([prompt[:-1] for prompt in prompts])
    rows = {0: [0, 3], 1: [1], 2: [2, 4]}
    for source, targets in rows.items():
        cache.fill(targets, prefix, [source] * len(targets), len(prompts[source]) - 1)
    sequences = {row: prompts[source] for source, targets in rows.items() for row in targets}
    logits = exact.forward(cache, feed(cache, sequences)).logits[:, -1]
    for row, ids in sequences.items():
        torch.testing.assert_close(logits[row], next_logits(exact.model, ids), rtol=0, atol=1e-12)
    torch.testing.assert_close(logits[0], logits[3], rtol=0, atol=0)


@torch.inference_mode()
def test_a_row_with_nan_is_wiped(exact):
    cache = SlotCache()
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


def test_sort_moves_few(exact):
    cache = SlotCache()
    lengths = [100, 5, -1, 70, 3, 200, -1, 64]
    with torch.inference_mode():
        cache.reserve(8, 256)
        for row, length in enumerate(lengths):
            if length >= 0:
                start(exact, cache, row, random_ids(length + 1, row))
        before = [layer.keys.clone() for layer in cache.layers]
        order = cache.sort()
    assert [round_up(length + 1) for length in cache.lengths[:6]] == [256, 128, 128, 128, 64, 64]
    assert cache.lengths[6:] == [-1, -1]
    assert [lengths[old] for old in order] == cache.lengths
    assert order[3:5] == [3, 4]  # these stand where one of their width belongs
    for layer, keys in zip(cache.layers, before, strict=True):
        for row, old in enumerate(order[:6]):
            assert torch.equal(layer.keys[row, :, : cache.lengths[row]], keys[old, :, : cache.lengths[row]])


# -- several new tokens -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_candidates_beside_the_chosen_token(exact):
    """The chosen token and K candidates in one forward; then the candidates are cropped and another token is chosen."""
    count = 4
    within = torch.eye(1 + count, dtype=torch.bool)
    within[:, 0] = True
    depth = torch.tensor([0] + [1] * count)
    cache, sequences = SlotCache(), {0: random_ids(61, 1), 1: random_ids(10, 2)}
    for row, ids in sequences.items():
        start(exact, cache, row, ids)
    for step in range(6):  # the first row crosses a multiple of 64 on the way
        candidates = torch.tensor([random_ids(count, 10 * step + row) for row in range(cache.used)])
        new = torch.cat([feed(cache, sequences), candidates], 1)
        logits = exact.forward(cache, new, within, depth).logits
        cache.crop(count)
        for row, ids in sequences.items():
            torch.testing.assert_close(logits[row, 0], next_logits(exact.model, ids), rtol=0, atol=1e-12)
            for k in range(count):
                whole = next_logits(exact.model, [*ids, int(candidates[row, k])])
                torch.testing.assert_close(logits[row, 1 + k], whole, rtol=0, atol=1e-12)
            ids.append(int(candidates[row, step % count]))
        assert cache.lengths[:2] == [len(ids) - 1 for ids in sequences.values()]


@torch.inference_mode()
def test_several_tokens_are_causal_by_default(exact):
    cache, ids = SlotCache(), random_ids(70)
    start(exact, cache, 0, ids[:50])
    new = torch.tensor([ids[49:]] * cache.used)
    logits = exact.forward(cache, new).logits[0]
    whole = exact.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, 49:]
    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-12)


@torch.inference_mode()
def test_a_headless_value_model():
    backbone = build("tiny-text", torch.float64).model
    lenvm = LengthValueModel(backbone, LenVMConfig(0.997)).eval()
    decoder, cache, ids = SlotDecoder(backbone), SlotCache(), random_ids(30)
    start(decoder, cache, 0, ids)
    hidden = decoder.forward(cache, feed(cache, {0: ids})).last_hidden_state
    whole = lenvm(input_ids=torch.tensor([ids]))[0, -1]
    torch.testing.assert_close(lenvm.v_head(hidden)[0, -1], whole, rtol=0, atol=1e-12)


# -- families ---------------------------------------------------------------------------------------------------------

SHAPE = {
    "vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "sliding_window": 24,
}  # fmt: skip


@pytest.mark.parametrize("kind", [MistralConfig, Gemma2Config, Gemma3TextConfig])
@torch.inference_mode()
def test_sliding_windows(kind):
    """Mistral's layers all slide and their config does not list them; Gemma's alternate; Gemma 2 runs eagerly."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**SHAPE), dtype=torch.float64).eval()
    decoder, cache = SlotDecoder(model), SlotCache()
    sequences = {0: random_ids(20, 1), 1: random_ids(70, 2)}
    for row, ids in sequences.items():
        start(decoder, cache, row, ids)
    for _ in range(10):
        logits = decoder.forward(cache, feed(cache, sequences)).logits[:, -1]
        for row, ids in sequences.items():
            torch.testing.assert_close(logits[row], next_logits(model, ids), rtol=0, atol=1e-10)
            ids.append(int(logits[row].argmax()))


# -- spans and bits ---------------------------------------------------------------------------------------------------


def cost(spans):
    return sum(12 * COLUMNS + (span.stop - span.start) * span.width for span in spans)


def test_spans_are_the_cheapest():
    """Against every way to cut ten rows."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        widths = [64 * int(n) for n in torch.randint(1, 12, (10,), generator=generator)]
        spans = cut_spans(widths)
        assert [row for span in spans for row in range(span.start, span.stop)] == list(range(10))
        assert all(span.width >= max(widths[span.start : span.stop]) for span in spans)
        every = []
        for size in range(10):
            for cuts in itertools.combinations(range(1, 10), size):
                bounds = [0, *cuts, 10]
                pairs = itertools.pairwise(bounds)
                every.append([Span(a, b, max(widths[a:])) for a, b in pairs])
        assert cost(spans) == min(map(cost, every))


@pytest.mark.parametrize(("kept", "group", "size"), [(2, 2, 32), (2, 7, 64), (8, 4, 64), (4, 1, 16)])
def test_bits_do_not_depend_on_width_rows_or_spans(kept, group, size):
    generator = torch.Generator().manual_seed(0)
    rows = 12
    query = torch.randn(rows, kept * group, 1, size, generator=generator)
    key, value = torch.randn(2, rows, kept, 1280, size, generator=generator)

    def attend(which, width, length, spans=None):
        mask = torch.where(torch.arange(width) < length[which, None], 0.0, -torch.inf)[:, None, None]
        spans = spans or [Span(0, len(which), width)]
        module = torch.nn.Identity()
        return slot_attention(
            module, query[which], key[which, :, :width], value[which, :, :width], mask, slot_spans=spans
        )[0]

    every = torch.arange(rows)
    for longest in (64, 192, 320, 512, 700):
        length = torch.randint(1, longest + 1, (rows,), generator=generator).sort(descending=True).values
        least = round_up(longest)
        expected = attend(every, least, length)
        for width in range(least, 1281, COLUMNS):
            assert torch.equal(attend(every, width, length), expected)
        cut = cut_spans([round_up(int(n)) for n in length])
        assert torch.equal(attend(every, least, length, cut), expected)
        some = torch.tensor([7, 0, 3])
        assert torch.equal(attend(some, least, length), expected[some])


@torch.inference_mode()
def test_bits_of_a_prefill_do_not_depend_on_its_batch():
    decoder = SlotDecoder(build("tiny-text"))
    prompts = [random_ids(length, length) for length in (70, 128, 100, 65, 90, 127, 66, 77, 80)]
    together = decoder.prefill(prompts)
    for row, prompt in enumerate(prompts):
        alone = decoder.prefill([prompt])
        for ours, whole in zip(alone.layers, together.layers, strict=True):
            assert torch.equal(ours.keys[0, :, : len(prompt)], whole.keys[row, :, : len(prompt)])
            assert torch.equal(ours.values[0, :, : len(prompt)], whole.values[row, :, : len(prompt)])


@torch.inference_mode()
def test_bits_of_a_row_do_not_depend_on_the_others():
    decoder = SlotDecoder(build("tiny-text"))
    ids = random_ids(50)

    def run(row, others):
        cache = SlotCache()
        start(decoder, cache, row, ids)
        for other, length in others.items():
            start(decoder, cache, other, random_ids(length, other))
        return decoder.forward(cache, feed(cache, {row: ids})).logits[row, -1]

    alone = run(0, {})
    assert torch.equal(alone, run(5, {0: 300, 1: 20}))
    assert torch.equal(alone, run(40, {row: 10 * row + 1 for row in range(40)}))


def test_few_rows_are_filled_up():
    """Batches of fewer rows than these round otherwise, at least with MKL."""
    assert SlotCache().used == FEWEST_ROWS


def test_layers_without_keys_are_refused():
    with pytest.raises(ValueError, match="linear_attention"):
        SlotDecoder(MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1)))
