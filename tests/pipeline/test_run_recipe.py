"""`lightning run` as people type it: shipped recipes end to end, overrides, mistakes, where runs go."""

import errno
import json
import shutil
from functools import partial
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from lenvm_lightning import LengthValueModel
from lenvm_lightning.cli.main import main, split_overrides
from lenvm_lightning.errors import StoreError
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.pipeline.fit_stage import LastValidation
from lenvm_lightning.pipeline.run_folder import RunFolder, choose_folder, claimed_folder
from lenvm_lightning.tinyworld import quality

SHORT = ["--fit.trainer.max_steps", "3", "--fit.trainer.max_epochs", "1", "--fit.data.val_completions", "12"]
SHORT += ["--fit.trainer.log_every_n_steps", "1"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["text", "vlm"])
def test_shipped_recipe_trains_reports_and_is_skipped(kind, here, request, capsys):
    file = request.getfixturevalue("text_rollouts" if kind == "text" else "vision_rollouts")
    command = ["run", f"{kind}_lenvm", *SHORT, "--fit.data.files", str(file), "--fit.data.batch_tokens", "1024"]
    assert main(command) == 0
    out = capsys.readouterr().out
    for words in ("prompt boundary", "75% written", "best constant", "tensorboard --logdir runs"):
        assert words in out
    run = here / "runs" / f"{kind}_lenvm"
    model = LengthValueModel.from_pretrained(run / "model")
    assert model.gamma == 0.99
    assert model.config.rollouts["generators"]
    assert "library_name: lenvm-lightning" in (run / "model" / "README.md").read_text()
    assert json.loads((run / "results.json").read_text())["metrics"]["mae_tokens/start"] > 0
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    wanted = {"train/loss", "train/tokens_per_s", "train/padding_share", "val/loss", "val/mre", "val/mre_constant",
              "val/mae_tokens/50", "val/mae_tokens_constant/50", "val/relative_error/all"}  # fmt: skip
    assert not wanted - set(events.Tags()["scalars"])
    assert any(tag.startswith("lr-") for tag in events.Tags()["scalars"])
    assert events.Tags()["images"] == ["val/remaining"]

    assert main(command) == 0
    assert "is complete for these settings" in capsys.readouterr().out
    assert main([*command, "--fit.model.optimizer.lr", "0.1", "--name", f"{kind}_lenvm"]) == 2
    assert "fit.model.init_args.optimizer.lr: 0.001 -> 0.1" in capsys.readouterr().err


def test_check_trains_nothing(here, text_rollouts, capsys):
    assert main(["run", "text_lenvm", "--check", "--fit.data.files", str(text_rollouts)]) == 0
    assert "ready to train on" in capsys.readouterr().out
    assert not (here / "runs").exists()


