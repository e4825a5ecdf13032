"""The stage `sample`, with a small real model: sampled, trained on, skipped, mistaken."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from small_generator import COMMAND, SAMPLE, lay_out, recipe, records, save_small
from transformers import AutoConfig, AutoModelForImageTextToText

from lenvm_lightning import tinyworld
from lenvm_lightning.cli.main import main
from lenvm_lightning.errors import RecipeError
from lenvm_lightning.pipeline.sample_stage import read_settings, settled
from lenvm_lightning.tinyworld.prompt_sets import prompt_set

FIT = {
    "model": {
        "class_path": "lenvm_lightning.TextLenVM",
        "init_args": {
            "backbone": {
                "source": "tiny-text", "pretrained": False,
                "overrides": {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32},
            },
            "gamma": 0.9,
            "optimizer": {"lr": 1e-3},
        },
    },
    "data": {"class_path": "datamodules.TextRollouts", "init_args": {"batch_tokens": 1024, "val_share": 0.3}},
    "trainer": {"max_epochs": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_small(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def here(here, model):
    lay_out(here, model)
    return here


def test_recipe_samples_trains_and_skips(here, capsys):
    command = ["run", recipe(here, sample=SAMPLE, fit=FIT)]
    assert main([*command, "--check"]) == 0
    out = capsys.readouterr().out
    assert "sample: 3 completions of each of 6 prompts by small, 18 in all, at most 12 tokens each, into runs/" in out
    assert "ready to sample" in out
    assert not (here / "runs").exists()

    assert main(command) == 0
    out = capsys.readouterr().out
    assert "18 completions of 6 prompts by" in out
    assert "prompt boundary" in out
    (file,) = (here / "runs" / "rollouts").glob("small-*/rollouts.jsonl")
    resolved = yaml.safe_load((here / "runs" / "r" / "recipe.yaml").read_text())
    assert list(resolved) == ["sample", "fit"]
    assert resolved["sample"]["out"] == str(file.parent.relative_to(here))
    assert resolved["sample"]["temperature"] == 1.0
    assert resolved["fit"]["data"]["init_args"]["files"] == str(file.relative_to(here))
    results = json.loads((here / "runs" / "r" / "results.json").read_text())
    assert results["train_completions"] + results["held_out_completions"] == 18
    written = file.stat().st_mtime_ns

    assert main(command) == 0  # complete: nothing is loaded, nothing is said about sampling
    assert "is complete for these settings (--fresh trains again)" in capsys.readouterr().out
    assert main([*command, "--check"]) == 0
    assert "(complete)" in capsys.readouterr().out

    # Other settings of the fit: another run, the same completions.
    assert main([*command, "--fit.model.optimizer.lr", "0.01"]) == 0
    assert "is complete for these settings." in capsys.readouterr().err
    assert (here / "runs" / "r-2" / "results.json").exists()
    assert len(list((here / "runs" / "rollouts").iterdir())) == 1
    assert file.stat().st_mtime_ns == written

    # Other settings of the sampling: other completions, another run.
    assert main([*command, "--sample.n", "2"]) == 0
    assert len(list((here / "runs" / "rollouts").iterdir())) == 2
    assert yaml.safe_load((here / "runs" / "r-3" / "recipe.yaml").read_text())["sample"]["n"] == 2

    # Whether it was sampled just now or before does not change what is learned.
    assert main([*command, "--name", "again"]) == 0
    assert json.loads((here / "runs" / "again" / "results.json").read_text()) == results
    assert file.stat().st_mtime_ns == written

    # The resolved recipe is one.
    assert main(["run", "runs/r/recipe.yaml", "--check"]) == 0


def test_images_go_all_the_way(here, capsys):
    shutil.copytree(tinyworld.path("tiny-vl"), here / "seeing", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained("seeing")).save_pretrained("seeing")
    fit = {
        "model": {
            "class_path": "lenvm_lightning.VisionLenVM",
            "init_args": {
                "backbone": {"source": "tiny-vl", "pretrained": False, "freeze_vision": False},
                "gamma": 0.9,
            },
        },
        "data": {"class_path": "datamodules.VisionRollouts", "init_args": {"batch_tokens": 1024, "val_share": 0.3}},
        "trainer": {"max_epochs": 1},
    }
    sample = {"generator": "seeing", "prompts": "tiny-vqa", "limit": 8, "n": 2, "max_tokens": 6, "out": "seen"}
    assert main(["run", recipe(here, sample=sample, fit=fit), "--fit.trainer.limit_train_batches", "1"]) == 0
    found = records(here / "seen" / "rollouts.jsonl")
    assert len(found) == 16
    assert len(list((here / "seen" / "images").glob("*.png"))) == 8
    drawn = {prompt.prompt_id: prompt.images[0] for prompt in prompt_set("tiny-vqa", count=8)}
    for record in found:
        (path,) = record["images"]
        with Image.open(here / "seen" / path) as image:
            assert image.tobytes() == drawn[record["prompt_id"]].tobytes()
    results = json.loads((here / "runs" / "r" / "results.json").read_text())
    assert results["train_completions"] + results["held_out_completions"] == 16


def test_other_rollouts_leave_the_stage_out(here, capsys, text_rollouts):
    command = ["run", recipe(here, sample=SAMPLE, fit=FIT), "--fit.data.files", str(text_rollouts), "--check"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert f"sample: left out, --fit.data.files {text_rollouts} names other rollouts" in err
    assert "ready to train on" in out


def test_files_of_the_recipe_stay(here, capsys, text_rollouts):
    fit = {**FIT, "data": {**FIT["data"], "init_args": {"files": [str(text_rollouts), "mine/rollouts.jsonl"]}}}
    assert main(["run", recipe(here, sample={**SAMPLE, "out": "mine"}, fit=fit), "--name", "both"]) == 0
    resolved = yaml.safe_load((here / "runs" / "both" / "recipe.yaml").read_text())
    assert resolved["fit"]["data"]["init_args"]["files"] == [str(text_rollouts), "mine/rollouts.jsonl"]
    results = json.loads((here / "runs" / "both" / "results.json").read_text())
    assert results["train_completions"] + results["held_out_completions"] == 18 + 40


def test_a_recipe_may_only_sample(here, capsys):
    command = ["run", recipe(here, sample={**SAMPLE, "out": "here"})]
    assert main([*command, "--check"]) == 0
    assert "into here" in capsys.readouterr().out
    assert main(command) == 0
    assert len(records(here / "here" / "rollouts.jsonl")) == 18
    assert not (here / "runs").exists()


def test_what_fails_for_good_shows_in_the_status(here, capsys):
    with (here / "q.jsonl").open("a") as file:
        file.write(json.dumps({"prompt_id": "long", "messages": [{"role": "user", "content": "1 + " * 5000}]}) + "\n")
    assert main(["run", recipe(here, sample=SAMPLE, fit=FIT)]) == 3
    out, err = capsys.readouterr()
    assert "3 completions failed, all listed in runs/rollouts/small-" in err
    assert "such as completion 0 of prompt 'q/long'" in err
    assert "prompt boundary" in out  # trained on the others
    assert main(COMMAND) == 3
    assert len(records(here / "out" / "failures.jsonl")) == 3


def test_where_images_may_lie_does_not_decide_the_folder():
    given = {"generator": "tiny-vl", "prompts": "p.jsonl"}
    plain, allowed = (read_settings(one, "this") for one in (given, {**given, "allow_images_from": ["/data"]}))
    assert settled(plain, Path("runs")).out == settled(allowed, Path("runs")).out
    assert "allow_images_from" not in plain.as_dict()
    assert allowed.as_dict()["allow_images_from"] == ["/data"]
    with pytest.raises(RecipeError, match=r"allow_images_from must be a folder or a list of folders, found \[3\]"):
        read_settings({**given, "allow_images_from": [3]}, "this")


def test_all_mistakes_of_a_sample_section_at_once(here, capsys):
    (here / "r.yaml").write_text(
        "sample:\n"
        "  generatr: tiny-text\n"
        "  n: many\n"
        "  temperature: -1\n"
        "  top_p: 2.0\n"
        "  limit: 0\n"
        "fit:\n"
        "  model: {class_path: lenvm_lightning.TextLenVM}\n"
        "  data: {class_path: datamodules.TextRollouts}\n"
    )
    assert main(["run", "r.yaml", "--sample.max_token", "3", "--sample.seed", "x"]) == 2
    err = capsys.readouterr().err
    for words in (
        "r.yaml:2: 'generatr' is no setting of sample; did you mean 'generator'?",
        "r.yaml:3: n must be a whole number of at least 1, found 'many'",
        "r.yaml:4: temperature must be a number of at least 0, found -1",
        "r.yaml:5: top_p must be above 0 and at most 1, found 2.0",
        "r.yaml:6: limit must be a whole number of at least 1, found 0",
        "--sample.max_token: 'max_token' is no setting of sample; did you mean 'max_tokens'?",
        "--sample.seed: seed must be a whole number, found 'x'",
    ):
        assert words in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sample:\n", ["generator is missing", "prompts is missing"]),
        ("sample: [1]\n", ["r.yaml:1: sample: expected settings, found [1]"]),
        ("sample: {generator: small, prompts: []}\n", ["prompts must be a name, a file, {source: ...}"]),
        ("{}\n", ["has no stage; there are sample, fit"]),
    ],
)
def test_sections_that_cannot_be(here, capsys, text, words):
    (here / "r.yaml").write_text(text)
    assert main(["run", "r.yaml"]) == 2
    err = capsys.readouterr().err
    assert all(part in err for part in words), err


def test_help_of_a_recipe_lists_the_settings_of_both_stages(here, capsys):
    assert main(["run", recipe(here, sample=SAMPLE, fit=FIT), "--sample.help"]) == 0
    out = capsys.readouterr().out
    assert re.search("max_tokens +tokens after which a completion is truncated", out)
    assert "--trainer.max_epochs" in out
