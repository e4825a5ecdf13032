"""Settings of adapters that a stranger may have written: plain LoRA is read, and nothing else is tried."""

import json
import shutil
import time

import pytest
from adapted import adapted, values
from safetensors.torch import load_file, save_file

from lenvm_lightning import LengthValueModel
from lenvm_lightning.errors import CheckpointError
from lenvm_lightning.models.adapter_config import read_adapter_config, target_pattern


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    adapted().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "a")


def change(folder, **entries):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))
    return file


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"target_modules": "(a+)+$"}, "target_modules must be a list of names of layers"),
        ({"target_modules": ["(a+)+$"]}, "target_modules must be a list of names of layers"),
        ({"target_modules": r"(?:.*\.)?(?:(?:a+)+)"}, "target_modules must be a list of names of layers"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"exclude_modules": "(a+)+$"}, "exclude_modules is '.*', and only plain LoRA is read here"),
        ({"layers_pattern": ["(a+)+$"], "layers_to_transform": [1]}, "layers_pattern is .*only plain LoRA"),
        ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern must be whole numbers by names of layers"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern must be numbers by names of layers"),
        ({"megatron_config": {"a": 1}, "megatron_core": "harm"}, "megatron_config is"),
        ({"modules_to_save": ["(a+)+$"]}, "modules_to_save is"),
        ({"r": "4"}, "r must be a whole number of at least 1, found '4'"),
        ({"r": 0, "lora_alpha": [1]}, "r must be .*\n  lora_alpha must be a number"),
        ({"r": 10**9}, "says rank 1000000000, which none of the weights in"),
        ({"use_dora": "yes"}, "use_dora must be true or false"),
        ({"base_model_name_or_path": ["x"]}, "must describe a LoRA adapter and name its base model"),
        ({"peft_type": "IA3"}, "must describe a LoRA adapter"),
        ({"target_modules": ["nowhere"]}, "does not fit 'tiny-text': .*nowhere"),
    ],
)
def test_what_is_no_plain_lora_is_refused_at_once(folder, entries, words):
    file = change(folder, **entries)
    begin = time.process_time()
    with pytest.raises(CheckpointError, match=words) as told:
        LengthValueModel.from_pretrained(folder)
    assert time.process_time() - begin < 5.0
    assert str(file.parent) in str(told.value)


@pytest.mark.parametrize("content", ["[1]", "", "{", "3"])
def test_a_file_that_is_no_object(folder, content):
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json "):
        LengthValueModel.from_pretrained(folder)


def test_lists_of_names_and_our_own_patterns_are_read(folder):
    expected = values(LengthValueModel.from_pretrained(folder))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    change(folder, target_modules=names)
    assert (values(LengthValueModel.from_pretrained(folder)) == expected).all()
    for prefix in ("", "language_model", "model.language-model"):
        file = change(folder, target_modules=target_pattern(prefix, names))
        assert read_adapter_config(file).target_modules == target_pattern(prefix, names)


def test_ranks_by_layer_are_kept(folder):
    """As PEFT writes them for adapters of different ranks."""
    weights = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.layers.1.self_attn.q_proj"
    weights[f"{key}.lora_A.weight"] = weights[f"{key}.lora_A.weight"][:2].contiguous()
    weights[f"{key}.lora_B.weight"] = weights[f"{key}.lora_B.weight"][:, :2].contiguous()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"q_proj.lora_A.weight is \(2, 128\), expected \(4, 128\)"):
        LengthValueModel.from_pretrained(folder)
    change(folder, rank_pattern={"layers.1.self_attn.q_proj": 2})
    LengthValueModel.from_pretrained(folder)
