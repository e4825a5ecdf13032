"""Copies of a model are told by their norms, and an embedded adapter goes on the copy that is guided."""

import json
import shutil

import torch
from adapted import adapted
from transformers import AutoModelForCausalLM

from lenvm_lightning import tinyworld
from lenvm_lightning.models import embedded
from lenvm_lightning.models.dtypes import open_value_model
from lenvm_lightning.models.embedded import EmbeddedModel
from lenvm_lightning.models.norms import norms_of
from lenvm_lightning.models.value_model import LengthValueModel


def test_copies_have_the_same_norms_and_other_models_have_not(tmp_path):
    source = tinyworld.path("tiny-text")
    known = norms_of(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    for name, parameter in model.named_parameters():
        if not name.endswith("norm.weight"):
            parameter.data += 0.01 * torch.randn_like(parameter)  # as weights that went through four bits
    model.to(torch.bfloat16).save_pretrained(tmp_path / "copy", max_shard_size="1MB")
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 1
    assert norms_of(tmp_path / "copy") == known
    model.model.norm.weight.data[0] += 1.0
    model.save_pretrained(tmp_path / "tuned")
    assert norms_of(tmp_path / "tuned") not in (None, known)
    (tmp_path / "empty").mkdir()
    assert norms_of(tmp_path / "empty") is None


def test_an_embedded_adapter_goes_on_the_copy_that_its_generator_is(tmp_path, monkeypatch):
    lenvm = adapted()
    lenvm.save_pretrained(tmp_path / "mine-lenvm")
    config = json.loads((tmp_path / "mine-lenvm" / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "somebody/not-here"  # what nobody has, without a hub
    (tmp_path / "mine-lenvm" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    copy = tmp_path / "downloaded"
    shutil.copytree(tinyworld.path("tiny-text"), copy)
    monkeypatch.setattr(embedded, "_models", dict(embedded._models))
    norms = norms_of(copy)
    embedded.register(EmbeddedModel("mine-lenvm", tmp_path / "mine-lenvm", "", "somebody/not-here", norms))
    assert embedded.value_model_of(str(copy)) == "mine-lenvm"
    assert embedded.value_model_of("somebody/not-here") == "mine-lenvm"
    assert embedded.value_model_of(str(tmp_path)) is None
    assert embedded.base_for("mine-lenvm", str(copy)) == str(copy)
    assert embedded.base_for("mine-lenvm", "Qwen/Qwen2.5-3B-Instruct") is None
    ids = torch.arange(20)[None]
    options = {"gamma": None, "dtype": "float32", "device": torch.device("cpu")}
    found = open_value_model("mine-lenvm", generator=str(copy), **options)
    with torch.inference_mode():
        assert torch.allclose(found(ids), lenvm.eval()(ids), atol=1e-5)
    again = LengthValueModel.from_pretrained("mine-lenvm", base=copy)
    assert again.gamma == lenvm.gamma
