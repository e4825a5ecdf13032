"""`lenvm sample` as people type it, with a small real model: end to end, stopped, mistaken, killed."""

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
from PIL import Image
from places import HELPERS
from safetensors.torch import load_file, save_file
from small_generator import COMMAND, SAMPLE, lay_out, recipe, records, save_small

from lenvm_lightning.cli.main import main
from lenvm_lightning.rollouts.record import parse_record
from lenvm_lightning.rollouts.store import RolloutStore


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_small(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def here(here, model):
    lay_out(here, model)
    return here


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


def test_images_elsewhere_need_a_flag(here, capsys):
    for folder in ("data", "private"):
        (here / folder).mkdir()
    Image.new("RGB", (28, 28)).save(here / "private" / "a.png")
    row = {"prompt": "<image>How many?", "image": "../private/a.png"}
    (here / "data" / "p.jsonl").write_text(json.dumps(row) + "\n")
    command = ["sample", "--generator", "small", "--prompts", "data/p.jsonl", "--out", "seen"]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert f"data/p.jsonl:1: image ../private/a.png is {here}/private/a.png, outside of the folder of the data" in err
    assert "--allow-images-from DIR" in err
    assert main([*command, "--allow-images-from", "data", "--allow-images-from", "private"]) == 2
    assert "reads text only" in capsys.readouterr().err  # what is wrong with this generator, once the image may be read


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


def test_completions_are_written_into_no_folder_of_something_else(here, capsys):
    (here / "project").mkdir()
    (here / "project" / "settings.json").write_text('{"mine": 1}')
    assert (
        main(["sample", "--generator", "tiny-text", "--prompts", "tiny-math", "--limit", "1", "--out", "project"]) == 2
    )
    assert "project is not empty, and has no settings.json of such completions" in capsys.readouterr().err
    assert [(file.name, file.read_text()) for file in (here / "project").iterdir()] == [
        ("settings.json", '{"mine": 1}')
    ]
