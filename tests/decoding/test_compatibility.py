"""Families that a cache with rows does not fit are refused."""

import pytest
import torch
from pairs import PROMPTS
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPTNeoConfig,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
)

from lenvm_lightning.decoding.generate import generate
from lenvm_lightning.decoding.model_runner import ModelRunner
from lenvm_lightning.errors import GenerationError
from lenvm_lightning.guidance import EqualTo
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


def test_layers_without_keys_are_refused():
    with pytest.raises(ValueError, match="linear_attention"):
        ModelRunner(MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1)))
