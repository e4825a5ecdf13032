import pytest
import torch
from pairs import random_ids
from rows import feed, next_logits, start
from tiny_generators import build
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, MistralConfig

from lenvm_lightning.decoding.model_runner import ModelRunner
from lenvm_lightning.models.lenvm_config import LenVMConfig
from lenvm_lightning.models.value_model import LengthValueModel

# -- rows -------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_every_step_gives_what_the_whole_sequence_gives(exact):
    """Rows of different lengths; one ends and its row is used again, rows are laid out anew, the cache grows."""
    cache = exact.new_cache()
    sequences = {row: random_ids(length, row) for row, length in enumerate((5, 63, 64, 65, 400, 1))}
    for row, ids in sequences.items():
        start(exact, cache, row, ids)
    for step in range(75):
        if step == 3:
            cache.free(1)
            sequences[1] = random_ids(20, 99)
            start(exact, cache, 1, sequences[1])
        if step in (6, 40):  # rows by length, and the free ones are gone
            order = sorted(sequences, key=lambda row: -cache.lengths[row])
            cache.lay_out(order, [cache.lengths[row] + 9 for row in order])
            sequences = {row: sequences[old] for row, old in enumerate(order)}
            assert len(cache.layout.row_groups) > 1
        logits = exact.forward(cache, feed(cache, sequences)).logits[:, -1]
        for row, ids in sequences.items():
            if step in (0, 3, 4, 7, 30, 74):
                torch.testing.assert_close(logits[row], next_logits(exact.model, ids), rtol=0, atol=1e-12)
            ids.append(int(logits[row].argmax()))
    assert cache.lengths[:6] == [len(sequences[row]) - 1 for row in range(6)]


@torch.inference_mode()
def test_float32():
    decoder = ModelRunner(build("tiny-text"))
    cache, ids = decoder.new_cache(), random_ids(100)
    start(decoder, cache, 0, ids)
    for _ in range(40):
        logits = decoder.forward(cache, feed(cache, {0: ids})).logits[0, -1]
        difference = logits.log_softmax(-1) - next_logits(decoder.model, ids).log_softmax(-1)
        assert difference.abs().max() < 1e-5
        ids.append(int(logits.argmax()))


@torch.inference_mode()
def test_prompts_of_a_batch_and_completions_of_a_prompt(exact):
    prompts = [random_ids(length, length) for length in (7, 40, 64)]
    cache = exact.new_cache()
    prefix = exact.prefill([prompt[:-1] for prompt in prompts])
    rows = {0: [0, 3], 1: [1], 2: [2, 4]}
    for source, targets in rows.items():
        cache.fill(targets, prefix, [source] * len(targets), len(prompts[source]) - 1)
    sequences = {row: prompts[source] for source, targets in rows.items() for row in targets}
    logits = exact.forward(cache, feed(cache, sequences)).logits[:, -1]
    for row, ids in sequences.items():
        torch.testing.assert_close(logits[row], next_logits(exact.model, ids), rtol=0, atol=1e-12)
    torch.testing.assert_close(logits[0], logits[3], rtol=0, atol=0)


