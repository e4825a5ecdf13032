"""The shipped model folders: ordinary, small, and those that `build` writes. Nothing here needs a network."""

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from lenvm_lightning import tinyworld
from lenvm_lightning.tinyworld import build


@pytest.fixture(scope="module")
def processor():
    """Return the shipped processor as a user loads it."""
    return AutoProcessor.from_pretrained(tinyworld.path("tiny-vl"))


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="tiny-text, tiny-vl"):
        tinyworld.path("tiny-audio")


def test_shipped_folders_equal_a_rebuild(tmp_path):
    build.build(tmp_path)
    for name in tinyworld.NAMES:
        files = [file for file in tinyworld.path(name).iterdir() if file.suffix != ".safetensors"]
        shipped = {file.name: file.read_text(encoding="utf-8") for file in files}
        rebuilt = {file.name: file.read_text(encoding="utf-8") for file in (tmp_path / name).iterdir()}
        assert shipped == rebuilt
    assert sum(len(text.encode()) for text in shipped.values()) < 300_000


def test_text_model_runs(tokenizer):
    config = AutoConfig.from_pretrained(tinyworld.path("tiny-text"))
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    batch = tokenizer(["one two three", "one"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert AutoModel.from_config(config)(**batch).last_hidden_state.shape == (*batch["input_ids"].shape, 128)
        assert AutoModelForCausalLM.from_config(config)(**batch).logits.shape[-1] == 2048


@pytest.mark.parametrize("side", ["left", "right"])
def test_vision_model_runs(processor, side):
    config = AutoConfig.from_pretrained(tinyworld.path("tiny-vl"))
    sizes = [(84, 84), (112, 112), (500, 300), (20, 20)]
    tokens = [9, 16, 15, 4]  # of 28 x 28 pixels after resizing
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>How many?<|im_end|>\n"
    images = [Image.new("RGB", size, "red") for size in sizes]
    batch = processor(text=[text] * 4, images=images, padding=True, padding_side=side, return_tensors="pt")
    assert (batch["input_ids"] == config.image_token_id).sum(1).tolist() == tokens
    pad_first = batch["attention_mask"][3, 0] == 0
    assert pad_first == (side == "left")
    with torch.no_grad():
        hidden = AutoModel.from_config(config)(**batch).last_hidden_state
        logits = AutoModelForImageTextToText.from_config(config)(**batch).logits
    assert hidden.shape == (*batch["input_ids"].shape, 128)
    assert logits.shape == (*batch["input_ids"].shape, 2048)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    ("name", "auto"), [("tiny-text", AutoModelForCausalLM), ("tiny-vl", AutoModelForImageTextToText)]
)
def test_directories_are_ordinary_and_small(name, auto):
    folder = tinyworld.path(name)
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= 4_000_000
    model, found = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