@pytest.mark.parametrize("full", ["the folder", "a checkpoint"])
def test_a_disk_that_fills_while_training(here, capsys, text_rollouts, monkeypatch, full):
    def write(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device", "some/file")

    command = [
        "run",
        "text_lenvm",
        *SHORT,
        "--fit.data.files",
        str(text_rollouts),
        "--fit.checkpoint.every_n_steps",
        "1",
    ]
    with monkeypatch.context() as patch:
        if full == "the folder":
            patch.setattr("lenvm_lightning.pipeline.run_folder.write_whole", write)
        else:
            patch.setattr(L.Trainer, "save_checkpoint", write)
        assert main(command) == 2
    assert (
        "StoreError: some/file cannot be written: No space left on device. What is done stays"
        in capsys.readouterr().err
    )
    assert main(command) == 0


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
    assert "bad.jsonl:1: broken JSON" in err
    assert "bad.jsonl:2: empty completion" in err


def test_unknown_recipe_lists_the_shipped_ones(here, capsys):
    assert main(["run", "vlm_lenv"]) == 2
    err = capsys.readouterr().err
    assert "did you mean 'vlm_lenvm'?" in err
    assert "qwen2.5-1.5b" in err


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


def test_other_settings_go_to_another_folder(tmp_path):
    one, two = {"fit": {"lr": 1}}, {"fit": {"lr": 2}}
    first = choose_folder(tmp_path, "r", None, one, False)
    first.start(one, "# header\n")
    second = choose_folder(tmp_path, "r", None, two, False)
    second.start(two, "")
    assert (first.path.name, second.path.name) == ("r", "r-2")
    assert choose_folder(tmp_path, "r", None, one, False).path == first.path
    assert choose_folder(tmp_path, "r", None, two, False).path == second.path


def test_a_claimed_folder_is_locked_and_begun(tmp_path):
    one, two = {"fit": {"lr": 1}}, {"fit": {"lr": 2}}
    with claimed_folder(tmp_path, "r", None, one, False, "") as first:
        assert first.settings() == one
        with (
            pytest.raises(StoreError, match=r"r is in use by process \d+ on .* Wait until it ends"),
            claimed_folder(tmp_path, "r", None, one, False, ""),
        ):
            pass
        with (
            pytest.raises(StoreError, match="in use"),  # --fresh does not delete what another process works on
            claimed_folder(tmp_path, "r", "r", two, True, ""),
        ):
            pass
        with claimed_folder(tmp_path, "r", None, two, False, "") as second:
            assert second.path.name == "r-2"
        (first.path / "checkpoints").mkdir()
    with claimed_folder(tmp_path, "r", "r", two, True, "") as fresh:
        assert fresh.settings() == two
        assert not fresh.checkpoints.exists()
    assert not list(tmp_path.glob("*/.lock"))


def test_killed_while_a_run_is_deleted(tmp_path, monkeypatch):
    """At no moment is it taken for complete, nor do its checkpoints belong to nobody."""
    run = RunFolder(tmp_path / "r")
    run.start({"fit": {"lr": 1}}, "")
    run.finish({})
    for folder in (run.checkpoints, run.model):
        folder.mkdir()
        (folder / "file").write_text("")
    seen = []

    def look(call):
        def looked(path, *rest, **options):
            seen.append((run.complete, run.model.exists(), run.settings() is None, run.checkpoints.exists()))
            return call(path, *rest, **options)

        return looked

    monkeypatch.setattr(shutil, "rmtree", look(shutil.rmtree))
    monkeypatch.setattr(Path, "unlink", look(Path.unlink))
    run.clear()
    seen.append((run.complete, run.model.exists(), run.settings() is None, run.checkpoints.exists()))
    assert len(seen) == 5
    assert not any(complete and not model for complete, model, _, _ in seen)
    assert not any(nameless and checkpoints for _, _, nameless, checkpoints in seen)


def test_other_processes_of_a_distributed_run_do_not_lock(tmp_path, monkeypatch):
    settings = {"fit": {"lr": 1}}
    with claimed_folder(tmp_path, "r", None, settings, False, ""):
        monkeypatch.setattr(rank_zero_only, "rank", 1)
        with claimed_folder(tmp_path, "r", None, settings, True, "") as same:
            assert same.settings() == settings
        monkeypatch.setattr(rank_zero_only, "rank", 0)
        monkeypatch.setenv("NODE_RANK", "1")
        with claimed_folder(tmp_path, "r", None, settings, False, "") as same:
            assert same.path.name == "r"


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


def test_overrides_are_taken_out_of_the_line():
    rest, overrides = split_overrides(
        ["run", "x", "--fit.a.b", "1", "--sample.n=3", "--fit.c=d=e", "--check", "--fit.z"]
    )
    assert rest == ["run", "x", "--check"]
    assert overrides == [("fit.a.b", "1"), ("sample.n", "3"), ("fit.c", "d=e"), ("fit.z", None)]


def test_help_at_every_level(capsys):
    for command, words in ((["--help"], "COMMAND"), (["run", "--help"], "examples:")):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 0
        assert words in capsys.readouterr().out
    assert main(["run", "text_lenvm", "--fit.help"]) == 0
    out = capsys.readouterr().out
    for words in (
        "--trainer.max_epochs", "batch_tokens", "--checkpoint.every_n_steps", "--model.backbone.freeze_vision",
        "leave vision tower and projector as they are", "--model.optimizer.lr", "peak learning rate",
        "--model.loss.target", "--model.lora.rank",
    ):  # fmt: skip
        assert words in out
