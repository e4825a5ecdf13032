"""LoRA and QLoRA: what is trained, what is kept, and that nothing is lost on the way to disk and back."""

import json
import shutil

import pytest
import torch
from adapted import IDS, WAYS, adapted, fit, text_data, text_module, values
from forks import code, finish
from modules import make_module
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from datamodules import TextRollouts, VisionRollouts
from lenvm_lightning import LengthValueModel, LenVMConfig, LoRA, TextLenVM, VisionLenVM, tinyworld
from lenvm_lightning.errors import CheckpointError
from lenvm_lightning.models.adapters import add_adapter, count_parameters, is_adapted, merge, merge_in_place
from lenvm_lightning.models.backbone import load_backbone
from lenvm_lightning.models.dtypes import open_value_model

# -- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantise", [None, "nf4"])
def test_adapters_sit_on_the_language_model_and_nothing_else_is_trained(quantise):
    model = adapted("tiny-vl", quantise)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = 4 * 7  # query, key, value, output, gate, up, down
    assert len(trained) == 2 * layers + 4
    assert all(name.startswith(("backbone.language_model.layers.", "v_head.")) for name in trained)
    assert {p.dtype for name, p in model.named_parameters() if name in trained} == {torch.float32}


@pytest.mark.parametrize("quantise", [None, "nf4"])
def test_adapters_are_float32_on_a_base_of_less(quantise, tmp_path):
    model = LengthValueModel.from_backbone(
        "tiny-text", LenVMConfig(0.99), lora=LoRA(4), quantise=quantise, dtype="bfloat16"
    ).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert model.backbone.embed_tokens.weight.dtype == torch.bfloat16
    assert {p.dtype for p in trained} == {torch.float32}
    model.save_pretrained(tmp_path)
    again = LengthValueModel.from_pretrained(tmp_path)
    assert {p.dtype for name, p in again.named_parameters() if ".lora_" in name} == {torch.float32}
    assert torch.equal(values(again), values(model.eval()))


def test_parameters_in_four_bits_count_as_what_they_are():
    plain = LengthValueModel.from_backbone("tiny-vl", LenVMConfig(0.99))
    adapters = 4 * 4 * sum(fan_in + fan_out for fan_in, fan_out in (
        (128, 128), (128, 64), (128, 64), (128, 128), (128, 384), (128, 384), (384, 128)))  # fmt: skip
    head = 128 * 128 + 128 + 128 + 1
    everything = sum(p.numel() for p in plain.parameters())
    assert count_parameters(plain)[0] == everything
    assert count_parameters(adapted("tiny-vl", "nf4")) == (everything + adapters, adapters + head)


def test_fresh_adapters_change_nothing():
    torch.manual_seed(0)
    plain = LengthValueModel.from_backbone("tiny-text", LenVMConfig(0.99)).eval()
    torch.manual_seed(0)
    model = LengthValueModel.from_backbone("tiny-text", LenVMConfig(0.99), lora=LoRA(8)).eval()
    model.v_head.load_state_dict(plain.v_head.state_dict())
    assert torch.equal(values(model), values(plain))
    assert not torch.equal(values(adapted()), values(plain))


def test_what_an_adapter_adds_by_hand():
    layer = adapted(alpha=12).backbone.layers[0].self_attn.o_proj
    x, a, b = torch.randn(3, 128), layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = x @ layer.base_layer.weight.T + 12 / 4 * x @ a.T @ b.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_targets_by_name():
    model = adapted(targets=["q_proj", "v_proj"])
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 8
    with pytest.raises(CheckpointError, match="no linear layer 'q_prj'; did you mean 'q_proj'"):
        add_adapter(load_backbone("tiny-text"), LoRA(targets=["q_prj"]))


