"""Layouts give the values and gradients of padded rows."""

import pytest
import torch
from layouts import DECODER, GRADIENTS, VALUES, planned, random_rows, run, small
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig

from datamodules.collate import Collator
from lenvm_lightning.training import batch_layouts
from lenvm_lightning.training.batch_layouts import compute, row_logits
from lenvm_lightning.training.layout_check import check_layout
from lenvm_lightning.training.layout_plan import LayoutPlan, sharing_ways

KINDS = ["text", "vision", "vision without images"]
CASES = [(kind, way) for kind in KINDS for way in ("cache", "tree", "packed") if (kind, way) != ("vision", "packed")]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_need_no_mask_for_padding_on_their_right(laid_out, kind):
    model, batches = laid_out(kind)
    plain = batches["rows"]
    assert not plain["attention_mask"].all()
    theirs, their_gradient = run(
        model, lambda: model(plain["input_ids"], plain["attention_mask"], **plain["vision"]), plain
    )
    ours, our_gradient = run(model, lambda: row_logits(model, plain), plain)
    assert (ours - theirs).abs().max() / theirs.abs().max() <= VALUES
    assert (our_gradient - their_gradient).norm() / their_gradient.norm() <= GRADIENTS


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_values_and_gradients_are_those_of_padded_rows(laid_out, kind, way):
    model, batches = laid_out(kind)
    plain, batch = batches["rows"], batches["packed" if way == "packed" else "shared"]
    assert batch["layout"].prompts == [0, 1, 0, 2, 1, 0, 1]
    assert len(set(batch["layout"].prompt_lengths)) == 3
    mask = plain["attention_mask"]
    theirs, their_gradient = run(model, lambda: model(plain["input_ids"], mask, **plain["vision"]), plain)
    ours, our_gradient = run(model, lambda: planned(model, batch, way), plain)
    assert theirs.std() > 0.05
    assert (ours - theirs).abs().max() / theirs.abs().max() <= VALUES
    assert (our_gradient - their_gradient).norm() / their_gradient.norm() <= GRADIENTS
    assert len(our_gradient) == len(their_gradient)


def test_rows_that_fill_their_bins_need_no_mask(laid_out, monkeypatch):
    """Filler counts on then, so that transformers finds nothing packed and leaves causal attention to the kernel."""
    model, _ = laid_out("text")
    rows = random_rows(prompts=(9,), completions=[(0, 11), (0, 9), (0, 10)])
    plain, packed = (Collator(0, None, layout)(rows) for layout in ("rows", "packed"))
    seen, forward = [], type(model).forward

    def watched(self, input_ids, attention_mask=None, **inputs):
        seen.append((attention_mask, inputs["position_ids"]))
        return forward(self, input_ids, attention_mask, **inputs)

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", watched)
        ours = compute(model, packed, LayoutPlan("packed", [[0], [1], [2]], 60, 57))[..., 0]
    ((mask, positions),) = seen
    assert mask is None
    assert positions.tolist() == [list(range(20))] * 3
    assert (ours - row_logits(model, plain))[plain["attention_mask"].bool()].abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_what_is_not_theirs_would_be_seen(laid_out, monkeypatch, kind):
    """Negative controls: branches that see one another, rows that do, positions that forget what an image took."""
    model, batches = laid_out(kind)
    shared, theirs = batches["shared"], row_logits(model, batches["rows"])
    there = shared["attention_mask"].bool()

    def apart(way, batch=shared):
        return float((planned(model, batch, way) - theirs)[there].abs().max())

    assert apart("tree") < 1e-9
    with monkeypatch.context() as patch:
        right = batch_layouts.packed_trees_mask
        patch.setattr(batch_layouts, "packed_trees_mask", lambda tree, branch, *rest: right(tree, branch * 0, *rest))
        assert apart("tree") > 0.01
    if kind == "text":
        forward = type(model).forward

        def leaking(self, input_ids, attention_mask=None, **inputs):
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            return forward(self, input_ids, mask, **inputs)

        monkeypatch.setattr(type(model), "forward", leaking)
        assert apart("packed", batches["packed"]) > 0.01
    else:
        gather = batch_layouts.gather_for_rows

        def forgetting(cache, group):
            gather(cache, group)
            cache.lenvm_offset = None

        monkeypatch.setattr(batch_layouts, "gather_for_rows", forgetting)
        assert apart("cache") > 0.01


@pytest.mark.parametrize("way", ["cache", "tree"])
def test_the_vision_tower_sees_every_image_once(laid_out, way):
    model, batches = laid_out("vision")
    seen = []
    tower = model.backbone.visual
    hook = tower.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    try:
        planned(model, batches["shared"], way)
        assert seen == [4]  # of three prompts
        row_logits(model, batches["rows"])
        assert seen == [4, 10]  # of seven rows
    finally:
        hook.remove()
    assert len(batches["shared"]["vision"]["image_grid_thw"]) == 4
    assert len(set(map(tuple, batches["shared"]["vision"]["image_grid_thw"].tolist()))) == 4


def test_equal_prompts_share_and_others_do_not(laid_out):
    rows = random_rows()
    rows[2] = {**rows[2], "input_ids": [6, *rows[2]["input_ids"][1:]]}  # the same prompt, truncated elsewhere
    rows[5] = {**rows[5], "paths": ("other.png",)}
    assert Collator(0, None, "shared")(rows)["layout"].prompts == [0, 1, 2, 3, 1, 4, 1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**DECODER),
        MistralConfig(**DECODER, sliding_window=6),
        Gemma3TextConfig(**DECODER, sliding_window=6, sliding_window_pattern=2),
    ],
    ids=["llama", "mistral-window", "gemma3-windows"],
)
def test_other_families(config, attention):
    model = small(config, attention)
    rows = random_rows()
    plain, shared, packed = (Collator(0, None, layout)(rows) for layout in ("rows", "shared", "packed"))
    in_float32 = attention == "eager" or config.model_type.startswith("gemma")  # whose norms are
    limit, gradient_limit = (1e-5, 1e-5) if in_float32 else (VALUES, GRADIENTS)
    theirs, their_gradient = run(model, lambda: row_logits(model, plain), plain)
    assert sharing_ways(model, training=True) == ["tree", "cache"]
    for way, batch in (("cache", shared), ("tree", shared), ("packed", packed)):
        ours, our_gradient = run(model, lambda batch=batch, way=way: planned(model, batch, way), plain)
        assert (ours - theirs).abs().max() / theirs.std() <= limit
        assert (our_gradient - their_gradient).norm() / their_gradient.norm() <= gradient_limit
    check_layout(model, plain, shared)
    check_layout(model, plain, packed)
