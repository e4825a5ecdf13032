"""LengthValueModel: text and vision-language backbones of several families, tiny and random; exact in float64."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from value_models import (
    FAMILIES,
    IMAGE_TOKEN,
    VOCABULARY,
    build,
    image_inputs,
    in_float64,
    text_inputs,
)

from lenvm_lightning.models.backbone import takes_argument


def rows_of(logits: Tensor, mask: Tensor) -> list[Tensor]:
    """Logits of the real tokens of each row."""
    return [row[keep.bool()] for row, keep in zip(logits, mask, strict=True)]


# -- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["tiny-text", "gpt2", *FAMILIES])
def test_one_logit_a_position(family):
    model = build(family)
    inputs = image_inputs(family) if family in FAMILIES else text_inputs("right")
    with torch.no_grad():
        logits = model(**inputs)
    assert logits.shape == inputs["input_ids"].shape
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    value, remaining = model.value(logits), model.remaining(logits)
    assert ((value > -1) & (value < 0)).all()
    assert (remaining > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_image_is_seen(family):
    model, inputs = build(family).double(), in_float64(image_inputs(family))
    other = inputs | {"pixel_values": inputs["pixel_values"].flip(-1)}
    with torch.no_grad():
        before, after = model(**inputs), model(**other)
    image = (inputs["input_ids"] == IMAGE_TOKEN).int().argmax(1)
    for row, first in enumerate(image):
        assert torch.equal(before[row, :first], after[row, :first])
        assert (before[row, first:] - after[row, first:]).abs().max() > 1e-6


@pytest.mark.parametrize("family", ["tiny-text", "gpt2"])
def test_padding_of_text_changes_nothing(family):
    model = build(family).double()
    left, right = text_inputs("left"), text_inputs("right")
    with torch.no_grad():
        padded = [rows_of(model(**inputs), inputs["attention_mask"]) for inputs in (left, right)]
        for row, keep in enumerate(right["attention_mask"].bool()):
            alone = model(right["input_ids"][row][keep][None])[0]
            for logits in padded:
                assert (logits[row] - alone).abs().max() <= 1e-12
        # The control: positions that count the padding are not the same.
        width = left["input_ids"].shape[1]
        counted = model(**left, position_ids=torch.arange(width).expand(3, -1))
    assert (counted[0, -1] - padded[0][0][-1]).abs() > 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_with_images_is_its_rows(family):
    model = build(family).double()
    with torch.no_grad():
        alone = [model(**in_float64(image_inputs(family, rows=(row,))))[0] for row in range(4)]
        for side in ("left", "right"):
            inputs = in_float64(image_inputs(family, side))
            assert not inputs["attention_mask"].all()
            batched = rows_of(model(**inputs), inputs["attention_mask"])
            for one, together in zip(alone, batched, strict=True):
                assert (one - together).abs().max() <= 1e-12


def test_text_rows_of_a_vision_model():
    model = build("qwen2.5-vl").double()
    with torch.no_grad():
        model(**in_float64(image_inputs("qwen2.5-vl")))  # leaves its rope deltas behind
        left, right = text_inputs("left"), text_inputs("right")
        padded = [rows_of(model(**inputs), inputs["attention_mask"]) for inputs in (left, right)]
        alone = model(right["input_ids"][:1, : int(right["attention_mask"][0].sum())])[0]
    for logits in padded:
        assert (logits[0] - alone).abs().max() <= 1e-12


@pytest.mark.parametrize("family", ["tiny-text", "gpt2", "qwen2.5-vl"])
def test_steps_with_a_cache_are_the_whole_forward(family):
    model, inputs = build(family).double(), text_inputs("left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = DynamicCache(config=model.backbone.config)
    with torch.no_grad():
        whole = model(ids, mask)
        cuts = ((0, 9), (9, 10), (10, ids.shape[1]))
        parts = [model(ids[:, a:b], mask[:, :b], past_key_values=cache) for a, b in cuts]
    assert cache.get_seq_length() == ids.shape[1]
    assert ((torch.cat(parts, 1) - whole) * mask).abs().max() <= 1e-12


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_steps_after_images_are_the_whole_forward(name, masked):
    model, inputs = build("qwen2.5-vl").double(), in_float64(image_inputs("qwen2.5-vl", rows=(1,)))
    if name == "cache" and not takes_argument(model.backbone, name):
        pytest.skip("transformers does not know the new name yet")
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    cache, last = DynamicCache(config=model.backbone.config), ids.shape[1]
    types = inputs.pop("mm_token_type_ids")
    with torch.no_grad():
        whole = model(ids, mask, mm_token_type_ids=types, **inputs)
        parts = [model(ids[:, : last - 4], mask[:, : last - 4], **inputs, **{name: cache})]
        model(**in_float64(image_inputs("qwen2.5-vl", rows=(0, 2))))  # the backbone remembers the last images it saw
        for a, b in ((last - 4, last - 1), (last - 1, last)):
            parts.append(model(ids[:, a:b], mask[:, :b] if masked else None, **{name: cache}))
    assert cache.get_seq_length() == last
    assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-12


@pytest.mark.parametrize("family", ["tiny-text", *FAMILIES])
def test_no_vocabulary_logits(family):
    model = build(family)
    inputs = image_inputs(family) if family in FAMILIES else text_inputs("right")
    widths: dict[str, int] = {}

    def note(name):
        def hook(_module, _args, output):
            tensors = output if isinstance(output, tuple) else [output]
            widths[name] = max((t.shape[-1] for t in tensors if isinstance(t, Tensor) and t.ndim), default=0)

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(note(name))
    model(**inputs).sum().backward()
    assert len(widths) > 20
    assert max(widths.values()) < VOCABULARY
    assert not any("lm_head" in name for name, _ in model.named_modules())
    assert [VOCABULARY in p.shape for p in model.parameters()].count(True) == 1  # the input embedding


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_positions_keep_their_digits():
    model, plain = build("qwen2.5-vl").bfloat16(), build("qwen2.5-vl")
    assert model.backbone.dtype == torch.bfloat16
    buffers = dict(plain.named_buffers())
    assert "backbone.language_model.rotary_emb.inv_freq" in buffers
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["tiny-text", *FAMILIES])
def test_recomputing_activations(family):
    inputs = in_float64(image_inputs(family)) if family in FAMILIES else text_inputs("right")
    plain = build(family).double()
    saving = copy.deepcopy(plain)
    saving.recompute_activations()

    def forwards_of_a_layer(model) -> int:
        calls = []
        handle = model.backbone.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        model.zero_grad()
        model(**inputs).square().sum().backward()
        handle.remove()
        return len(calls)

    assert forwards_of_a_layer(plain.train()) == 1
    assert forwards_of_a_layer(saving.eval()) == 1  # transformers drops it in eval mode, silently
    assert forwards_of_a_layer(saving.train()) == 2
    for (name, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or (p.grad - q.grad).abs().max() <= 1e-12 * (1 + p.grad.abs().max()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_flows_through_a_frozen_tower(family):
    model = build(family).train()
    model.recompute_activations()
    wants_gradient = []
    for part in model.vision_modules():
        part.requires_grad_(False)
        for module in part.modules():
            module.register_forward_hook(
                lambda _m, _a, out: wants_gradient.append(getattr(out, "requires_grad", False))
            )
    model(**image_inputs(family)).sum().backward()
    assert len(wants_gradient) > 10
    assert not any(wants_gradient)
