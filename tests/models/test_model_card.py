"""Model cards: what the hub reads in their front matter, and people below it."""

import math

import pytest
from huggingface_hub import ModelCard

from lenvm_lightning import LenVMConfig, tinyworld
from lenvm_lightning.errors import CheckpointError
from lenvm_lightning.models.model_card import model_card, stored_card

METRICS = {
    "mae_tokens/start": 12.5, "mae_tokens/all": 8.25, "mae_tokens_constant/start": 20.0, "mre": 0.125, "loss": 0.01,
    "mae_tokens/75": math.nan,
}  # fmt: skip


def test_metrics_stand_in_the_model_index_with_the_data_they_are_of():
    facts = {"generators": {"Qwen/Qwen2.5-3B-Instruct": 90, "other": 10}}
    card = model_card(LenVMConfig(gamma=0.99, backbone="Qwen/Qwen2.5-0.5B", rollouts=facts), metrics=METRICS)
    data = ModelCard(str(card)).data.to_dict()
    assert data["library_name"] == "lenvm-lightning"
    assert data["base_model"] == "Qwen/Qwen2.5-0.5B"
    assert data["tags"] == ["length-value-model"]
    assert "license" not in data  # its base does not say here
    (model,) = data["model-index"]
    assert model["name"] == "Length value model on Qwen/Qwen2.5-0.5B"
    (result,) = model["results"]
    assert result["dataset"]["name"] == "held-out completions of Qwen/Qwen2.5-3B-Instruct, other"
    found = {metric["name"]: (metric["type"], metric["value"]) for metric in result["metrics"]}
    assert found == {
        "MAE in tokens, all positions": ("mae", 8.25),
        "MAE in tokens, prompt boundary": ("mae", 12.5),
        "MRE, prompt boundary": ("mre", 0.125),
    }


def test_the_tiny_world_is_named_to_machines_and_people():
    facts = {"generators": {"tinyworld-script": 10}}
    card = model_card(LenVMConfig(gamma=0.99, backbone="tiny-text", rollouts=facts), metrics=METRICS, details="## More")
    data = card.data.to_dict()
    assert data["tags"] == ["length-value-model", "tiny-world"]
    assert data["license"] == "apache-2.0"
    assert "base_model" not in data  # there is no such repository
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"]["name"] == f"held-out completions of tinyworld-script ({tinyworld.NOTICE})"
    assert f"> {tinyworld.NOTICE}\n\nPredicts" in card.text
    assert card.text.endswith("\n\n## More\n")


def test_a_license_is_that_of_the_backbone_unless_it_is_given(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\nA base.\n", encoding="utf-8")
    config = LenVMConfig(gamma=0.99, backbone=str(tmp_path))
    assert model_card(config).data.to_dict()["license"] == "mit"
    assert model_card(config, license="gemma").data.to_dict()["license"] == "gemma"
    assert "base_model" not in model_card(config).data.to_dict()
    assert "license" not in model_card(LenVMConfig(gamma=0.99)).data.to_dict()


def test_without_metrics_there_is_no_model_index():
    assert "model-index" not in model_card(LenVMConfig(gamma=0.99)).data.to_dict()


@pytest.mark.parametrize(
    "front_matter",
    ["license: [mit", "a: &a {b: *a}", "- license", "x: &a [1]\ny: !!timestamp z", "1: 2\nmodel-index: 3"],
)
def test_front_matter_that_cannot_be_read_costs_no_more_than_the_license(tmp_path, front_matter, capsys):
    (tmp_path / "README.md").write_text(f"---\n{front_matter}\n---\n\nA base.\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"the front matter of .*README\.md cannot be read: .*Correct or delete"):
        stored_card(tmp_path)
    card = model_card(LenVMConfig(gamma=0.99, backbone=str(tmp_path)))  # at the end of a training
    assert "license" not in card.data.to_dict()
    if "model-index" not in front_matter:  # for the license alone that is good enough
        assert "note: no licence is known, the front matter of" in capsys.readouterr().err


def test_a_card_says_what_a_model_of_segments_counts_to():
    whole, segment = (str(model_card(LenVMConfig(gamma=0.9, until=until))) for until in (None, "\n\n"))
    assert "of the completion are still to come (EOS included)" in whole
    assert "to the one that completes `\\n\\n`, not to the end" in segment
