"""Directories of value models: what is written and read back, and what is refused."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from forks import code
from published import publish, rewrite, write_config
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoProcessor
from value_models import (
    GAMMA,
    build,
    inputs_of,
    logits_of,
    trained,
)

from lenvm_lightning import tinyworld
from lenvm_lightning.errors import CheckpointError
from lenvm_lightning.models.lenvm_config import LenVMConfig
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.models.value_model import LengthValueModel

HEAD_KEYS = ["fc.bias", "fc.weight", "summary.bias", "summary.weight"]


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
    fork = code(script, *arguments)
    out, err = fork.communicate(100)
    assert (fork.returncode, out) == (0, ""), err
    assert "it/s" not in err
    for model, folder in zip(models, folders, strict=True):
        assert torch.equal(torch.load(folder / "logits.pt", weights_only=True), logits_of(model, folder.name))


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


# -- refused ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("until", [None, "</think>", "\n\n"])
def test_a_directory_remembers_what_the_model_counts_to(until, tmp_path):
    config = LenVMConfig(gamma=0.9, until=until)
    LengthValueModel.from_backbone("tiny-text", config, pretrained=False).save_pretrained(tmp_path / "model")
    assert LengthValueModel.from_pretrained(tmp_path / "model").config.until == until
