"""Models that a cache with rows does not fit are refused."""

from weakref import WeakKeyDictionary

import pytest
import torch
from pairs import PROMPTS, largest_difference, prompts_of
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPTNeoConfig,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    NemotronConfig,
    StableLmConfig,
)

from lenvm_lightning.decoding import compatibility
from lenvm_lightning.decoding.engine import Engine
from lenvm_lightning.decoding.generate import generate
from lenvm_lightning.decoding.model_runner import ModelRunner
from lenvm_lightning.decoding.prefill import Request
from lenvm_lightning.errors import GenerationError
from lenvm_lightning.guidance import EqualTo, Tilt
from lenvm_lightning.models.lenvm_config import LenVMConfig
from lenvm_lightning.models.value_model import LengthValueModel


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MptConfig(vocab_size=512, d_model=32, n_layers=2, n_heads=4), "lenvm: MptModel.*what follows a token differs"),
        (
            MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=1),
            "generator: MambaForCausalLM .*no keys and values",
        ),
        (
            GPTNeoConfig(
                vocab_size=512, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
            ),
            "generator: GPTNeoForCausalLM .*layers of kind local",
        ),
    ],
)
def test_families_that_would_be_silently_wrong_are_refused(config, words):
    """MPT takes positions from where keys lie: every candidate but the first would seem to stand too far on."""
    torch.manual_seed(0)
    lenvm = LengthValueModel(AutoModel.from_config(config), LenVMConfig(gamma=0.99)).eval()
    torch.nn.init.normal_(lenvm.v_head.summary.weight)
    for _ in range(2):  # the second time from memory
        with pytest.raises(GenerationError, match=words):
            generate(AutoModelForCausalLM.from_config(config).eval(), lenvm, PROMPTS, control=EqualTo(5))


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 512,
}


@pytest.mark.parametrize("config", [StableLmConfig(**SMALL), NemotronConfig(**SMALL, head_dim=8), LlamaConfig(**SMALL)])
def test_families_that_do_not_tell_their_attention_about_rows(config):
    """Rows as wide as the longest then, and everything computed; prompts of very different lengths side by side."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    lenvm = LengthValueModel(AutoModel.from_config(config, dtype=torch.float64), LenVMConfig(gamma=0.99)).eval()
    assert ModelRunner(base).leaves_out == ModelRunner(base).exact == (config.model_type == "llama")
    prompts = [[5, 6, 7], list(range(400)) * 3, [8, 9]]
    completions = generate(base, lenvm, prompts, control=Tilt(-3), n=2, max_tokens=5, trace=True)
    assert {one.finish_reason for one in completions} <= {"stop", "length"}
    assert largest_difference(lenvm, prompts, completions) < 1e-9


def test_layers_without_keys_are_refused():
    with pytest.raises(ValueError, match="linear_attention"):
        ModelRunner(MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1)))


def test_images_are_checked_before_anything_is_written(vision, vision_inputs, monkeypatch):
    """A model that says something else in rows after images is refused by name, by generate and whoever else asks."""
    together, _ = vision_inputs
    monkeypatch.setattr(compatibility, "_found", WeakKeyDictionary())
    monkeypatch.setattr(compatibility, "_difference_after_images", lambda *read: 0.5)
    with pytest.raises(
        GenerationError, match=r"generator: .* cannot be decoded in rows after images: .* differs by 0.5"
    ):
        generate(*vision, together, control=EqualTo(4))


def test_the_check_of_images_compares_both_models(vision, vision_inputs, monkeypatch):
    together, _ = vision_inputs
    found = WeakKeyDictionary()
    monkeypatch.setattr(compatibility, "_found", found)
    real, apart = compatibility._difference_after_images, []
    monkeypatch.setattr(compatibility, "_difference_after_images", lambda *read: apart.append(real(*read)) or apart[-1])
    generate(*vision, together, control=EqualTo(4), max_tokens=4)
    assert len(apart) == 2
    assert max(apart) < 1e-9


def test_a_value_model_that_is_wrong_after_images_is_wrong_for_every_request(vision, vision_inputs, monkeypatch):
    together, alone = vision_inputs
    monkeypatch.setattr(compatibility, "_found", WeakKeyDictionary())
    monkeypatch.setattr(
        compatibility, "_difference_after_images", lambda runner, lenvm, *read: 0.0 if lenvm is None else 0.5
    )
    engine = Engine(*vision)
    for ids, inputs in list(zip(prompts_of(together), alone, strict=True))[:2]:
        whole = {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
            **inputs,
        }
        assert "lenvm: " in engine.why_not(Request(0, ids, [0], inputs=whole))
