"""Backbones: their vision, their shape, their first layers, and what cannot be loaded."""

import copy
import io
import json
import shutil
import sys

import pytest
import torch
import transformers
from adapted import adapted
from coded import with_code
from published import rewrite
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3nTextConfig,
    LongcatFlashConfig,
)
from value_models import GAMMA, build, image_inputs, in_float64, inputs_of, logits_of, trained

from lenvm_lightning import tinyworld
from lenvm_lightning.errors import CheckpointError
from lenvm_lightning.models.backbone import load_backbone, load_config, token_types
from lenvm_lightning.models.lenvm_config import LenVMConfig
from lenvm_lightning.models.value_model import LengthValueModel

# -- vision -----------------------------------------------------------------------------------------------------------


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


# -- building ---------------------------------------------------------------------------------------------------------


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


# -- directories ------------------------------------------------------------------------------------------------------


def test_a_saved_directory_is_an_ordinary_one(saved):
    family, model, folder = saved
    vision = any(True for _ in model.vision_modules())
    kind = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    other, info = kind.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == (set() if model.backbone.config.tie_word_embeddings else {"lm_head.weight"})
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert json.loads((folder / "config.json").read_text())["architectures"] == [type(other).__name__]
    with torch.no_grad():
        theirs = other.eval().base_model(**inputs_of(family), use_cache=False).last_hidden_state
        ours = model.backbone(**inputs_of(family), use_cache=False).last_hidden_state
    assert torch.equal(theirs, ours)
    # The key names are those that the class itself writes.
    torch.manual_seed(0)
    type(other)(other.config).save_pretrained(folder / "theirs")
    names = set(load_file(folder / "theirs" / "model.safetensors")) - {
        "lm_head.weight",
        "language_model.lm_head.weight",
    }
    assert set(load_file(folder / "model.safetensors")) == names


# -- the first layers -------------------------------------------------------------------------------------------------


def shorter(model: LengthValueModel, layers: int) -> LengthValueModel:
    """The model without its last layers, cut by hand."""
    model = copy.deepcopy(model)
    decoder = model.backbone.get_decoder()
    decoder.layers = decoder.layers[:layers]
    decoder.config.num_hidden_layers = layers
    return model


def layers_of(model: LengthValueModel) -> int:
    return len(model.backbone.get_decoder().layers)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_first_layers_of_a_backbone(saved, layers, tmp_path, capfd):
    family, whole, folder = saved
    cut = LengthValueModel.from_backbone(folder, LenVMConfig(GAMMA), keep_layers=layers).eval()
    assert capfd.readouterr() == ("", "")
    assert layers_of(cut) == cut.backbone.config.get_text_config().num_hidden_layers == layers
    by_hand = shorter(whole, layers)
    expected = by_hand.backbone.state_dict()
    assert list(cut.backbone.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in cut.backbone.state_dict().items())
    cut.v_head.load_state_dict(whole.v_head.state_dict())
    logits = logits_of(cut, family)
    assert torch.equal(logits, logits_of(by_hand, family))
    if layers < layers_of(whole):
        assert not torch.equal(logits, logits_of(whole, family))
    cut.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.get("text_config", config)["num_hidden_layers"] == layers
    loaded = LengthValueModel.from_pretrained(tmp_path)
    assert layers_of(loaded) == layers
    assert torch.equal(logits_of(loaded, family), logits)


@pytest.mark.parametrize("name", tinyworld.NAMES)
def test_all_layers_are_the_whole_backbone(name):
    whole, kept = (load_backbone(name, keep_layers=layers) for layers in (None, 4))
    assert kept.config.to_dict() == whole.config.to_dict()
    assert all(torch.equal(tensor, whole.state_dict()[key]) for key, tensor in kept.state_dict().items())


def test_layers_keep_their_kind(tmp_path):
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    mixed = {"layer_types": kinds, "use_sliding_window": True, "sliding_window": 4}
    torch.manual_seed(0)
    whole = LengthValueModel.from_backbone("tiny-text", LenVMConfig(GAMMA), pretrained=False, overrides=mixed).eval()
    nn.init.normal_(whole.v_head.summary.weight)
    whole.save_pretrained(tmp_path / "whole")
    cut = LengthValueModel.from_backbone(tmp_path / "whole", LenVMConfig(GAMMA), keep_layers=3).eval()
    cut.v_head.load_state_dict(whole.v_head.state_dict())
    assert cut.backbone.config.layer_types == kinds[:3]
    logits = logits_of(cut, "tiny-text")
    assert torch.equal(logits, logits_of(shorter(whole, 3), "tiny-text"))
    cut.save_pretrained(tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["layer_types"] == kinds[:3]
    assert torch.equal(logits_of(LengthValueModel.from_pretrained(tmp_path / "cut"), "tiny-text"), logits)


def test_a_weight_of_a_kept_layer_must_be_there(tmp_path):
    trained("tiny-text").save_pretrained(tmp_path)
    rewrite(tmp_path / "model.safetensors", lambda t: t.pop("model.layers.2.mlp.up_proj.weight"))
    assert load_backbone(tmp_path, keep_layers=2).config.num_hidden_layers == 2
    with pytest.raises(CheckpointError, match=r"1 weights of Qwen2Model are not in.*layers\.2\.mlp\.up_proj"):
        load_backbone(tmp_path, keep_layers=3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"keep_layers": 5}, "keep_layers must lie between 1 and 4, the layers of 'tiny-vl'; got 5"),
        ({"keep_layers": 0}, "keep_layers must lie between 1 and 4.*got 0"),
        ({"keep_layers": 2, "pretrained": False}, "pretrained is false: set the number of layers in overrides"),
    ],
)
def test_layers_that_cannot_be_kept(options, text):
    with pytest.raises(CheckpointError, match=text):
        LengthValueModel.from_backbone("tiny-vl", LenVMConfig(GAMMA), **options)


