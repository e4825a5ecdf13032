"""LengthValueModel: text and vision-language backbones of several families, tiny and random; exact in float64."""

import copy
import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from forks import code
from published import publish, rewrite, write_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoProcessor, DynamicCache
from value_models import (
    FAMILIES,
    GAMMA,
    IMAGE_TOKEN,
    VOCABULARY,
    build,
    image_inputs,
    in_float64,
    inputs_of,
    logits_of,
    text_inputs,
    trained,
)

from lenvm_lightning import tinyworld
from lenvm_lightning.errors import CheckpointError
from lenvm_lightning.models.backbone import takes_argument
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.models.value_model import LengthValueModel

HEAD_KEYS = ["fc.bias", "fc.weight", "summary.bias", "summary.weight"]


def rows_of(logits: Tensor, mask: Tensor) -> list[Tensor]:
    """Logits of the real tokens of each row."""
    return [row[keep.bool()] for row, keep in zip(logits, mask, strict=True)]


# -- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["tiny-text", "gpt2", *FAMILIES])
def test_one_logit_a_position(family):
    model = build(family)
    inputs = image_inputs(family) if family in FAMILIES else text_inputs("right")
    with torch.no_grad():
        logits = model(**inputs)
    assert logits.shape == inputs["input_ids"].shape
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    value, remaining = model.value(logits), model.remaining(logits)
    assert ((value > -1) & (value < 0)).all()
    assert (remaining > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_image_is_seen(family):
    model, inputs = build(family).double(), in_float64(image_inputs(family))
    other = inputs | {"pixel_values": inputs["pixel_values"].flip(-1)}
    with torch.no_grad():
        before, after = model(**inputs), model(**other)
    image = (inputs["input_ids"] == IMAGE_TOKEN).int().argmax(1)
    for row, first in enumerate(image):
        assert torch.equal(before[row, :first], after[row, :first])
        assert (before[row, first:] - after[row, first:]).abs().max() > 1e-6


@pytest.mark.parametrize("family", ["tiny-text", "gpt2"])
def test_padding_of_text_changes_nothing(family):
    model = build(family).double()
    left, right = text_inputs("left"), text_inputs("right")
    with torch.no_grad():
        padded = [rows_of(model(**inputs), inputs["attention_mask"]) for inputs in (left, right)]
        for row, keep in enumerate(right["attention_mask"].bool()):
            alone = model(right["input_ids"][row][keep][None])[0]
            for logits in padded:
                assert (logits[row] - alone).abs().max() <= 1e-12
        # The control: positions that count the padding are not the same.
        width = left["input_ids"].shape[1]
        counted = model(**left, position_ids=torch.arange(width).expand(3, -1))
    assert (counted[0, -1] - padded[0][0][-1]).abs() > 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_with_images_is_its_rows(family):
    model = build(family).double()
    with torch.no_grad():
        alone = [model(**in_float64(image_inputs(family, rows=(row,))))[0] for row in range(4)]
        for side in ("left", "right"):
            inputs = in_float64(image_inputs(family, side))
            assert not inputs["attention_mask"].all()
            batched = rows_of(model(**inputs), inputs["attention_mask"])
            for one, together in zip(alone, batched, strict=True):
                assert (one - together).abs().max() <= 1e-12


def test_text_rows_of_a_vision_model():
    model = build("qwen2.5-vl").double()
    with torch.no_grad():
        model(**in_float64(image_inputs("qwen2.5-vl")))  # leaves its rope deltas behind
        left, right = text_inputs("left"), text_inputs("right")
        padded = [rows_of(model(**inputs), inputs["attention_mask"]) for inputs in (left, right)]
        alone = model(right["input_ids"][:1, : int(right["attention_mask"][0].sum())])[0]
    for logits in padded:
        assert (logits[0] - alone).abs().max() <= 1e-12


@pytest.mark.parametrize("family", ["tiny-text", "gpt2", "qwen2.5-vl"])
def test_steps_with_a_cache_are_the_whole_forward(family):
    model, inputs = build(family).double(), text_inputs("left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = DynamicCache(config=model.backbone.config)
    with torch.no_grad():
        whole = model(ids, mask)
        cuts = ((0, 9), (9, 10), (10, ids.shape[1]))
        parts = [model(ids[:, a:b], mask[:, :b], past_key_values=cache) for a, b in cuts]
    assert cache.get_seq_length() == ids.shape[1]
    assert ((torch.cat(parts, 1) - whole) * mask).abs().max() <= 1e-12


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_steps_after_images_are_the_whole_forward(name, masked):
    model, inputs = build("qwen2.5-vl").double(), in_float64(image_inputs("qwen2.5-vl", rows=(1,)))
    if name == "cache" and not takes_argument(model.backbone, name):
        pytest.skip("transformers does not know the new name yet")
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    cache, last = DynamicCache(config=model.backbone.config), ids.shape[1]
    types = inputs.pop("mm_token_type_ids")
    with torch.no_grad():
        whole = model(ids, mask, mm_token_type_ids=types, **inputs)
        parts = [model(ids[:, : last - 4], mask[:, : last - 4], **inputs, **{name: cache})]
        model(**in_float64(image_inputs("qwen2.5-vl", rows=(0, 2))))  # the backbone remembers the last images it saw
        for a, b in ((last - 4, last - 1), (last - 1, last)):
            parts.append(model(ids[:, a:b], mask[:, :b] if masked else None, **{name: cache}))
    assert cache.get_seq_length() == last
    assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-12


@pytest.mark.parametrize("family", ["tiny-text", *FAMILIES])
def test_no_vocabulary_logits(family):
    model = build(family)
    inputs = image_inputs(family) if family in FAMILIES else text_inputs("right")
    widths: dict[str, int] = {}

    def note(name):
        def hook(_module, _args, output):
            tensors = output if isinstance(output, tuple) else [output]
            widths[name] = max((t.shape[-1] for t in tensors if isinstance(t, Tensor) and t.ndim), default=0)

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(note(name))
    model(**inputs).sum().backward()
    assert len(widths) > 20
    assert max(widths.values()) < VOCABULARY
    assert not any("lm_head" in name for name, _ in model.named_modules())
    assert [VOCABULARY in p.shape for p in model.parameters()].count(True) == 1  # the input embedding


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_positions_keep_their_digits():
    model, plain = build("qwen2.5-vl").bfloat16(), build("qwen2.5-vl")
    assert model.backbone.dtype == torch.bfloat16
    buffers = dict(plain.named_buffers())
    assert "backbone.language_model.rotary_emb.inv_freq" in buffers
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["tiny-text", *FAMILIES])
def test_recomputing_activations(family):
    inputs = in_float64(image_inputs(family)) if family in FAMILIES else text_inputs("right")
    plain = build(family).double()
    saving = copy.deepcopy(plain)
    saving.recompute_activations()

    def forwards_of_a_layer(model) -> int:
        calls = []
        handle = model.backbone.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        model.zero_grad()
        model(**inputs).square().sum().backward()
        handle.remove()
        return len(calls)

    assert forwards_of_a_layer(plain.train()) == 1
    assert forwards_of_a_layer(saving.eval()) == 1  # transformers drops it in eval mode, silently
    assert forwards_of_a_layer(saving.train()) == 2
    for (name, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or (p.grad - q.grad).abs().max() <= 1e-12 * (1 + p.grad.abs().max()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_flows_through_a_frozen_tower(family):
    model = build(family).train()
    model.recompute_activations()
    wants_gradient = []
    for part in model.vision_modules():
        part.requires_grad_(False)
        for module in part.modules():
            module.register_forward_hook(
                lambda _m, _a, out: wants_gradient.append(getattr(out, "requires_grad", False))
            )
    model(**image_inputs(family)).sum().backward()
    assert len(wants_gradient) > 10
    assert not any(wants_gradient)


# -- directories ------------------------------------------------------------------------------------------------------


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
