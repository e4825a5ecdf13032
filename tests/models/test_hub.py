"""Publishing on the hub, over HTTP to one on this machine, and loading from there."""

import json

import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load

from lenvm_lightning import LengthValueModel, LenVMConfig, LoRA, tinyworld
from lenvm_lightning.errors import CheckpointError

IDS = torch.arange(20)[None] + 30


def test_what_is_published_is_the_directory_with_tokenizer_and_card(hub, tmp_path):
    model = LengthValueModel.from_pretrained("tiny-text-lenvm")
    address = model.push_to_hub("me/mine", private=True, token="hf_x", commit_message="First")
    assert address.startswith(f"{hub.endpoint}/me/mine/commit/")
    assert hub.repos["me/mine"]["visibility"] == "private"
    assert hub.commits[0]["summary"] == "First"
    files = hub.files["me/mine"]
    model.save_pretrained(tmp_path / "saved")
    saved = {file.name for file in (tmp_path / "saved").iterdir()}
    assert saved < set(files)
    assert {"README.md", "tokenizer.json", "value_head.safetensors", "lenvm_config.json"} <= set(files)
    assert json.loads(files["config.json"])["model_type"] == "qwen2"  # any other tool loads it as what it is
    for key, tensor in load(files["value_head.safetensors"]).items():
        assert torch.equal(tensor, model.v_head.state_dict()[key.removeprefix("v_head.")])
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "lenvm-lightning"
    assert tinyworld.NOTICE in card.text


def test_what_was_published_is_loaded_by_its_id(hub, tmp_path):
    model = LengthValueModel.from_pretrained("tiny-text-lenvm")
    model.push_to_hub("me/mine", token="hf_x")
    loaded = LengthValueModel.from_pretrained("me/mine")
    assert loaded.config == model.config
    assert torch.equal(loaded(IDS), model(IDS))
    loaded.push_to_hub("me/again", token="hf_x")  # with the card and tokenizer found there
    assert hub.files["me/again"]["README.md"] == hub.files["me/mine"]["README.md"]
    assert "tokenizer.json" in hub.files["me/again"]


def test_the_card_of_the_directory_goes_along(hub, tmp_path):
    LengthValueModel.from_pretrained("tiny-text-lenvm").save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\ntags: [mine]\n---\n\nAs good as new.\n", encoding="utf-8")
    model = LengthValueModel.from_pretrained(tmp_path)
    model.push_to_hub("me/mine", token="hf_x")
    assert b"As good as new." in hub.files["me/mine"]["README.md"]
    assert model.card("mit").data.to_dict() == {"tags": ["mine"], "license": "mit"}
    (tmp_path / "README.md").write_text("---\n- no\n---\nx", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"front matter of .*README.md cannot be read"):
        model.card()


def test_a_hub_that_refuses_or_is_not_there_is_said(hub, monkeypatch):
    model = LengthValueModel.from_pretrained("tiny-text-lenvm")
    with pytest.raises(CheckpointError, match="could not be pushed to 'a/b/c'"):
        model.push_to_hub("a/b/c", token="hf_x")
    hub.refuse = 403
    with pytest.raises(CheckpointError, match="Log in with `hf auth login`"):
        model.push_to_hub("me/mine", token="hf_x")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(CheckpointError, match="could not be pushed"):
        model.push_to_hub("me/mine", token="hf_x")
    assert hub.files == {}


def test_adapters_on_a_folder_of_this_machine_are_not_published(hub, tmp_path):
    build = LengthValueModel.from_backbone
    config = LenVMConfig(gamma=0.99)
    on_a_folder = build(tinyworld.path("tiny-text"), config, lora=LoRA(rank=2))
    with pytest.raises(CheckpointError, match="publish whole weights instead"):
        on_a_folder.push_to_hub("me/mine", token="hf_x")
    assert hub.repos == {}
    build("tiny-text", config, lora=LoRA(rank=2)).push_to_hub("me/mine", token="hf_x")
    assert {"adapter_config.json", "value_head.safetensors", "README.md"} <= set(hub.files["me/mine"])
    assert "config.json" not in hub.files["me/mine"]
