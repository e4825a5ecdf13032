"""Model directories: ours and the published ones, read, written, and refused with a reason."""

import copy
import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Gemma3nTextConfig,
    LongcatFlashConfig,
)
from value_models import build, image_inputs, text_inputs

from lenvm_lightning import tinyworld
from lenvm_lightning.errors import CheckpointError
from lenvm_lightning.models import value_head_io
from lenvm_lightning.models.backbone import load_backbone
from lenvm_lightning.models.lenvm_config import LenVMConfig
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.models.value_model import LengthValueModel

GAMMA = 0.997
INDEX = "model.safetensors.index.json"
HEAD_KEYS = ["fc.bias", "fc.weight", "summary.bias", "summary.weight"]


def inputs_of(family: str) -> dict[str, Tensor]:
    return text_inputs("left") if family in ("tiny-text", "untied") else image_inputs(family)


def trained(family: str) -> LengthValueModel:
    """A model whose weights, head included, are not those it starts from."""
    torch.manual_seed(1)
    if family == "untied":
        model = LengthValueModel.from_backbone(
            "tiny-text", LenVMConfig(GAMMA), pretrained=False, overrides={"tie_word_embeddings": False}
        )
    else:
        model = build(family)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    nn.init.normal_(model.v_head.summary.weight)
    return model


def logits_of(model: LengthValueModel, family: str) -> Tensor:
    with torch.no_grad():
        return model(**inputs_of(family))


@pytest.fixture(scope="module", params=["tiny-text", "qwen2.5-vl", "untied", "smolvlm", "llava"])
def saved(request, tmp_path_factory) -> tuple[str, LengthValueModel, Path]:
    """Family, model and the directory it was saved to."""
    folder = tmp_path_factory.mktemp(request.param)
    model = trained(request.param)
    model.config = LenVMConfig(GAMMA, backbone="somewhere/base", rollouts={"p50": 70}, dropout=0.1)
    model.save_pretrained(folder)
    return request.param, model, folder


# -- ours -------------------------------------------------------------------------------------------------------


def test_round_trip(saved):
    family, model, folder = saved
    loaded = LengthValueModel.from_pretrained(folder)
    assert not loaded.training
    assert loaded.config == model.config
    assert loaded.backbone.dtype == torch.float32
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())
    assert torch.equal(logits_of(loaded, family), logits_of(model, family))
    fresh = LengthValueModel(loaded.backbone, loaded.config)
    assert not torch.equal(logits_of(fresh, family), logits_of(model, family))


def test_round_trip_in_a_fresh_process(tmp_path):
    script = """
import sys, torch
from lenvm_lightning.models.value_model import LengthValueModel
torch.set_num_threads(int(sys.argv[1]))
for folder in sys.argv[2:]:
    with torch.no_grad():
        logits = LengthValueModel.from_pretrained(folder)(**torch.load(folder + "/inputs.pt", weights_only=True))
    torch.save(logits, folder + "/logits.pt")
"""
    folders = [tmp_path / "tiny-text", tmp_path / "qwen2.5-vl"]
    models = [trained(folder.name) for folder in folders]
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder)
        torch.save(inputs_of(folder.name), folder / "inputs.pt")
    arguments = [str(torch.get_num_threads()), *map(str, folders)]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "it/s" not in done.stderr
    for model, folder in zip(models, folders, strict=True):
        assert torch.equal(torch.load(folder / "logits.pt", weights_only=True), logits_of(model, folder.name))


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


def test_what_is_written(tmp_path):
    model = trained("qwen2.5-vl")
    before = json.dumps(model.backbone.config.to_dict(), default=str)
    model.save_pretrained(tmp_path / "a" / "b", AutoProcessor.from_pretrained(tinyworld.path("tiny-vl")))
    folder = tmp_path / "a" / "b"
    assert sorted(load_file(folder / "value_head.safetensors")) == [f"v_head.{key}" for key in HEAD_KEYS]
    keys = load_file(folder / "model.safetensors")
    assert {key.split(".")[0] for key in keys} == {"model", "visual"}  # as Qwen publishes them
    assert json.loads((folder / "lenvm_config.json").read_text()) == dataclasses.asdict(model.config)
    assert type(load_processor(folder)).__name__ == "Qwen2_5_VLProcessor"
    assert json.dumps(model.backbone.config.to_dict(), default=str) == before
    assert model.backbone.get_input_embeddings().weight is not None
    assert not any("lm_head" in name for name in model.state_dict())


def test_saving_over_an_older_one(tmp_path):
    trained("tiny-text").save_pretrained(tmp_path)
    model = build("tiny-text")
    model.save_pretrained(tmp_path)
    loaded = LengthValueModel.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, "tiny-text"), logits_of(model, "tiny-text"))


