"""Recipes as they are read: mistakes with their lines, overrides, variants."""

import pytest

from lenvm_lightning import BackboneConfig
from lenvm_lightning.cli.main import main
from lenvm_lightning.errors import RecipeError
from lenvm_lightning.pipeline.fit_stage import parse_fit
from lenvm_lightning.pipeline.recipe import find_recipe, read_recipe, vary


def test_variants_change_settings_within_groups(here):
    recipe = read_recipe(find_recipe("paper_tiny"), [])
    model = parse_fit(vary(recipe, "layers-2")["fit"], "layers-2").model
    assert model.settings.backbone == BackboneConfig("tiny-text", keep_layers=2)
    assert parse_fit(vary(recipe, "target-log")["fit"], "target-log").model.settings.loss.target == "log_length"


MISTAKES = """\
variants:
  jobs: 0
  runs:
    a/b: {fit.model.optimizer.lr: 0.1}
    small: {sample.n: 2, fit.model.optimizer.lr: 0.1}
  job: 2
evaluate:
  - {task: lifebench, lengths: 16}
  - task: gsm8k
    limmit: 3
    temperature: hot
  - {n: 2}
  - tokens
  - {task: nothing, top_p: 0}
"""
TOLD = """\
r.yaml:2: jobs must be a whole number of at least 1, found 0
r.yaml:4: 'a/b' cannot be the name of a folder
r.yaml:5: 'sample.n': a variant changes settings of fit only
r.yaml:6: 'job' is no setting of variants; did you mean 'jobs'?
r.yaml:8: lengths must be a list of lengths, each once, found 16
r.yaml:10: 'limmit' is no setting of a task; did you mean 'limit'?
r.yaml:11: temperature must be a number of at least 0, found 'hot'
r.yaml:14: task must be one of ablation, gsm8k, length, lifebench,
r.yaml:14: top_p must be above 0 and at most 1
task is missing
expected settings of a task, found 'tokens'
"""


def test_mistakes_are_listed_with_their_lines(here, capsys):
    (here / "r.yaml").write_text(MISTAKES)
    assert main(["run", "r.yaml"]) == 2
    err = capsys.readouterr().err
    for line in TOLD.splitlines():
        assert line in err, err
    assert len(err.strip().splitlines()) == 12
    assert not (here / "runs").exists()


@pytest.mark.parametrize(("text", "words"), [
    ("evaluate: {task: lifebench}", "evaluate: expected a list of tasks"),
    ("evaluate: []", "evaluate: expected a list of tasks"),
    ("variants: {jobs: 2}", "runs: expected what each run changes"),
    ("variants: {runs: {a: 3}}", "runs: expected what each run changes"),
    ("variants: 3", "variants: expected settings, found 3"),
])  # fmt: skip
def test_stages_of_the_wrong_form(here, capsys, text, words):
    (here / "r.yaml").write_text(text)
    assert main(["run", "r.yaml"]) == 2
    assert f"r.yaml:1: {words}" in capsys.readouterr().err


def test_an_override_is_for_all_tasks(here):
    (here / "r.yaml").write_text("evaluate: [{task: lifebench, limit: 9}, {task: gsm8k}]\n")
    recipe = read_recipe(here / "r.yaml", [("evaluate.limit", "3"), ("evaluate.systems", "[base]")])
    assert recipe["evaluate"] == [
        {"task": "lifebench", "limit": 3, "systems": ["base"]}, {"task": "gsm8k", "limit": 3, "systems": ["base"]},
    ]  # fmt: skip


@pytest.mark.parametrize(("override", "words"), [
    (["--evaluate.limit", "some"], "--evaluate.limit: limit must be a whole number of at least 1, found 'some'"),
    (["--evaluate.limmit", "3"], "--evaluate.limmit: 'limmit' is no setting of a task; did you mean 'limit'?"),
])  # fmt: skip
def test_overrides_that_cannot_be(here, capsys, override, words):
    (here / "r.yaml").write_text("evaluate: [{task: lifebench}]\n")
    assert main(["run", "r.yaml", *override]) == 2
    assert words in capsys.readouterr().err


def test_an_override_of_tasks_that_are_not_there(here, capsys, text_rollouts):
    (here / "r.yaml").write_text("sample: {generator: tiny-text, prompts: tiny-math}\n")
    assert main(["run", "r.yaml", "--evaluate.limit", "3"]) == 2
    assert "--evaluate.limit: the recipe has no list of tasks under evaluate" in capsys.readouterr().err


