"""LengthValueModel: text and vision-language backbones of several families, tiny and random; exact in float64."""

import copy
import shutil

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
)
from value_models import IMAGE_TOKEN, VOCABULARY, build, image_inputs, text_inputs

from lenvm_lightning import tinyworld
from lenvm_lightning.errors import CheckpointError
from lenvm_lightning.models.backbone import takes_argument, token_types
from lenvm_lightning.models.lenvm_config import LenVMConfig
from lenvm_lightning.models.value_model import LengthValueModel, ValueHead

FAMILIES = ("qwen2.5-vl", "smolvlm", "llava")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def in_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}


def rows_of(logits: Tensor, mask: Tensor) -> list[Tensor]:
    """Logits of the real tokens of each row."""
    return [row[keep.bool()] for row, keep in zip(logits, mask, strict=True)]


# -- forward ----------------------------------------------------------------------------------------------------


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


def test_token_types_are_the_processors():
    model, inputs = build("qwen2.5-vl").double(), in_float64(image_inputs("qwen2.5-vl"))
    types = inputs.pop("mm_token_type_ids")
    assert types.sum() > 0
    assert torch.equal(token_types(model.backbone.config, inputs["input_ids"]), types)
    with torch.no_grad():
        ours = model(**inputs)
        assert torch.equal(ours, model(**inputs, mm_token_type_ids=types))
        # The control: without types the backbone counts image tokens like words.
        assert (ours - model(**inputs, mm_token_type_ids=torch.zeros_like(types))).abs().max() > 1e-4


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


# -- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_head_keeps_its_digits(cast):
    model = build("tiny-text")
    before = copy.deepcopy(model.v_head.state_dict())
    getattr(model, cast)()
    assert model.backbone.dtype in (torch.bfloat16, torch.float16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.v_head.state_dict().items())
    assert {tensor.dtype for tensor in model.v_head.state_dict().values()} == {torch.float32}
    if cast == "bfloat16":
        assert model(**text_inputs("right")).dtype == torch.float32


def test_positions_keep_their_digits():
    model, plain = build("qwen2.5-vl").bfloat16(), build("qwen2.5-vl")
    assert model.backbone.dtype == torch.bfloat16
    buffers = dict(plain.named_buffers())
    assert "backbone.language_model.rotary_emb.inv_freq" in buffers
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_head_ignores_autocast():
    head, hidden = ValueHead(32), torch.randn(3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(hidden), head(hidden.clone()))
        inside = head(hidden)
        rounded = nn.functional.linear(hidden, head.fc.weight)
    assert rounded.dtype == torch.bfloat16
    assert inside.dtype == torch.float32
    assert torch.equal(inside, head(hidden))
    with torch.autocast("cpu", torch.bfloat16):
        assert build("tiny-text")(**text_inputs("right")).dtype == torch.float32


def test_float64_stays_float64():
    model = build("tiny-text").double()
    assert model.v_head.fc.weight.dtype == torch.float64
    assert model(**text_inputs("right")).dtype == torch.float64
    model = LengthValueModel.from_backbone("tiny-text", LenVMConfig(gamma=0.9), pretrained=False, dtype="float64")
    assert model.v_head.fc.weight.dtype == torch.float64
    assert model(**text_inputs("right")).dtype == torch.float64


def test_fresh_head_predicts_the_expected_length():
    model = LengthValueModel.from_backbone(
        "tiny-text", LenVMConfig(gamma=0.997), pretrained=False, expected_length=300.0
    ).eval()
    remaining = model.remaining(model(**text_inputs("right")))
    assert ((remaining > 200) & (remaining < 450)).all()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"gamma": 1.0}, "gamma must be a number strictly between 0 and 1; got 1.0"),
        ({"gamma": "auto"}, "gamma"),
        ({"gamma": 0.9, "target": "lenght"}, "target must be one of discounted"),
        ({"gamma": 0.9, "length_scale": 0.0}, "scale must be positive"),
    ],
)
def test_config_that_means_nothing(settings, text):
    with pytest.raises(ValueError, match=text):
        LenVMConfig(**settings)


# -- training ---------------------------------------------------------------------------------------------------


def test_a_text_model_has_no_vision():
    assert list(build("tiny-text").vision_modules()) == []


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("qwen2.5-vl", {"visual"}),
        ("smolvlm", {"vision_model", "connector"}),
        ("llava", {"vision_tower", "multi_modal_projector"}),
    ],
)
def test_freezing_vision(family, names):
    model = build(family).train()
    parts = list(model.vision_modules())
    assert {id(part) for part in parts} == {id(getattr(model.backbone, name)) for name in names}
    for part in parts:
        part.requires_grad_(False)
    model(**image_inputs(family)).sum().backward()
    language = dict(model.backbone.get_decoder().named_parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in language.items() if "k_proj.bias" not in n)
    assert all(p.grad is not None for p in model.v_head.parameters())
    assert all(p.grad is None for part in parts for p in part.parameters())
    together = [*language.values(), *model.v_head.parameters(), *(p for part in parts for p in part.parameters())]
    assert {id(p) for p in together} == {id(p) for p in model.parameters()}


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


# -- building ---------------------------------------------------------------------------------------------------


def test_overrides_shape_the_backbone():
    model = LengthValueModel.from_backbone(
        "tiny-vl", LenVMConfig(gamma=0.9), pretrained=False,
        overrides={"text_config": {"num_hidden_layers": 1}, "vision_config": {"depth": 1}},
    )  # fmt: skip
    assert len(model.backbone.get_decoder().layers) == len(model.backbone.visual.blocks) == 1
    assert model(**image_inputs("qwen2.5-vl")).isfinite().all()
    assert model.config.backbone == "tiny-vl"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"pretrained": False, "overrides": {"num_hiden_layers": 1}}, "no entry.*did you mean 'num_hidden_layers'"),
        ({"pretrained": True, "overrides": {"num_hidden_layers": 1}}, "set pretrained: false"),
    ],
)  # fmt: skip
def test_backbones_that_cannot_be_built(options, text):
    with pytest.raises(CheckpointError, match=text):
        LengthValueModel.from_backbone("tiny-text", LenVMConfig(gamma=0.9), **options)


def test_a_backbone_without_weights(tmp_path):
    folder = shutil.copytree(
        tinyworld.path("tiny-text"), tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")
    )
    with pytest.raises(CheckpointError, match=r"no weights could be read from '.*bare'"):
        LengthValueModel.from_backbone(str(folder), LenVMConfig(gamma=0.9))


@pytest.mark.parametrize("name", tinyworld.NAMES)
def test_embedded_weights_are_the_backbones(name):
    torch.manual_seed(0)
    first = LengthValueModel.from_backbone(name, LenVMConfig(gamma=0.9)).backbone.state_dict()
    torch.manual_seed(1)
    again = LengthValueModel.from_backbone(name, LenVMConfig(gamma=0.9)).backbone.state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in first.items())
