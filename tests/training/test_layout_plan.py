"""Plans of layouts: the cheapest way that the model allows."""

import pytest
from layouts import GRADIENTS, planned, run

from lenvm_lightning import LengthValueModel
from lenvm_lightning.batch import Layout
from lenvm_lightning.models.lenvm_config import LenVMConfig
from lenvm_lightning.training.batch_layouts import row_logits
from lenvm_lightning.training.fsdp import keep_in_step
from lenvm_lightning.training.layout_plan import make_plan, possible_ways, sharing_ways


def test_a_plan_by_hand():
    layout = Layout("shared", [6, 8, 5], [4, 4, 3], [0, 0, 1])
    rows, cache, tree = (make_plan(layout, [way]) for way in ("rows", "cache", "tree"))
    assert (rows.computed, rows.real) == (3 * 8, 19)
    assert (cache.computed, cache.real) == (2 * 4 + 3 * 4, 15)
    assert (tree.computed, tree.real, tree.bins) == (15, 15, [[0, 1]])  # 4 + 2 + 4 and 3 + 2, beside one another
    assert make_plan(layout, ["tree"], ordered=True) == ("tree", [[0], [1]], 2 * 10, 15)
    assert make_plan(layout, ["packed"], flat=True) == ("packed", [[0, 1, 2]], 19, 19)


@pytest.mark.parametrize(
    ("count", "prompt", "completions", "chosen"),
    [
        (1, 500, [100], "rows"),
        (4, 500, [100], "cache"),
        (4, 500, [50, 250], "tree"),  # padded for the cache, not in the tree
        (16, 1000, [100, 300], "cache"),  # attention over 4,200 tokens costs the tree more than padding the cache
        (64, 1, [300], "rows"),
    ],
)
def test_the_lengths_choose(count, prompt, completions, chosen):
    lengths = [prompt + completions[row % len(completions)] for row in range(count)]
    layout = Layout("shared", lengths, [prompt] * count, [0] * count)
    assert make_plan(layout, ["rows", "tree", "cache"]).way == chosen


def test_where_activations_are_computed_again_the_tree_is_taken(laid_out):
    """With a cache, which is dropped then, values would silently be others."""
    model, batches = laid_out("text")
    shared, layout = batches["shared"], batches["shared"]["layout"]
    _, wanted = run(model, lambda: row_logits(model, batches["rows"]), shared)
    try:
        model.recompute_activations()
        model.train()
        assert possible_ways(model, layout, has_images=False, training=True) == ["rows", "tree"]
        for logits in (lambda: row_logits(model, shared), lambda: planned(model, shared, "tree")):
            _, gradient = run(model, logits, shared)
            assert (gradient - wanted).norm() / wanted.norm() <= GRADIENTS
        assert (planned(model, shared, "cache") - planned(model, shared, "tree")).abs().max() > 0.01
        alone = Layout("shared", [6, 8], [4, 4], [0, 1])
        assert possible_ways(model, alone, has_images=True, training=True) == ["rows"]
        assert possible_ways(model, layout, has_images=True, training=True) == ["tree"]
        model.eval()
        assert possible_ways(model, layout, has_images=False, training=False) == ["rows", "tree", "cache"]
    finally:
        model.backbone.gradient_checkpointing_disable()
        model.eval()


def test_ranks_that_share_weights_make_as_many_passes():
    """A prompt cache takes two, and one rank of them would wait for the others."""
    model = LengthValueModel.from_backbone("tiny-text", LenVMConfig(0.97), pretrained=False)
    assert sharing_ways(model, training=True) == ["tree", "cache"]
    keep_in_step(model)
    assert sharing_ways(model, training=True) == ["tree"]