def test_a_variant_that_cannot_be_is_told_before_any_is_trained(trains, here, capsys):
    text = (
        (here / "r.yaml").read_text().replace("fit.model.backbone.keep_layers: 1", "fit.model.backbone.keep_layer: 1")
    )
    (here / "r.yaml").write_text(text)
    assert main(["run", "r.yaml"]) == 2
    err = capsys.readouterr().err
    assert "'keep_layer' is no setting of backbone; did you mean 'keep_layers'?" in err
    assert not trains.exists()


def test_a_setting_for_all_tasks_reaches_those_that_have_it(here):
    (here / "r.yaml").write_text("evaluate:\n  - task: lifebench\n  - task: gsm8k\n")
    recipe = read_recipe(here / "r.yaml", [("evaluate.lengths", "[16, 32]"), ("evaluate.n", "2")])
    assert recipe["evaluate"] == [{"task": "lifebench", "lengths": [16, 32], "n": 2}, {"task": "gsm8k", "n": 2}]


def test_unknown_recipe_lists_the_shipped_ones(here, capsys):
    assert main(["run", "vlm_lenv"]) == 2
    err = capsys.readouterr().err
    assert "did you mean 'vlm_lenvm'?" in err
    assert "qwen2.5-1.5b" in err


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "r.yaml is not valid YAML: line 5, column 8: more than 20,000 keys and values"),
        ("fit: &a {model: *a}", "r.yaml is not valid YAML: line 1, column 17: the alias *a is part of what it stands"),
        ("fit: " + "[" * 10_000 + "]" * 10_000, "r.yaml is not valid YAML: line 1, column 55: lists and mappings are"),
        ("fit: {seed_everything: " + "9" * 5000 + "}", "r.yaml is not valid YAML: line 1, column 24: '9999"),
    ],
)
def test_yaml_that_would_take_the_machine(here, capsys, text, words):
    (here / "r.yaml").write_text(text)
    assert main(["run", "r.yaml", "--check"]) == 2
    assert words in capsys.readouterr().err
    (here / "r.yaml").write_text("evaluate: [{task: lifebench}]\n")
    assert main(["run", "r.yaml", "--check", "--evaluate.options", text]) == 2
    assert words.replace("r.yaml is not valid YAML", "--evaluate.options") in capsys.readouterr().err


def test_what_an_alias_stands_for_is_changed_in_one_place_only(here):
    (here / "r.yaml").write_text(
        "evaluate: [&a {task: lifebench, options: &o {rows: 2}}, {task: gsm8k, options: *o}]\n"
    )
    recipe = read_recipe(here / "r.yaml", [("evaluate.lengths", "[16]"), ("evaluate.limit", "1")])
    assert recipe["evaluate"][0]["options"] is not recipe["evaluate"][1]["options"]
    assert "lengths" not in recipe["evaluate"][1]


@pytest.mark.parametrize("name", ["..", ".", "recipes", "rollouts", "low.log", ""])
def test_names_of_variants_that_would_lead_elsewhere(here, capsys, name):
    (here / "r.yaml").write_text(f"variants:\n  runs:\n    '{name}': {{fit.model.gamma: 0.9}}\n")
    assert main(["run", "r.yaml"]) == 2
    assert f"r.yaml:3: '{name}' cannot be the name of a folder" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "backbone"), [("/a/copy", "/a/copy"), ("http://localhost:8000", "M/M")])
def test_one_name_is_another_generator_in_all_stages(tmp_path, name, backbone):
    """A server has no weights: the backbone stays."""
    (tmp_path / "r.yaml").write_text(
        "sample: {generator: M/M, prompts: tiny-math}\n"
        "fit:\n"
        "  model: {class_path: lenvm_lightning.TextLenVM, init_args: {backbone: {source: M/M, keep_layers: 2}}}\n"
        "  data: {class_path: datamodules.TextRollouts}\n"
        "evaluate: [{task: length}, {task: gsm8k, generator: M/M}, {task: lifebench, generator: other}]\n"
    )
    found = read_recipe(tmp_path / "r.yaml", [("generator", name)])
    assert found["sample"]["generator"] == name
    assert found["fit"]["model"]["init_args"]["backbone"] == {"source": backbone, "keep_layers": 2}
    assert [task.get("generator") for task in found["evaluate"]] == [None, name, "other"]


def test_a_recipe_without_a_generator_has_none_to_rename(tmp_path):
    (tmp_path / "r.yaml").write_text("evaluate: [{task: gsm8k}]\n")
    with pytest.raises(RecipeError, match="--generator: the recipe names no generator under sample or evaluate"):
        read_recipe(tmp_path / "r.yaml", [("generator", "x")])
