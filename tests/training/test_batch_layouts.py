"""Layouts give the values and gradients of padded rows, or are refused before training."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from gradients import exact_norm
from transformers import (
    AutoModel,
    BloomConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
)

from datamodules.collate import Collator
from lenvm_lightning import LengthValueModel, LenVMConfig
from lenvm_lightning.batch import Layout
from lenvm_lightning.errors import RecipeError
from lenvm_lightning.training import batch_layouts
from lenvm_lightning.training.batch_layouts import (
    Plan,
    compute,
    make_plan,
    possible_ways,
    row_logits,
    sharing_ways,
    try_out,
)

VALUES, GRADIENTS = 1e-12, 1e-9  # float64; a vision tower computes parts in float32, the same ones in every layout
# Completions of three prompts, in no order, one of them alone.
COMPLETIONS = [(0, 7), (1, 12), (0, 11), (2, 6), (1, 3), (0, 9), (1, 1)]
KINDS = ["text", "vision", "vision without pictures"]


def exact(model: LengthValueModel) -> LengthValueModel:
    """The model in float64, without the norms that transformers computes in float32 whatever they get."""
    for module in model.modules():
        if type(module).__name__ in ("Qwen2RMSNorm", "Qwen2_5_VLRMSNorm", "LlamaRMSNorm", "MistralRMSNorm"):
            module.forward = partial(exact_norm, module)
    return model


def random_rows(vocabulary: int = 100, prompts=(9, 14, 5), completions=COMPLETIONS) -> list[dict]:
    """Rows of text."""
    random = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, vocabulary, (length,), generator=random).tolist() for length in prompts]
    rows = []
    for number, (prompt, length) in enumerate(completions):
        own = torch.randint(5, vocabulary, (length,), generator=random).tolist()
        rows.append({
            "input_ids": ids[prompt] + own, "prompt_length": len(ids[prompt]), "length": length,
            "censored": number == 2, "images": [], "paths": (), "prompt_index": prompt, "row": number,
        })  # fmt: skip
    return rows


def picture_rows(processor) -> list[dict]:
    """Rows about pictures of three sizes, one prompt with two of them, before and after text of different length."""
    from PIL import Image

    random = torch.Generator().manual_seed(0)

    def picture(width, height):
        return Image.fromarray(torch.randint(0, 255, (height, width, 3), generator=random).byte().numpy())

    pictures = [[picture(56, 84)], [picture(112, 56), picture(84, 84)], [picture(140, 56)]]
    texts = ["How many?", "Which of these is larger, and why?", "What?"]
    rows = random_rows()
    for row in rows:
        images, prompt = pictures[row["prompt_index"]], row["prompt_index"]
        text = "<|vision_start|><|image_pad|><|vision_end|>" * len(images) + texts[prompt]
        ids = processor(text=[text], images=images)["input_ids"][0]
        own = row["input_ids"][row["prompt_length"] :]
        row.update(input_ids=[*ids, *own], prompt_length=len(ids), images=images, paths=(f"{prompt}.png",))
    return rows


@pytest.fixture(scope="module")
def made(tiny_vl) -> Callable:
    """A model, and the same rows plain, shared and packed."""
    models = {}

    def made(kind):
        name = "tiny-text-lenvm" if kind == "text" else "tiny-vl-lenvm"
        if name not in models:
            models[name] = exact(LengthValueModel.from_pretrained(name, dtype=torch.float64))
        rows = picture_rows(tiny_vl) if kind == "vision" else random_rows()
        processor = tiny_vl.image_processor if kind == "vision" else None
        return models[name], {layout: Collator(0, processor, layout)(rows) for layout in ("rows", "shared", "packed")}

    return made


def run(model, logits, batch):
    """Logits of the real tokens, and the gradient of a sum that weighs every one of them differently."""
    there = batch["attention_mask"].bool()
    model.zero_grad()
    values = logits()
    weights = torch.linspace(0.1, 1.0, values.numel(), dtype=values.dtype).view_as(values)
    torch.where(there, values * weights, 0.0).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return values.detach()[there], gradient


def planned(model, batch, way):
    plan = make_plan(batch["layout"], [way], ordered=bool(batch["vision"]))
    return compute(model, batch, plan)


CASES = [(kind, way) for kind in KINDS for way in ("cache", "tree", "packed") if (kind, way) != ("vision", "packed")]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_need_no_mask_for_padding_on_their_right(made, kind):
    model, batches = made(kind)
    plain = batches["rows"]
    assert not plain["attention_mask"].all()
    theirs, their_gradient = run(
        model, lambda: model(plain["input_ids"], plain["attention_mask"], **plain["vision"]), plain
    )
    ours, our_gradient = run(model, lambda: row_logits(model, plain), plain)
    assert (ours - theirs).abs().max() / theirs.abs().max() <= VALUES
    assert (our_gradient - their_gradient).norm() / their_gradient.norm() <= GRADIENTS


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_values_and_gradients_are_those_of_padded_rows(made, kind, way):
    model, batches = made(kind)
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


def test_rows_that_fill_their_bins_need_no_mask(made, monkeypatch):
    """Filler counts on then, so that transformers finds nothing packed and leaves causal attention to the kernel."""
    model, _ = made("text")
    rows = random_rows(prompts=(9,), completions=[(0, 11), (0, 9), (0, 10)])
    plain, packed = (Collator(0, None, layout)(rows) for layout in ("rows", "packed"))
    seen, forward = [], type(model).forward

    def watched(self, input_ids, attention_mask=None, **inputs):
        seen.append((attention_mask, inputs["position_ids"]))
        return forward(self, input_ids, attention_mask, **inputs)

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", watched)
        ours = compute(model, packed, Plan("packed", [[0], [1], [2]], 60, 57))
    ((mask, positions),) = seen
    assert mask is None
    assert positions.tolist() == [list(range(20))] * 3
    assert (ours - row_logits(model, plain))[plain["attention_mask"].bool()].abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_what_is_not_theirs_would_be_seen(made, monkeypatch, kind):
    """Negative controls: branches that see one another, rows that do, positions that forget what a picture took."""
    model, batches = made(kind)
    shared, theirs = batches["shared"], row_logits(model, batches["rows"])
    there = shared["attention_mask"].bool()

    def apart(way, batch=shared):
        return float((planned(model, batch, way) - theirs)[there].abs().max())

    assert apart("tree") < 1e-9
    with monkeypatch.context() as patch:
        right = batch_layouts.forest_mask
        patch.setattr(batch_layouts, "forest_mask", lambda tree, branch, *rest: right(tree, branch * 0, *rest))
        assert apart("tree") > 0.01
    if kind == "text":
        forward = type(model).forward

        def leaking(self, input_ids, attention_mask=None, **inputs):
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            return forward(self, input_ids, mask, **inputs)

        monkeypatch.setattr(type(model), "forward", leaking)
        assert apart("packed", batches["packed"]) > 0.01
    else:
        gather = batch_layouts._gather

        def forgetting(cache, group):
            gather(cache, group)
            cache.lenvm_offset = None

        monkeypatch.setattr(batch_layouts, "_gather", forgetting)
        assert apart("cache") > 0.01


@pytest.mark.parametrize("way", ["cache", "tree"])
def test_the_vision_tower_sees_every_picture_once(made, way):
    model, batches = made("vision")
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


def test_equal_prompts_share_and_others_do_not(made):
    rows = random_rows()
    rows[2] = {**rows[2], "input_ids": [6, *rows[2]["input_ids"][1:]]}  # the same prompt, cut elsewhere
    rows[5] = {**rows[5], "paths": ("other.png",)}
    assert Collator(0, None, "shared")(rows)["layout"].prompts == [0, 1, 2, 3, 1, 4, 1]


def test_where_activations_are_computed_again_the_tree_is_taken(made):
    """With a cache, which is dropped then, values would silently be others."""
    model, batches = made("text")
    shared, layout = batches["shared"], batches["shared"]["layout"]
    _, wanted = run(model, lambda: row_logits(model, batches["rows"]), shared)
    try:
        model.recompute_activations()
        model.train()
        assert possible_ways(model, layout, pictures=False, training=True) == ["rows", "tree"]
        for logits in (lambda: row_logits(model, shared), lambda: planned(model, shared, "tree")):
            _, gradient = run(model, logits, shared)
            assert (gradient - wanted).norm() / wanted.norm() <= GRADIENTS
        assert (planned(model, shared, "cache") - planned(model, shared, "tree")).abs().max() > 0.01
        alone = Layout("shared", [6, 8], [4, 4], [0, 1])
        assert possible_ways(model, alone, pictures=True, training=True) == ["rows"]
        assert possible_ways(model, layout, pictures=True, training=True) == ["tree"]
        model.eval()
        assert possible_ways(model, layout, pictures=False, training=False) == ["rows", "tree", "cache"]
    finally:
        model.backbone.gradient_checkpointing_disable()
        model.eval()


# -- planning -----------------------------------------------------------------------------------------------------


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


# -- other families -----------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
DECODER = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}


def small(config, attention):
    torch.manual_seed(0)
    # transformers' eager attention gives NaN where a token sees nothing, in float64 alone: there it is float32.
    dtype = torch.float64 if attention == "sdpa" else torch.float32
    model = LengthValueModel(AutoModel.from_config(config, attn_implementation=attention).to(dtype), LenVMConfig(0.9))
    model.v_head.reset(0.0)
    return exact(model).eval()


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
    try_out(model, plain, shared)
    try_out(model, plain, packed)


@pytest.mark.parametrize(
    ("config", "layout", "reason"),
    [
        (
            MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2),
            "packed",
            "hand a state from token to token",
        ),
        (
            MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2),
            "shared",
            "hand a state from token to token",
        ),
        (BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4), "packed", "takes no positions"),
        (
            OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, pad_token_id=0),
            "packed",
            "logits of a few rows differ",
        ),
    ],
    ids=["mamba-packed", "mamba-shared", "bloom", "opt"],
)
def test_models_that_cannot_are_refused(config, layout, reason):
    model = small(config, "eager")
    batches = [Collator(0, None, kind)(random_rows()) for kind in ("rows", layout)]
    with pytest.raises(
        RecipeError, match=f"data.layout: {layout} cannot be used with .*{reason}.* Set data.layout: rows"
    ):
        try_out(model, *batches)


def test_without_any_way_it_is_said_what_to_change(made):
    model, batches = made("text")
    config = model.backbone.config
    try:
        model.recompute_activations()
        config._attn_implementation_internal = "flash_attention_2"
        with pytest.raises(RecipeError, match=r"gradient_checkpointing drops the cache, and a tree needs .*flash"):
            try_out(model, batches["rows"], batches["shared"])
    finally:
        config._attn_implementation_internal = "sdpa"
        model.backbone.gradient_checkpointing_disable()


def test_values_in_float32_and_bfloat16_pass_the_trial():
    for dtype in (torch.float32, torch.bfloat16):
        model = LengthValueModel.from_pretrained("tiny-text-lenvm", dtype=dtype)
        for layout in ("shared", "packed"):
            try_out(model, *(Collator(0, None, kind)(random_rows()) for kind in ("rows", layout)))