def test_backbones_whose_layers_cannot_be_cut(tmp_path):
    LongcatFlashConfig(num_layers=2).save_pretrained(tmp_path / "pairs")  # two layers of attention in each
    with pytest.raises(CheckpointError, match=r"longcat_flash\) counts its layers in another way.*leave keep_layers"):
        load_backbone(tmp_path / "pairs", keep_layers=3)
    config = Gemma3nTextConfig(
        vocab_size=64, vocab_size_per_layer_input=64, hidden_size=16, hidden_size_per_layer_input=4,
        intermediate_size=16, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_kv_shared_layers=2, laurel_rank=4, layer_types=["full_attention"] * 4,
        activation_sparsity_pattern=[0.0] * 4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(tmp_path / "shared")  # embeddings of all layers are one weight
    assert load_backbone(tmp_path / "shared", keep_layers=4).config.num_hidden_layers == 4
    with pytest.raises(CheckpointError, match=r"embed_tokens_per_layer.*cannot be cut: leave keep_layers out"):
        load_backbone(tmp_path / "shared", keep_layers=3)


# -- loading ----------------------------------------------------------------------------------------------------------


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="no model could be read from") as caught:
        LengthValueModel.from_pretrained(tmp_path / "nothing")
    assert "\n" not in str(caught.value)


def test_four_bits_hold_the_language_model_and_leave_vision_and_head():
    model = adapted("tiny-vl", "nf4")
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    packed = {name for name, kind in kinds.items() if kind == "Linear4bit"}
    assert len(packed) == 28
    assert all(name.startswith("backbone.language_model.layers.") for name in packed)
    assert any(name.startswith("backbone.visual.") for name in set(kinds) - packed)
    weight = model.backbone.language_model.layers[0].self_attn.q_proj.base_layer.weight
    assert weight.dtype == torch.uint8
    assert weight.quant_state.quant_type == "nf4"
    assert weight.quant_state.nested  # the scales are quantised too


def test_kernels_that_are_not_installed_are_said():
    for pretrained in (True, False):
        with pytest.raises(CheckpointError, match=r"tiny-text' cannot be .*FlashAttention2"):
            load_backbone("tiny-text", pretrained=pretrained, attn_implementation="flash_attention_2")


def test_no_weights_are_read_where_there_is_no_memory_for_them(monkeypatch):
    from lenvm_lightning.models.backbone import AutoModel

    monkeypatch.setattr(AutoModel, "from_pretrained", lambda *a, **o: pytest.fail("weights were read"))
    with torch.device("meta"):
        model = LengthValueModel.from_backbone("tiny-text", LenVMConfig(0.97), keep_layers=2, expected_length=50.0)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert len(model.backbone.layers) == 2


def test_code_of_a_backbone_runs_only_where_that_is_said(tmp_path, monkeypatch):
    """transformers would ask at the terminal."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    folder, mark = with_code(tmp_path / "coded", tmp_path / "ran", tokenizer=False), tmp_path / "ran"
    for load in (load_config, load_backbone, lambda source: LengthValueModel.from_pretrained(source, gamma=0.9)):
        with pytest.raises(CheckpointError, match=r"modelling code of its own: .*trust_remote_code: true in a recipe"):
            load(folder)
    assert sys.stdin.tell() == 0
    assert not mark.exists()
    assert load_config(folder, trust_remote_code=True).model_type == "mine"
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1]", "no model could be read from"),
        ("{", r"config\.json' is not a valid JSON file"),
        ({}, "no model could be read from"),
        ({"model_type": [1]}, "no model could be read from"),
        ({"hidden_size": "wide"}, "'hidden_size'.*expected int"),
        ({"hidden_size": -1}, "no weights could be read from"),
        ({"num_attention_heads": 0}, "could be read from"),
        ({"layer_types": ["x"]}, "no model could be read from"),
        ({"rope_parameters": 3}, "no model could be read from"),
        ({"quantization_config": [1]}, "no model could be read from"),
        ({"attn_implementation": 3}, "no weights could be read from"),
        ({"tie_word_embeddings": "x"}, "no model could be read from"),
        ({"num_hidden_layers": 10**8}, "num_hidden_layers is 100,000,000; it may be 10,000 at most"),
        ({"num_labels": 10**8}, "num_labels is 100,000,000"),
        ({"vision_config": {"depth": 10**8}}, "depth is 100,000,000"),
    ],
)
def test_configs_of_a_wrong_form(tmp_path, content, words):
    folder = shutil.copytree(tinyworld.path("tiny-text"), tmp_path / "base")
    if isinstance(content, dict):
        whole = json.loads((folder / "config.json").read_text())
        content = json.dumps({**whole, **content} if content else {})
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=words) as told:
        load_backbone(folder)
    assert str(folder) in str(told.value)


def test_overrides_count_as_little():
    with pytest.raises(CheckpointError, match="num_hidden_layers is 1,000,000; it may be 10,000 at most"):
        load_config("tiny-text", overrides={"num_hidden_layers": 10**6})
