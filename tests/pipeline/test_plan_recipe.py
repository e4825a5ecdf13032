"""`lenvm plan` of recipes: of real configurations, for people, and what cannot be planned."""

import json

import pytest
from places import CONFIGS

from lenvm_lightning.cli.main import main
from lenvm_lightning.planning.memory_kinds import LANGUAGE


def test_numbers_that_cannot_be(capsys):
    assert main(["plan", "text_lenvm", "--row-tokens", "-5", "--tflops", "0"]) == 2
    assert "--row-tokens must be above 0, got -5; --tflops must be above 0, got 0.0" in capsys.readouterr().err


def test_command_on_a_real_config(capsys):
    """No weights and no rollouts are there; two of the layers are enough to see that all settings count."""
    folder = str(CONFIGS / "qwen2.5-1.5b-instruct")
    words = ["plan", "qwen2.5-1.5b", "--fit.model.backbone", folder, "--fit.model.backbone.keep_layers", "2", "--json"]
    assert main([*words, "--tflops", "100", "--tokens", "1e9"]) == 0
    found = json.loads(capsys.readouterr().out)
    layer = 1536 * (1536 + 2 * 256 + 1536) + (1536 + 2 * 256) + 3 * 1536 * 8960 + 2 * 1536
    assert found["parameters"][LANGUAGE] == {"trained": 2 * layer + 1536, "frozen": 0}
    assert found["parameters"]["embeddings"]["trained"] == 151_936 * 1536
    [batch] = found["batches"]
    assert batch["batch"]["rows"] == 32_768 // 3000
    assert batch["tokens_per_optimizer_step"] == 10 * 3000 * 32
    assert batch["recomputed_tflop"] > 0
    assert batch["training_h"] == pytest.approx(batch["optimizer_step_s"] * 1e9 / 960_000 / 3600)


def test_command_for_people(capsys):
    words = "--fit.trainer.devices 2 --fit.model.backbone.keep_layers 1"
    words += " --fit.data.layout shared --fit.data.completions_per_batch 4"
    assert main(["plan", "vlm_lenvm", *words.split()]) == 0
    text = capsys.readouterr().out
    for words in (
        "2 devices",
        "vision tower",
        "communication buckets",
        "most images",
        "image tokens",
        "Not counted",
        "layout: shared",
    ):
        assert words in text
    assert "51 x 80 tokens" in text  # 16 image tokens of the largest image that the processor leaves, and 64 beside


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lifebench"], "no fit stage"),
        (["tiny_text"], "TinyLanguageModel"),
        (["text_lenvm", "--fit.model.backbone", "/nowhere/at/all"], "config.json"),
        (["text_lenvm", "--fit.trainer.precision", "transformer-engine"], "cannot be planned"),
        (["text_lenvm", "--fit.model.rank", "3"], "rank"),
        (["vlm_lenvm", "--fit.model.backbone", "tiny-text"], "reads text only"),
    ],
)
def test_command_says_what_is_wrong(words, said, capsys):
    assert main(["plan", *words]) == 2
    assert said in capsys.readouterr().err


def test_plans_refuse_what_training_refuses(capsys):
    assert main(["plan", "vlm_qlora", "--fit.trainer.devices", "2", "--fit.trainer.strategy", "fsdp"]) == 2
    assert "quantised weights cannot be sharded over ranks" in capsys.readouterr().err
