"""Generators from folders, what tells them apart, and what cannot be loaded."""

import json

import pytest
import torch
from adapted import adapted
from asked import requests, results, text_prompts, tokens, vision_prompts
from safetensors.torch import load_file, save_file
from tiny_generators import build, save

from lenvm_lightning.decoding.sampling_params import SamplingParams
from lenvm_lightning.errors import GeneratorError
from lenvm_lightning.rollouts.generators.interface import GeneratedText
from lenvm_lightning.rollouts.generators.local import LocalGenerator, loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(build("tiny-text"), "tiny-text", tmp_path_factory.mktemp("models") / "my-model")


def test_load(folder, tmp_path):
    generator = LocalGenerator.load(str(folder), rows=3)
    assert generator.name == "my-model"
    assert generator.rows == 3
    assert generator.model.dtype == torch.float32
    found = results(generator, requests(text_prompts(2)), SamplingParams(temperature=0, max_tokens=8))
    same = LocalGenerator(build("tiny-text"), generator.processor, "same")
    assert tokens(found) == tokens(
        results(same, requests(text_prompts(2)), SamplingParams(temperature=0, max_tokens=8))
    )
    assert LocalGenerator.load(str(folder), dtype="bfloat16").model.dtype == torch.bfloat16
    assert 16 <= LocalGenerator.load(str(folder)).rows <= 256


def test_a_vision_model_loads_with_its_processor(tmp_path):
    folder = save(build("tiny-vl"), "tiny-vl", tmp_path / "v")
    generator = LocalGenerator.load(str(folder))
    found = results(generator, requests(vision_prompts()), SamplingParams(max_tokens=4))
    assert all(isinstance(result, GeneratedText) for result in found.values())


def test_fingerprint(folder, tmp_path):
    first = LocalGenerator.load(str(folder)).fingerprint()
    assert json.loads(json.dumps(first)) == first
    assert {key: first[key] for key in ("kind", "name", "dtype")} == {
        "kind": "transformers", "name": "my-model", "dtype": "float32",
    }  # fmt: skip
    elsewhere = tmp_path / "deeper" / "my-model"
    elsewhere.parent.mkdir()
    elsewhere.symlink_to(folder)
    assert LocalGenerator.load(str(elsewhere)).fingerprint() == first
    assert LocalGenerator.load(str(folder), dtype="float64").fingerprint() == {**first, "dtype": "float64"}
    changed = save(build("tiny-text", sharpness=2.0), "tiny-text", tmp_path / "my-model")
    assert LocalGenerator.load(str(changed)).fingerprint()["digest"] != first["digest"]


def test_large_models_are_told_apart_by_their_headers(folder, tmp_path, monkeypatch):
    """Pretending that everything is large: other numbers are not seen then, other shapes and names are."""
    monkeypatch.setattr(loading, "_WHOLE", 1000)
    copy = save(build("tiny-text", sharpness=2.0), "tiny-text", tmp_path / "copy")
    assert loading.digest(str(copy)) == loading.digest(str(folder))
    weights = load_file(copy / "model.safetensors")
    save_file({f"{key}.": value for key, value in weights.items()}, copy / "model.safetensors")
    assert loading.digest(str(copy)) != loading.digest(str(folder))


def test_what_cannot_be_loaded(folder, tmp_path):
    with pytest.raises(GeneratorError, match="no model could be read from 'no/such-model'"):
        LocalGenerator.load("no/such-model")
    with pytest.raises(GeneratorError, match="unknown dtype 'float23'; did you mean 'float32'"):
        LocalGenerator.load(str(folder), dtype="float23")
    with pytest.raises(GeneratorError, match="there is no device 'gpu0'"):
        LocalGenerator.load(str(folder), device="gpu0")
    with pytest.raises(GeneratorError, match="rows must be at least 1"):
        LocalGenerator.load(str(folder), rows=0)
    broken = save(build("tiny-text"), "tiny-text", tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    removed = weights.pop("lm_head.weight")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GeneratorError, match=r"lm_head\.weight is not there"):
        LocalGenerator.load(str(broken))
    weights["lm_head.weight"] = removed[:, :64].contiguous()
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GeneratorError, match=r"lm_head\.weight is \(2048, 64\), expected \(2048, 128\)"):
        LocalGenerator.load(str(broken))
    (broken / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(GeneratorError, match="no generator could be loaded from"):
        LocalGenerator.load(str(broken))
    (broken / "model.safetensors").unlink()
    with pytest.raises(GeneratorError, match="no generator could be loaded from"):
        LocalGenerator.load(str(broken))
    whole = save(build("tiny-text"), "tiny-text", tmp_path / "mute")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (whole / file).unlink()
    with pytest.raises(GeneratorError, match="tokenizer"):
        LocalGenerator.load(str(whole))


def test_evaluations_tell_adapters_apart(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        model.backbone.layers[0].self_attn.q_proj.lora_B["default"].weight.add_(1)
    model.save_pretrained(tmp_path / "b")
    assert loading.digest(str(tmp_path / "a")) != loading.digest(str(tmp_path / "b"))


def test_a_processor_that_is_slow_at_bfloat16_computes_in_float32_and_says_so(tmp_path, monkeypatch):
    from lenvm_lightning.models import dtypes

    model = loading.load_model("tiny-text").bfloat16()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(dtypes, "has_bfloat16", lambda device: True)
    assert loading.load_model(str(tmp_path)).dtype == torch.bfloat16
    monkeypatch.setattr(dtypes, "has_bfloat16", lambda device: False)
    with pytest.warns(UserWarning, match="slow at bfloat16"):
        slow = loading.load_model(str(tmp_path))
    assert slow.dtype == torch.float32
    assert torch.equal(slow.lm_head.weight, model.lm_head.weight.float())
