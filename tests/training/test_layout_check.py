"""Layouts that a model gets wrong are refused before training."""

import pytest
import torch
from layouts import SMALL, random_rows, small
from transformers import BloomConfig, MambaConfig, OPTConfig

from datamodules.collate import Collator
from lenvm_lightning import LengthValueModel
from lenvm_lightning.errors import RecipeError
from lenvm_lightning.training.layout_check import check_layout


@pytest.mark.parametrize(
    ("config", "layout", "reason"),
    [
        (
            MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2),
            "packed",
            "hand a state from token to token",
        ),
        (
            MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2),
            "shared",
            "hand a state from token to token",
        ),
        (BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4), "packed", "takes no positions"),
        (
            OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, pad_token_id=0),
            "packed",
            "logits of a few rows differ",
        ),
    ],
    ids=["mamba-packed", "mamba-shared", "bloom", "opt"],
)
def test_models_that_cannot_are_refused(config, layout, reason):
    model = small(config, "eager")
    batches = [Collator(0, None, kind)(random_rows()) for kind in ("rows", layout)]
    with pytest.raises(
        RecipeError, match=f"data.layout: {layout} cannot be used with .*{reason}.* Set data.layout: rows"
    ):
        check_layout(model, *batches)


def test_without_any_way_it_is_said_what_to_change(laid_out):
    model, batches = laid_out("text")
    config = model.backbone.config
    try:
        model.recompute_activations()
        config._attn_implementation_internal = "flash_attention_2"
        with pytest.raises(RecipeError, match=r"gradient_checkpointing drops the cache, and a tree needs .*flash"):
            check_layout(model, batches["rows"], batches["shared"])
    finally:
        config._attn_implementation_internal = "sdpa"
        model.backbone.gradient_checkpointing_disable()


def test_values_in_float32_and_bfloat16_pass_the_check():
    for dtype in (torch.float32, torch.bfloat16):
        model = LengthValueModel.from_pretrained("tiny-text-lenvm", dtype=dtype)
        for layout in ("shared", "packed"):
            check_layout(model, *(Collator(0, None, kind)(random_rows()) for kind in ("rows", layout)))
