"""Heads of model directories: ours and the published ones."""

import json

import pytest
import torch
from published import publish, write_config
from safetensors.torch import load_file, save_file
from value_models import GAMMA, build, logits_of, trained

from lenvm_lightning.errors import CheckpointError
from lenvm_lightning.models import value_head_io
from lenvm_lightning.models.value_model import LengthValueModel


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


def test_a_base_model_is_no_length_model():
    with pytest.raises(CheckpointError, match="'tiny-text' has no value head"):
        LengthValueModel.from_pretrained("tiny-text", gamma=GAMMA)


def test_our_extra_settings_may_grow(tmp_path):
    publish(tmp_path, "value_head.safetensors")
    write_config(tmp_path, json.dumps({"gamma": 0.9, "written_by_a_later_release": 1}))
    assert LengthValueModel.from_pretrained(tmp_path).gamma == 0.9