def test_half_a_directory_is_no_model(tmp_path, monkeypatch):
    trained("tiny-text").save_pretrained(tmp_path)
    model = build("tiny-text")
    monkeypatch.setattr(
        value_head_io, "save_file", lambda *_args, **_kwargs: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no value head"):
        LengthValueModel.from_pretrained(tmp_path, gamma=GAMMA)


def test_saving_and_loading_are_quiet(tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for family in ("tiny-text", "qwen2.5-vl", "untied"):
            trained(family).save_pretrained(tmp_path / family)
            LengthValueModel.from_pretrained(tmp_path / family)
    assert capfd.readouterr() == ("", "")
    from transformers.utils import logging

    list(logging.tqdm([1], desc="others still show"))
    assert "others still show" in capfd.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_precisions(tmp_path, dtype):
    model = trained("tiny-text").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    loaded = LengthValueModel.from_pretrained(tmp_path)
    assert loaded.backbone.dtype == getattr(torch, dtype)
    assert loaded.v_head.fc.weight.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert torch.equal(logits_of(loaded, "tiny-text"), logits_of(model, "tiny-text"))
    assert LengthValueModel.from_pretrained(tmp_path, dtype="float32").backbone.dtype == torch.float32


# -- the first layers ---------------------------------------------------------------------------------------------


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


# -- published --------------------------------------------------------------------------------------------------


def publish(folder: Path, layout: str, family: str = "tiny-text") -> LengthValueModel:
    """Write a directory as others publish it; what it should give."""
    model = trained(family)
    kind = AutoModelForCausalLM if family == "tiny-text" else AutoModelForImageTextToText
    full = kind.from_config(model.backbone.config)
    full.model.load_state_dict(model.backbone.state_dict())
    full.save_pretrained(folder, **({"max_shard_size": "2MB"} if "index" in layout else {}))
    head = model.v_head.state_dict()
    named = {f"v_head.{key}": tensor for key, tensor in head.items()}
    if "index" in layout:
        index = json.loads((folder / INDEX).read_text())
        assert len(set(index["weight_map"].values())) > 1
        index["weight_map"] |= dict.fromkeys(head, "model-head.safetensors")
        (folder / INDEX).write_text(json.dumps(index))
        save_file(head, folder / "model-head.safetensors", metadata={"format": "pt"})
        return model
    weights = load_file(folder / "model.safetensors")
    if layout == "bare suffixes":
        weights |= head
    elif layout == "prefixed in the shards":
        weights |= {f"model.{key}": tensor for key, tensor in named.items()}
    else:
        save_file(named, folder / "value_head.safetensors")
    if "only lm_head" in layout:
        assert "lm_head.weight" not in weights
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("family", ["tiny-text", "qwen2.5-vl"])
@pytest.mark.parametrize(
    "layout", ["value_head.safetensors", "bare suffixes", "prefixed in the shards", "sharded index", "only lm_head"]
)
def test_published_layouts(tmp_path, layout, family):
    model = publish(tmp_path, layout, family)
    loaded = LengthValueModel.from_pretrained(tmp_path, gamma=GAMMA)
    assert loaded.gamma == GAMMA
    assert torch.equal(logits_of(loaded, family), logits_of(model, family))


def test_a_head_in_bfloat16_is_read_as_float32(tmp_path):
    publish(tmp_path, "value_head.safetensors")
    head = {key: tensor.bfloat16() for key, tensor in load_file(tmp_path / "value_head.safetensors").items()}
    save_file(head, tmp_path / "value_head.safetensors")
    loaded = LengthValueModel.from_pretrained(tmp_path, gamma=GAMMA)
    assert loaded.v_head.fc.weight.dtype == torch.float32
    assert torch.equal(loaded.v_head.fc.weight, head["v_head.fc.weight"].float())


# -- refused ----------------------------------------------------------------------------------------------------


def rewrite(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def write_config(folder: Path, text: str) -> None:
    (folder / "lenvm_config.json").write_text(text)


def untie(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    rewrite(folder / "model.safetensors", lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))


def half_of(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


MISTAKES = {
    "no gamma": (None, None, ["does not say which gamma", "lenvm_config.json", "from_pretrained(..., gamma=0.997)"]),
    "another gamma": (
        lambda folder: write_config(folder, '{"gamma": 0.99}'),
        GAMMA,
        ["trained with gamma=0.99", "gamma=0.997 was asked for", "leave the argument out"],
    ),
    "gamma out of range": (None, 1.5, ["strictly between 0 and 1; got 1.5"]),
    "no head": (
        lambda folder: (folder / "value_head.safetensors").unlink(),
        GAMMA,
        ["has no value head", "v_head.summary.bias", "value_head.safetensors", "found none", "lightning run text_len"],
    ),
    "half a head": (
        lambda folder: rewrite(folder / "value_head.safetensors", lambda t: t.pop("v_head.fc.bias")),
        GAMMA,
        ["found only fc.weight, summary.bias, summary.weight"],
    ),
    "head of another width": (
        lambda folder: save_file(
            {f"v_head.{k}": t for k, t in nn.ModuleDict({"fc": nn.Linear(64, 64), "summary": nn.Linear(64, 1)})
             .state_dict().items()}, folder / "value_head.safetensors",
        ),
        GAMMA,
        ["does not fit its backbone", "fc.weight is (64, 64), expected (128, 128)", "summary.weight is", "copy"],
    ),
    "damaged head": (
        lambda folder: half_of(folder / "value_head.safetensors"),
        GAMMA,
        ["value_head.safetensors is damaged", "Save or download it again"],
    ),
    "a weight missing": (
        lambda folder: rewrite(folder / "model.safetensors", lambda t: t.pop("model.layers.2.mlp.up_proj.weight")),
        GAMMA,
        ["1 weights of Qwen2Model are not in", "layers.2.mlp.up_proj.weight", "incomplete or of another architecture"],
    ),
    "no embedding, untied": (untie, GAMMA, ["embed_tokens.weight", "incomplete"]),
    "a weight of another shape": (
        lambda folder: rewrite(
            folder / "model.safetensors", lambda t: t.update({"model.norm.weight": torch.ones(64)})
        ),
        GAMMA,
        ["norm.weight is (64,), expected (128,)", "config.json", "save or download both again"],
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        GAMMA,
        ["no weights could be read", "looked for safetensors", "model.safetensors"],
    ),
    "damaged weights": (lambda folder: half_of(folder / "model.safetensors"), GAMMA, ["no weights could be read"]),
    "no config.json": (
        lambda folder: (folder / "config.json").unlink(),
        GAMMA,
        ["no model could be read from", "a directory with a config.json", "tiny-text, tiny-vl"],
    ),
    "broken lenvm_config.json": (
        lambda folder: write_config(folder, '{"gamma": 0.9'),
        GAMMA,
        ["lenvm_config.json is not valid JSON", "Save or download the model again"],
    ),
    "lenvm_config.json of another shape": (
        lambda folder: write_config(folder, "[0.9]"),
        GAMMA,
        ["lenvm_config.json must hold a JSON object, found list"],
    ),
    "gamma that is no number": (
        lambda folder: write_config(folder, '{"gamma": "auto"}'),
        None,
        ["gamma must be a number strictly between 0 and 1; got 'auto'", "lenvm_config.json"],
    ),
    "unknown target": (
        lambda folder: write_config(folder, '{"gamma": 0.9, "target": "later"}'),
        None,
        ["target must be one of discounted", "'later'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(tmp_path, mistake):
    harm, gamma, texts = MISTAKES[mistake]
    publish(tmp_path, "value_head.safetensors")
    if harm:
        harm(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        LengthValueModel.from_pretrained(tmp_path, gamma=gamma)
    assert str(tmp_path) in str(caught.value)
    for text in texts:
        assert text in str(caught.value)


def test_a_shard_is_missing(tmp_path):
    publish(tmp_path, "sharded index")
    (tmp_path / "model-head.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lists model-head\.safetensors.*Download it again"):
        LengthValueModel.from_pretrained(tmp_path, gamma=GAMMA)
    publish(tmp_path, "sharded index")
    next(tmp_path.glob("model-00001-of-*")).unlink()
    with pytest.raises(CheckpointError, match="no weights could be read"):
        LengthValueModel.from_pretrained(tmp_path, gamma=GAMMA)


def test_a_base_model_is_no_length_model():
    with pytest.raises(CheckpointError, match="'tiny-text' has no value head"):
        LengthValueModel.from_pretrained("tiny-text", gamma=GAMMA)


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="no model could be read from") as caught:
        LengthValueModel.from_pretrained(tmp_path / "nothing")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_is_not_there(tmp_path):
    publish(tmp_path, "value_head.safetensors")
    with pytest.raises(CheckpointError, match="no tokenizer or processor could be read"):
        load_processor(tmp_path)


def test_our_extra_settings_may_grow(tmp_path):
    publish(tmp_path, "value_head.safetensors")
    write_config(tmp_path, json.dumps({"gamma": 0.9, "written_by_a_later_release": 1}))
    assert LengthValueModel.from_pretrained(tmp_path).gamma == 0.9


def test_the_tokenizer_comes_back(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tinyworld.path("tiny-text"))
    trained("tiny-text").save_pretrained(tmp_path, tokenizer)
    again = load_processor(tmp_path)
    assert again("So 3 * 4 = 12<|im_end|>").input_ids == tokenizer("So 3 * 4 = 12<|im_end|>").input_ids
