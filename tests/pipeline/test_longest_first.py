"""Prompts with the longest expected answers first: the order, and that nothing else changes."""

import json
import shutil

import pytest
from scripted import make_prompts
from small_generator import lay_out, recipe, save_small

from lenvm_lightning.cli.main import main
from lenvm_lightning.errors import RecipeError
from lenvm_lightning.evaluation.prediction import Prediction
from lenvm_lightning.pipeline.longest_first import order_by, value_model_for
from lenvm_lightning.rollouts.generators.local import LocalGenerator
from lenvm_lightning.rollouts.store import RolloutStore

TEXTS = (16, 200, 40, 120, 24, 64)
COMMAND = ["sample", "--generator", "tiny-text", "--prompts", "texts.jsonl", "-n", "2", "--max-tokens", "60"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def here(here):
    """Prompts whose lengths the embedded value model knows."""
    rows = [
        {"prompt_id": f"t{n}", "prompt": f"Write a text about the sea. The text must be equal to {n} tokens long."}
        for n in TEXTS
    ]
    (here / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return here


@pytest.fixture
def asked(monkeypatch):
    """Ids of the prompts that the generator was asked, in order."""
    heard: list[str] = []
    sample = LocalGenerator.sample

    def hear(self, requests, sampling):
        def heard_ones():
            for request in requests:
                heard.append(request.prompt.prompt_id.rpartition("/")[2])
                yield request

        return sample(self, heard_ones(), sampling)

    monkeypatch.setattr(LocalGenerator, "sample", hear)
    return heard


def test_the_longest_come_first_and_before_them_what_nobody_can_predict():
    expected = {"p/0": 30.0, "p/1": "too long", "p/2": 70.0, "p/3": 30.0, "p/4": "an image", "p/5": 1.5}
    said: list[str] = []

    def told(prompt):
        length = expected[prompt.prompt_id]
        return length if isinstance(length, str) else Prediction(length, {})

    order = order_by(lambda prompts: ((prompt, told(prompt)) for prompt in prompts), said.append)
    assert order(iter(make_prompts(6))) == ["p/1", "p/4", "p/2", "p/0", "p/3", "p/5"]
    [sentence] = said
    assert "4 prompts are expected to be answered with 2 to 70 tokens" in sentence
    assert "; 2 without a prediction come before them" in sentence


def test_whose_value_model_it_is():
    assert value_model_for("tiny-text", None) == "tiny-text-lenvm"
    assert value_model_for("vllm:tiny-text", None) == "tiny-text-lenvm"
    assert value_model_for("http://localhost:8000", "runs/mine/model") == "runs/mine/model"
    with pytest.raises(RecipeError, match=r"longest_first needs lenvm, .* of the completions of Qwen/Qwen3-8B"):
        value_model_for("Qwen/Qwen3-8B", None)


def test_the_same_completions_in_another_order(here, asked, capsys):
    assert main([*COMMAND, "--out", "plain"]) == 0
    assert asked == [f"t{n}" for n in TEXTS]
    asked.clear()
    capsys.readouterr()
    assert main([*COMMAND, "--longest-first", "--out", "ordered"]) == 0
    assert asked == [f"t{n}" for n in sorted(TEXTS, reverse=True)]
    assert "longest first: 6 prompts are expected to be answered with" in capsys.readouterr().err
    for name in ("rollouts.jsonl", "settings.json"):
        assert (here / "plain" / name).read_bytes() == (here / "ordered" / name).read_bytes()
    # A complete folder is complete for both, and a stopped one goes on with either.
    assert main([*COMMAND, "--longest-first", "--out", "plain"]) == 0
    assert "is complete for these settings" in capsys.readouterr().err


def test_a_stopped_run_goes_on_in_any_order(here, asked, monkeypatch, capsys):
    assert main([*COMMAND, "--out", "plain"]) == 0
    add = RolloutStore.add

    def add_and_stop(store, record):
        add(store, record)
        if store.done == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RolloutStore, "add", add_and_stop)
        assert main([*COMMAND, "--longest-first", "--out", "stopped"]) == 130
    left = [json.loads(line)["prompt_id"].rpartition("/")[2] for line in (here / "stopped" / "journal.jsonl").open()]
    missing = [f"t{n}" for n in sorted(TEXTS, reverse=True) if left.count(f"t{n}") < 2]
    shutil.copytree("stopped", "other")
    for name, words, order in (
        ("stopped", ["--longest-first"], missing),
        ("other", [], [f"t{n}" for n in TEXTS if f"t{n}" in missing]),
    ):
        asked.clear()
        assert main([*COMMAND, *words, "--out", name]) == 0
        assert asked == order
        assert (here / name / "rollouts.jsonl").read_bytes() == (here / "plain" / "rollouts.jsonl").read_bytes()


def test_the_settings_of_a_recipe(here, asked, capsys):
    sample = {"generator": "tiny-text", "prompts": "texts.jsonl", "n": 2, "max_tokens": 60}
    assert main(["run", recipe(here, sample=sample)]) == 0
    asked.clear()
    words = ["--sample.longest_first", "true", "--sample.lenvm", "tiny-text-lenvm"]
    assert main(["run", "r.yaml", *words]) == 0
    assert asked == []  # in the same folder, which is complete
    shutil.rmtree(here / "runs" / "rollouts")
    assert main(["run", "r.yaml", *words]) == 0
    assert asked == [f"t{n}" for n in sorted(TEXTS, reverse=True)]
    assert main(["run", "r.yaml", *words, "--sample.abort_at_quantile", ".5"]) == 0
    folders = sorted((here / "runs" / "rollouts").iterdir())
    limits = [json.loads((folder / "summary.json").read_text())["limit_tokens"] for folder in folders]
    assert sorted(limits)[1] == 60 > min(limits)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--lenvm", "tiny-text-lenvm"], "lenvm is read by longest_first alone, which is not asked for"),
        (["--longest-first"], "longest_first needs lenvm, a length value model of the completions of small"),
        (["--longest-first", "--lenvm", "nowhere"], "nowhere"),
        (["--abort-at-quantile", "1"], "abort_at_quantile must be a number between 0 and 1, found 1.0"),
        (["--abort-at-quantile", "-.5"], "abort_at_quantile must be a number between 0 and 1, found -0.5"),
        (
            ["--abort-at-quantile", ".5", "--generator", "http://me:hunter2@127.0.0.1:9"],
            "http://127.0.0.1:9 come whole",
        ),
        (["--abort-at-quantile", ".5", "--generator", "vllm:tiny-text"], "those of vllm:tiny-text come whole"),
    ],
)
def test_mistakes(here, model, capsys, words, told):
    lay_out(here, model)
    command = ["sample", "--generator", "small", "--prompts", "q.jsonl", "-n", "3", "--max-tokens", "12"]
    assert main([*command, *words, "--out", "out"]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert "hunter2" not in err
    assert not (here / "out" / "journal.jsonl").exists()
