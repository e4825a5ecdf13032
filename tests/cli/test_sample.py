"""`lenvm sample` and the sample stage of a recipe, with a small real model: end to end, stopped, mistaken, skipped."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from places import HELPERS
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from lenvm_lightning import tinyworld
from lenvm_lightning.cli.main import main
from lenvm_lightning.rollouts.record import parse_record
from lenvm_lightning.rollouts.store import RolloutStore
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
    """The shape of tiny-text with random weights, but that an end comes once in about ten tokens."""
    folder = tmp_path_factory.mktemp("models") / "small"
    shutil.copytree(tinyworld.path("tiny-text"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # the first column of the hidden states is the same everywhere: the head has a bias there
        model.get_input_embeddings().weight[:, 0] = 3.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[config.eos_token_id, 0] = 0.35
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").symlink_to(model)
    questions = [
        {"prompt_id": f"q{i}", "messages": [{"role": "user", "content": f"{i} + {i} ="}], "meta": {"answer": 2 * i}}
        for i in range(6)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return tmp_path


SAMPLE = {"generator": "small", "prompts": "q.jsonl", "n": 3, "max_tokens": 12}
COMMAND = ["sample", "--generator", "small", "--prompts", "q.jsonl", "-n", "3", "--max-tokens", "12", "--out", "out"]


def recipe(folder: Path, **stages) -> str:
    (folder / "r.yaml").write_text(yaml.safe_dump(stages, sort_keys=False))
    return "r.yaml"


def records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.open()]


# -- lenvm sample -----------------------------------------------------------------------------------------------------


def test_sample_from_end_to_end(here, model, capsys, monkeypatch):
    assert main(COMMAND) == 0
    out, err = capsys.readouterr()
    assert "18 completions of 6 prompts by" in out
    assert "gamma suggested" in out
    assert "rollouts: out/rollouts.jsonl" in out
    found = records(here / "out" / "rollouts.jsonl")
    assert [(r["prompt_id"], r["number"]) for r in found] == [(f"q/q{i}", k) for i in range(6) for k in range(3)]
    assert len({tuple(r["token_ids"]) for r in found}) > 12
    for record in found:
        (rollout,), notes = parse_record(record, here / "out")
        assert notes == []
        assert 1 <= len(rollout.token_ids) <= 12
        assert rollout.censored == (record["finish_reason"] == "length")
        assert record["logprob"] < 0
        assert record["meta"]["answer"] == 2 * int(record["prompt_id"][3:])
    settings = json.loads((here / "out" / "settings.json").read_text())
    assert settings.keys() == {"format", "sampling", "n", "generator", "prompts"}
    before = (here / "out" / "rollouts.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(
            "lenvm_lightning.rollouts.generators.local.generator.load_model", None
        )  # would be an error to call
        assert main(COMMAND) == 0
    out, err = capsys.readouterr()
    assert "is complete for these settings" in err
    assert "18 completions of 6 prompts by" in out
    assert main([*COMMAND, "--temperature", "0.5", "-n", "4"]) == 2
    err = capsys.readouterr().err
    assert "n: 3 -> 4" in err
    assert "sampling.temperature: 1.0 -> 0.5" in err
    assert (here / "out" / "rollouts.jsonl").read_bytes() == before
    # The same name, but other weights: loaded, and refused.
    (here / "small").unlink()
    shutil.copytree(model, here / "small")
    weights = load_file(here / "small" / "model.safetensors")
    weights["lm_head.weight"][5] += 1.0
    save_file(weights, here / "small" / "model.safetensors", {"format": "pt"})
    assert main(COMMAND) == 2
    assert "generator.digest: " in capsys.readouterr().err


def test_stop_texts_of_command_line_and_recipe(here, capsys):
    assert main([*COMMAND, "--stop", "\n\n", "--stop", "END"]) == 0
    settings = json.loads((here / "out" / "settings.json").read_text())
    assert settings["sampling"]["stop"] == ["\n\n", "END"]
    assert {tuple(r["sampling"]["stop"]) for r in records(here / "out" / "rollouts.jsonl")} == {("\n\n", "END")}
    assert main(COMMAND) == 2
    assert "sampling.stop: ['\\n\\n', 'END'] -> None" in capsys.readouterr().err
    command = ["run", recipe(here, sample={**SAMPLE, "stop": ["END"]})]
    assert main(command) == 0
    assert main([*command, "--sample.stop", "[]"]) == 0  # none: another folder
    found = [
        json.loads(file.read_text())["sampling"].get("stop") for file in here.glob("runs/rollouts/*/settings.json")
    ]
    assert sorted(found, key=bool) == [None, ["END"]]
    assert main([*command, "--sample.stop", "END"]) == 2
    assert "--sample.stop: stop must be a list of texts, none of them empty, found 'END'" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_by_a_signal(here, capsys, monkeypatch, number, status):
    assert main(COMMAND) == 0
    whole = records(here / "out" / "rollouts.jsonl")
    shutil.rmtree(here / "out")
    add, handler = RolloutStore.add, signal.getsignal(signal.SIGTERM)

    def add_and_stop(store, answer):
        add(store, answer)
        if store.done == 5:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(RolloutStore, "add", add_and_stop)
        try:
            ended = main(COMMAND)
        except SystemExit as exit:
            ended = exit.code
    assert ended == status
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "5 of 18 completions are in out and stay; the same command goes on from there" in capsys.readouterr().err
    assert len(records(here / "out" / "journal.jsonl")) == 5
    assert not (here / "out" / ".lock").exists()
    assert main(COMMAND) == 0
    assert "going on from 5 of 18 completions" in capsys.readouterr().err
    again = records(here / "out" / "rollouts.jsonl")
    assert [r["token_ids"] for r in again] == [r["token_ids"] for r in whole]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (
            ["--temperature", "-1", "--top-p", "0"],
            ["temperature must be a number of at least 0, found -1.0", "top_p must be above 0 and at most 1"],
        ),
        (["--temperature", "nan"], ["temperature must be a number of at least 0, found nan"]),
        (["--stop", ""], ["stop must be a list of texts, none of them empty, found ['']"]),
        (["-n", "0"], ["n must be a whole number of at least 1, found 0"]),
        (["--prompts", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--generator", "no/such-model"], ["no/such-model"]),
        (["--model", "m"], ["small takes no 'model'"]),
        (["--options", "{row: 3}"], ["small takes no 'row'; did you mean 'rows'?"]),
        (["--options", "7"], ["options must be a mapping such as {concurrency: 64}, found 7"]),
        (["--generator", "http://127.0.0.1:9"], ["no server answers at http://127.0.0.1:9"]),
    ],
)
def test_mistakes(here, capsys, words, found):
    assert main([*COMMAND, *words]) == 2
    err = capsys.readouterr().err
    assert all(part in err for part in found), err
    assert not (here / "out").exists()


def test_mistakes_in_the_line_itself(here, capsys):
    for words, found in (
        (["sample", "--generator", "small"], "--prompts, --out"),
        ([*COMMAND, "--top-k", "many"], "argument --top-k: invalid int value: 'many'"),
        ([*COMMAND, "--fit.model.optimizer.lr", "1"], "--fit.model.optimizer.lr belongs to `lenvm run RECIPE`"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert found in capsys.readouterr().err


def test_help_is_quick_and_shows_everything(capsys):
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    out = capsys.readouterr().out
    assert "lenvm sample --generator tiny-text" in out
    for flag in ("--split", "--limit", "--temperature", "--top-p", "--top-k", "--min-p", "--max-tokens", "--seed"):
        assert flag in out
    assert "--stop TEXT" in out
    loaded = "import sys; from lenvm_lightning.cli.main import build_parser; build_parser('lenvm'); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "lightning", "numpy"} & set(modules)


# -- the sample stage -------------------------------------------------------------------------------------------------


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
    assert "max_tokens   tokens after which a completion is truncated" in out
    assert "--trainer.max_epochs" in out


# -- killed for real --------------------------------------------------------------------------------------------------


def real(*, out: Path, kills: int) -> subprocess.CompletedProcess:
    """Begin a run of the real generator again and again, and kill it; see scripted.py."""
    driver = HELPERS / "scripted.py"
    command = [sys.executable, driver, out, str(kills), "11", "tiny-text"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_fifty_kills_of_a_real_generator_change_nothing(here):
    done = real(out=here / "killed", kills=50)
    assert done.returncode == 0, done.stderr
    for name in ("killed", "undisturbed"):
        done = real(out=here / name, kills=0)
        assert done.returncode == 0, done.stderr
    files = [(here / name / "rollouts.jsonl").read_bytes() for name in ("killed", "undisturbed")]
    assert files[0] == files[1]
    assert len(files[0].splitlines()) == 3000


@pytest.mark.slow
def test_killed_commands_end_with_the_same_file(here):
    command = [sys.executable, "-m", "lenvm_lightning", *COMMAND[:-2], "--limit", "3000", "--prompts", "tiny-math"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def finish(folder: Path) -> None:
        done = subprocess.run([*command, "--out", folder], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    finish(here / "whole")
    moments, journal = random.Random(5), here / "broken" / "journal.jsonl"
    for _ in range(3):
        before = journal.stat().st_size if journal.exists() else 0
        process = subprocess.Popen([*command, "--out", journal.parent], env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and (journal.stat().st_size if journal.exists() else 0) == before:
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.2))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finish(journal.parent)
    files = [(here / name / "rollouts.jsonl").read_bytes() for name in ("whole", "broken")]
    assert files[0] == files[1]