# -- several new tokens -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_candidates_beside_the_chosen_token(exact):
    """The chosen token and K candidates in one forward; then the candidates are cropped and another token is chosen."""
    count = 4
    within = torch.eye(1 + count, dtype=torch.bool)
    within[:, 0] = True
    depth = torch.tensor([0] + [1] * count)
    cache, sequences = exact.new_cache(), {0: random_ids(61, 1), 1: random_ids(10, 2)}
    for row, ids in sequences.items():
        start(exact, cache, row, ids)
    for step in range(6):  # the first row crosses a multiple of 64 on the way
        candidates = torch.tensor([random_ids(count, 10 * step + row) for row in range(cache.rows)])
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
def test_new_tokens_that_are_left_out(exact):
    """Each row has as many candidates as it needs, a free one no token at all; no other column is written to."""
    lengths, counts = (61, 9, 900, 30), (3, 0, 1, 2)
    most = max(counts)
    within = torch.eye(1 + most, dtype=torch.bool)
    within[:, 0] = True
    depth = torch.tensor([0] + [1] * most)
    cache = exact.new_cache(4)
    sequences = {row: random_ids(length, row) for row, length in enumerate(lengths)}
    for row, ids in sequences.items():
        start(exact, cache, row, ids)
    cache.free(3)
    del sequences[3]
    order = sorted(range(4), key=lambda row: -cache.lengths[row])
    cache.lay_out(order, [max(cache.lengths[row], 0) + 40 for row in order])
    assert len(cache.layout.row_groups) > 1
    sequences = {new: sequences[old] for new, old in enumerate(order) if old in sequences}
    candidates = torch.tensor([random_ids(most, 50 + row) for row in range(4)])
    present = torch.zeros(4, 1 + most, dtype=torch.bool)
    for row, old in enumerate(order):
        if old in (0, 1, 2):
            present[row, : 1 + counts[old]] = True
    for _ in range(2):
        before = [layer.both[0].clone() for layer in cache.layers]
        new = torch.cat([feed(cache, sequences), candidates], 1)
        found = exact.forward(cache, new, within, depth, present).logits
        cache.crop(most)
        assert found.shape[:2] == (1, int(present.sum()))
        changed = [int((layer.both[0] != old).any(-1).sum()) for layer, old in zip(cache.layers, before, strict=True)]
        assert all(lines <= int(present.sum()) * cache.layers[0].heads for lines in changed)
        place = 0
        for row, ids in sequences.items():
            torch.testing.assert_close(found[0, place], next_logits(exact.model, ids), rtol=0, atol=1e-12)
            for k in range(int(present[row].sum()) - 1):
                whole = next_logits(exact.model, [*ids, int(candidates[row, k])])
                torch.testing.assert_close(found[0, place + 1 + k], whole, rtol=0, atol=1e-12)
            place += int(present[row].sum())
            ids.append(int(candidates[row, 0]))
        assert place == present.sum()


@torch.inference_mode()
def test_several_tokens_are_causal_by_default(exact):
    cache, ids = exact.new_cache(), random_ids(70)
    start(exact, cache, 0, ids[:50])
    new = torch.tensor([ids[49:]] * cache.rows)
    logits = exact.forward(cache, new).logits[0]
    whole = exact.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, 49:]
    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-12)


@torch.inference_mode()
def test_a_headless_value_model():
    backbone = build("tiny-text", torch.float64).model
    lenvm = LengthValueModel(backbone, LenVMConfig(0.997)).eval()
    decoder, ids = ModelRunner(backbone), random_ids(30)
    cache = decoder.new_cache()
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
    decoder = ModelRunner(model)
    cache = decoder.new_cache()
    sequences = {0: random_ids(20, 1), 1: random_ids(70, 2)}
    for row, ids in sequences.items():
        start(decoder, cache, row, ids)
    for _ in range(10):
        logits = decoder.forward(cache, feed(cache, sequences)).logits[:, -1]
        for row, ids in sequences.items():
            torch.testing.assert_close(logits[row], next_logits(model, ids), rtol=0, atol=1e-10)
            ids.append(int(logits[row].argmax()))


# -- bits ----------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_bits_of_a_prefill_do_not_depend_on_its_batch():
    decoder = ModelRunner(build("tiny-text"))
    prompts = [random_ids(length, length) for length in (70, 128, 100, 65, 90, 127, 66, 77, 80)]
    together = decoder.prefill(prompts)
    for row, prompt in enumerate(prompts):
        alone = decoder.prefill([prompt])
        for ours, whole in zip(alone.layers, together.layers, strict=True):
            assert torch.equal(ours.keys[0, :, : len(prompt)], whole.keys[row, :, : len(prompt)])
            assert torch.equal(ours.values[0, :, : len(prompt)], whole.values[row, :, : len(prompt)])


@torch.inference_mode()
def test_bits_of_a_row_do_not_depend_on_the_others():
    decoder = ModelRunner(build("tiny-text"))
    ids = random_ids(50)

    def run(row, others):
        cache = decoder.new_cache()
        start(decoder, cache, row, ids)
        for other, length in others.items():
            start(decoder, cache, other, random_ids(length, other))
        return decoder.forward(cache, feed(cache, {row: ids})).logits[row, -1]

    alone = run(0, {})
    assert torch.equal(alone, run(5, {0: 300, 1: 20}))
    assert torch.equal(alone, run(40, {row: 10 * row + 1 for row in range(40)}))