@pytest.mark.parametrize("quantise", [None, "nf4"])
def test_gradients_still_flow_after_a_look_in_eval_mode(quantise):
    """bitsandbytes packs weights anew in eval mode on some CPUs, and no gradient passes them from then on."""
    model = adapted(quantise=quantise)
    before = values(model)
    model.train()
    logits = model(IDS)
    torch.testing.assert_close(model.value(logits.detach()), before, rtol=0, atol=1e-6)
    logits.sum().backward()
    first = model.backbone.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert float(first.grad.abs().sum()) > 0


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["lora", "qlora"])
def test_a_run_goes_on_bit_for_bit(text_rollouts, tmp_path, way):
    """With dropout, and with validations in between."""
    whole = fit(text_module(**WAYS[way]), text_data(text_rollouts), 6, tmp_path / "whole", validate=1)
    resumed = fit(
        text_module(**WAYS[way]), text_data(text_rollouts), 6, tmp_path / "rest",
        resume=tmp_path / "whole" / "step-000000002.ckpt", validate=1,
    )  # fmt: skip
    pairs = zip(whole.model.state_dict().items(), resumed.model.state_dict().items(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


# -- directories ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-text", "tiny-vl"])
@pytest.mark.parametrize("quantise", [None, "nf4"])
def test_merged_weights_give_the_values_of_training(name, quantise, tmp_path):
    model = adapted(name, quantise)
    model.save_merged(tmp_path / "merged")
    merged = LengthValueModel.from_pretrained(tmp_path / "merged")
    assert not merged.config.base
    torch.testing.assert_close(values(merged), values(model), rtol=0, atol=1e-6)
    # Negative control: the base by itself, and the base before it was quantised, are something else.
    base = LengthValueModel.from_backbone(name, LenVMConfig(0.99)).eval()
    base.v_head.load_state_dict(model.v_head.state_dict())
    assert float((values(base) - values(model)).abs().max()) > 1e-3
    if quantise:
        unpacked = adapted(name)
        unpacked.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" in k or "v_head" in k}, False)
        assert float((values(unpacked) - values(model)).abs().max()) > 1e-4


def test_merging_leaves_the_model_alone(tmp_path):
    model = adapted(quantise="nf4")
    before = values(model)
    merge(model.backbone)
    assert torch.equal(values(model), before)


@pytest.mark.parametrize("name", ["tiny-text", "tiny-vl"])
def test_merged_in_place_it_predicts_the_same(name, tmp_path):
    model = adapted(name)
    before = values(model)
    assert merge_in_place(model.backbone)
    assert not any(".lora_" in key or ".base_layer" in key for key in model.state_dict())
    torch.testing.assert_close(values(model), before, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path)  # whole weights now
    assert torch.equal(values(LengthValueModel.from_pretrained(tmp_path)), values(model))
    assert merge_in_place(model.backbone)  # nothing to do


def test_weights_in_four_bits_keep_their_adapters():
    model = adapted(quantise="nf4")
    before = values(model)
    assert not merge_in_place(model.backbone)
    assert torch.equal(values(model), before)


def test_adapters_that_are_no_sum_are_not_added():
    """DoRA scales each row of the sum to a length that it has learned."""
    backbone = load_backbone("tiny-text").eval()
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj"], use_dora=True), backbone)
    for key, parameter in backbone.named_parameters():
        if "lora_B" in key or "magnitude" in key:
            torch.nn.init.normal_(parameter, mean=0.3, std=0.05)
    with torch.no_grad():
        before = backbone(IDS).last_hidden_state
        assert not merge_in_place(backbone)
        assert torch.equal(backbone(IDS).last_hidden_state, before)
    with pytest.raises(CheckpointError, match="DoRA"):
        merge(backbone)


def test_what_is_opened_to_predict_with_carries_no_adapters(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    opened = open_value_model(tmp_path, gamma=None, dtype="float32", device=torch.device("cpu"))
    assert not is_adapted(opened.backbone)
    torch.testing.assert_close(values(opened), values(model), rtol=0, atol=1e-6)


_FRESH = """
import sys, torch
from lenvm_lightning import LengthValueModel
torch.set_num_threads(1)
for folder, expected in torch.load(sys.argv[1], weights_only=True).items():
    model = LengthValueModel.from_pretrained(folder)
    with torch.no_grad():
        found = model(**expected.pop("inputs"))
    print(folder, float((found - expected["logits"]).abs().max()))
"""


def test_round_trips_in_a_fresh_process(text_rollouts, vision_rollouts, tmp_path):
    """Full, LoRA and QLoRA, text and images, as they are and merged: trained here, read elsewhere."""
    cases = {}
    for way, settings in WAYS.items():
        for kind, file, data_class, module_class in (
            ("text", text_rollouts, TextRollouts, TextLenVM),
            ("vl", vision_rollouts, VisionRollouts, VisionLenVM),
        ):
            data = data_class(str(file), batch_tokens=1024, val_share=0.2)
            module = fit(
                make_module(module_class, f"tiny-{kind}", gamma=0.99, lr=1e-3, warmup_steps=0, **settings), data
            )
            batch = next(iter(data.val_dataloader()))
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], **batch["vision"]}
            model = module.model.eval()
            with torch.no_grad():
                expected = {"inputs": inputs, "logits": model(**inputs)}
            folder = str(tmp_path / f"{kind}-{way}")
            model.save_pretrained(folder, data.processor)
            cases[folder] = expected
            if way != "full":
                model.save_merged(f"{folder}-merged", data.processor)
                cases[f"{folder}-merged"] = expected
    torch.save({folder: dict(case) for folder, case in cases.items()}, tmp_path / "expected.pt")
    found = dict(line.split() for line in finish(code(_FRESH, str(tmp_path / "expected.pt"))).splitlines())
    assert set(found) == set(cases)
    # The same weights give the same bits; sums with the adapter in another order do not quite.
    assert {folder: apart for folder, apart in found.items() if float(apart) > 1e-5 * ("merged" in folder)} == {}


def test_an_adapter_saved_again_elsewhere_still_knows_its_base(tmp_path, monkeypatch):
    shutil.copytree(tinyworld.path("tiny-text"), tmp_path / "there" / "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    adapted("base").save_pretrained(tmp_path / "a")
    monkeypatch.chdir(tmp_path / "elsewhere")
    first = LengthValueModel.from_pretrained(tmp_path / "a")
    first.save_pretrained(tmp_path / "b")
    assert torch.equal(values(LengthValueModel.from_pretrained(tmp_path / "b")), values(first))
    settings = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "there" / "base")


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tinyworld.path("tiny-text"), base)
    model = adapted(str(base))
    model.save_pretrained(tmp_path / "a")
    file, settings = tmp_path / "a" / "adapter_model.safetensors", tmp_path / "a" / "adapter_config.json"
    whole = load_file(file)
    assert json.loads(settings.read_text())["base_model_name_or_path"] == str(base)

    key = next(iter(whole))
    save_file({k: v for k, v in whole.items() if k != key}, file)
    with pytest.raises(CheckpointError, match=f"{key} is missing.*name the right base in"):
        LengthValueModel.from_pretrained(tmp_path / "a")
    save_file({**whole, key: torch.zeros(3, 3), "more": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=rf"more has no place, {key} is \(3, 3\), expected"):
        LengthValueModel.from_pretrained(tmp_path / "a")
    save_file(whole, file)
    LengthValueModel.from_pretrained(tmp_path / "a")

    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.input_layernorm.weight"][3] += 0.01
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="has changed since it was trained"):
        LengthValueModel.from_pretrained(tmp_path / "a")
    settings.write_text("{}")
    with pytest.raises(CheckpointError, match="must describe a LoRA adapter and name its base model"):
        LengthValueModel.from_pretrained(tmp_path / "a")
