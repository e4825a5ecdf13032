"""The stage `fit`: settings that cannot be, what is trained, what is kept when it ends."""

import io
import json
import sys
from functools import partial

import lightning as L
import pytest
import transformers
from coded import with_code
from ranks import fit_of
from short_runs import SHORT
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from lenvm_lightning import LengthValueModel
from lenvm_lightning.cli.main import main
from lenvm_lightning.errors import RecipeError
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.pipeline.fit_stage import LastValidation, parse_fit
from lenvm_lightning.pipeline.run_folder import RunFolder
from lenvm_lightning.tinyworld import quality
from lenvm_lightning.training.fsdp import FullySharded


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("class_path: lenvm_lightning.TextLenVM", "the following arguments are required: backbone"),
        ("class_path: torch.nn.Identity", "Identity does not correspond to a subclass of LightningModule"),
    ],
)
def test_what_only_the_whole_shows(here, capsys, model, words):
    (here / "r.yaml").write_text(f"fit:\n  model: {{{model}}}\n  data: {{class_path: datamodules.TextRollouts}}\n")
    assert main(["run", "r.yaml"]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "words"),
    [(("limit_val_batches", "0"), "not validated"), (("logger", "false"), "validation loss")],
)
def test_what_is_left_out_costs_no_model(here, capsys, text_rollouts, setting, words):
    command = ["run", "text_lenvm", *SHORT, "--fit.data.files", str(text_rollouts)]
    assert main([*command, f"--fit.trainer.{setting[0]}", setting[1]]) == 0
    assert words in capsys.readouterr().out
    assert LengthValueModel.from_pretrained(here / "runs" / "text_lenvm" / "model").gamma == 0.99
    assert main([*command, f"--fit.trainer.{setting[0]}", setting[1]]) == 0
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(("key", "value"), [("strategy", "nix"), ("accelerator", "hpu"), ("max_time", "soon")])
def test_trainers_that_cannot_be_built(here, capsys, text_rollouts, key, value):
    assert main(["run", "text_lenvm", "--fit.data.files", str(text_rollouts), f"--fit.trainer.{key}", value]) == 2
    assert "RecipeError: the Trainer cannot be built from the settings in fit.trainer" in capsys.readouterr().err


def test_contradictions_are_named_before_anything_starts(here, capsys):
    settings = {"target": "length", "kind": "bce", "lam": "0.5"}
    words = [word for name, value in settings.items() for word in (f"--fit.model.loss.{name}", value)]
    assert main(["run", "text_lenvm", *words]) == 2
    err = capsys.readouterr().err
    assert "bce" in err
    assert "lam 0.5" in err
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
        (
            "model",
            {"gamma": "1", "loss.lam": "2", "optimizer.lr": "-1", "optimizer.warmup_steps": "-3",
             "optimizer.weight_decay": "-.1", "head_dropout": "1", "optimizer.betas": "[.9, 1]",
             "backbone.keep_layers": "0"},
        ),
        (
            "data",
            {"max_length": "1", "batch_tokens": "0", "max_pixels": "0", "num_workers": "-1", "num_proc": "0",
             "val_completions": "0", "val_share": "5", "max_bad_share": "-1", "completions_per_batch": "0",
             "train_prompts": "0", "train_completions": "0"},
        ),
        ("data", {"max_prompt_length": "4096"}),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named_before_anything_starts(here, capsys, section, wrong):
    words = [word for name, value in wrong.items() for word in (f"--fit.{section}.{name}", value)]
    assert main(["run", "text_lenvm", "--fit.data.max_length", "4096", *words]) == 2
    err = capsys.readouterr().err
    assert all(f"\n  {name} " in err for name in wrong), err
    assert not (here / "runs").exists()


def test_a_value_model_may_be_shallower_than_its_generator(here, text_rollouts, capsys):
    command = ["run", "text_lenvm", *SHORT, "--fit.data.files", str(text_rollouts), "--fit.data.batch_tokens", "1024"]
    command += [
        "--fit.data.train_prompts",
        "5",
        "--fit.data.train_completions",
        "1",
        "--fit.model.backbone.keep_layers",
    ]
    command += ["2"]
    assert main([*command, "--fit.model.backbone.pretrained", "false"]) == 2
    assert "with pretrained: false set the layers in overrides" in capsys.readouterr().err
    assert main([*command, "--fit.model.backbone.pretrained", "true"]) == 0
    results = json.loads((here / "runs" / "text_lenvm" / "results.json").read_text())
    assert (results["train_prompts"], results["train_completions"]) == (5, 5)
    model = LengthValueModel.from_pretrained(here / "runs" / "text_lenvm" / "model")
    assert len(model.backbone.layers) == model.backbone.config.num_hidden_layers == 2
    assert results["parameters"] == sum(p.numel() for p in model.parameters())


def test_bad_rows_stop_the_run_with_file_and_line(here, capsys):
    (here / "bad.jsonl").write_text(
        '{"messages": [}\n{"messages": [{"role": "user", "content": "a"}], "completion": ""}\n'
    )
    assert main(["run", "text_lenvm", "--fit.data.files", "bad.jsonl"]) == 2
    err = capsys.readouterr().err
    assert "bad.jsonl:1: it is not JSON" in err
    assert "bad.jsonl:2: empty completion" in err


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_a_generator_is_trained_and_can_be_loaded(kind, here, capsys, monkeypatch):
    monkeypatch.setattr(quality, "measure", partial(quality.measure, n=2, max_tokens=32))  # it knows nothing yet
    name, prompts = {"text": ("tiny-text", "tiny-math"), "vision": ("tiny-vl", "tiny-vqa")}[kind]
    (here / "r.yaml").write_text(
        f"fit:\n"
        f"  model:\n"
        f"    class_path: lenvm_lightning.tinyworld.language_model.TinyLanguageModel\n"
        f"    init_args: {{name: {name}, judged_prompts: 1}}\n"
        f"  data:\n    class_path: lenvm_lightning.tinyworld.datamodule.TinyCorpus\n"
        f"    init_args: {{kind: {kind}, documents: 24,"
        f" val_documents: 6, batch_tokens: 2048}}\n"
        f"  trainer: {{max_epochs: 1}}\n"
    )
    assert main(["run", "r.yaml"]) == 0
    out = capsys.readouterr().out
    assert "validation loss" in out
    assert "tiny world" in out
    assert f"| {prompts} | trained | " in out
    assert f"| {prompts} | shipped | " in out
    assert f"lenvm sample --generator runs/r/model --prompts {prompts}" in out
    auto = AutoModelForImageTextToText if kind == "vision" else AutoModelForCausalLM
    model = auto.from_pretrained(here / "runs" / "r" / "model")
    tokenizer = getattr(load_processor(here / "runs" / "r" / "model"), "tokenizer", None)
    assert (tokenizer is not None) == (kind == "vision")
    assert (
        sum(p.numel() for p in model.parameters())
        == json.loads((here / "runs" / "r" / "results.json").read_text())["parameters"]
    )
    assert main(["run", "r.yaml"]) == 0
    assert "is complete for these settings" in capsys.readouterr().out


def test_the_last_validation_counts_and_is_not_repeated(here, text_rollouts, monkeypatch):
    command = ["run", "text_lenvm", "--fit.trainer.max_epochs", "2", "--fit.trainer.limit_train_batches", "2"]
    command += ["--fit.data.files", str(text_rollouts), "--fit.data.batch_tokens", "1024"]

    def metrics(name):
        assert main([*command, "--name", name]) == 0
        return json.loads((here / "runs" / name / "results.json").read_text())["metrics"]

    with monkeypatch.context() as patch:
        patch.setattr(L.Trainer, "validate", None)  # would be an error to call
        once = metrics("once")
    with monkeypatch.context() as patch:
        patch.setattr(LastValidation, "on_validation_end", lambda *_: None)
        twice = metrics("twice")
    assert once == twice


@pytest.mark.parametrize(
    "strategy",
    [
        "fsdp",
        {
            "class_path": "lenvm_lightning.training.fsdp.FullySharded",
            "init_args": {"save_distributed_checkpoint": False},
        },
    ],
)
def test_strategy_of_a_recipe(tmp_path, strategy):
    trainer = parse_fit(fit_of(strategy), "here").build_trainer(RunFolder(tmp_path), None)
    assert isinstance(trainer.strategy, FullySharded)
    assert trainer.strategy._save_distributed_checkpoint == (strategy == "fsdp")


def test_generators_are_not_shared_out(tmp_path):
    kind = "lenvm_lightning.tinyworld.language_model.TinyLanguageModel"
    cli = parse_fit(fit_of("fsdp", kind, "lenvm_lightning.tinyworld.datamodule.TinyCorpus"), "here")
    with pytest.raises(RecipeError, match="TinyLanguageModel cannot be sharded"):
        cli.build_trainer(RunFolder(tmp_path), None)


def test_code_of_a_backbone_and_of_its_tokenizer_run_only_where_a_recipe_says_so(
    here, capsys, text_rollouts, monkeypatch
):
    """Neither a look at a recipe nor its plan runs any; transformers would ask at the terminal."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(here / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    base = with_code(here / "base", here / "ran")
    words = ["text_lenvm", "--fit.data.files", str(text_rollouts), "--fit.model.backbone", str(base)]
    for command in (["run", *words, "--check"], ["plan", *words]):
        assert main(command) == 2
        assert "of its own: look at that code" in capsys.readouterr().err
    assert sys.stdin.tell() == 0
    assert not (here / "ran").exists()
    assert main(["run", *words, "--check", "--fit.model.backbone.trust_remote_code", "true"]) == 0
    assert (here / "ran").exists()


def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(here, text_rollouts, capsys, caplog):
    command = [
        "run",
        "text_lenvm",
        *SHORT,
        "--fit.data.files",
        str(text_rollouts),
        "--fit.checkpoint.every_n_steps",
        "1",
    ]
    command += ["--fit.model.backbone.pretrained", "false", "--fit.data.batch_tokens", "2048"]
    command += ["--fit.model.backbone.overrides", "{num_hidden_layers: 1, hidden_size: 32, intermediate_size: 32}"]
    assert main(command) == 0
    run = RunFolder(here / "runs" / "text_lenvm")
    older, newest = sorted(run.checkpoints.iterdir())
    weights = (run.model / "model.safetensors").read_bytes()
    run.results.unlink()  # as if it had been killed
    newest.write_bytes(newest.read_bytes()[:1000])
    assert main(command) == 0
    err = capsys.readouterr().err
    assert f"{newest.relative_to(here)} is damaged: it is not whole" in err
    assert f"left alone, {older.name} is used instead" in err
    assert "going on from step 2" in caplog.text
    assert (run.model / "model.safetensors").read_bytes() == weights
    run.results.unlink()
    assert main(command) == 0  # what was damaged has been written again
    assert "going on from step 3" in caplog.text
    run.results.unlink()
    for path in run.checkpoints.iterdir():
        path.write_bytes(b"")
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "holds no checkpoint that is whole" in err
    assert "train again with --fresh" in err
