"""The stages `evaluate` and `variants` of recipes: mistakes with their lines, overrides, runs from end to end."""

import json

import pytest

from lenvm_lightning.cli.main import main
from lenvm_lightning.errors import RecipeError
from lenvm_lightning.evaluation.read_settings import read_settings
from lenvm_lightning.evaluation.results import Results
from lenvm_lightning.pipeline import evaluate_stage
from lenvm_lightning.pipeline import variants as stages
from lenvm_lightning.pipeline.evaluate_stage import plan_tasks
from lenvm_lightning.pipeline.recipe import read_recipe
from lenvm_lightning.pipeline.variants import run_variants


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


def results_in(folder):
    """Results of the tasks of a run, by task."""
    found = {}
    for file in (folder / "evaluate").glob("*/results.json"):
        results = Results.from_dict(json.loads(file.read_text(encoding="utf-8")))
        found[results.task] = results
    return found


def written(folder):
    """When every file was written; the log of a variant and the joint report are nobody's results."""
    files = (file for file in folder.rglob("*") if file.is_file() and file != folder / "report.md")
    return {str(file): file.stat().st_mtime_ns for file in files if "recipes" not in file.parts}


MEASURES = """\
evaluate:
  - {task: lifebench, lengths: [16], constraints: [at most], n: 1, limit: 2}
  - {task: gsm8k, n: 1, max_tokens: 60, limit: 9, systems: [base]}
"""


def test_a_recipe_that_only_measures(here, capsys):
    (here / "r.yaml").write_text(MEASURES)
    assert main(["run", "r.yaml", "--check"]) == 0
    assert "evaluate: gsm8k of the embedded pair" in capsys.readouterr().out
    assert not (here / "runs").exists()
    command = ["run", "r.yaml", "--evaluate.limit", "1"]
    assert main(command) == 0
    run = here / "runs" / "r"
    found = results_in(run)
    assert {task: (one.questions, one.completions) for task, one in found.items()} == {
        "lifebench": (1, 2), "gsm8k": (1, 1),
    }  # fmt: skip
    report = (run / "report.md").read_text(encoding="utf-8")
    assert "# lifebench" in report
    assert "# gsm8k" in report
    pictures = [line.partition("](")[2].rstrip(")") for line in report.splitlines() if line.startswith("![")]
    assert len(pictures) == 2
    assert all((run / picture).is_file() for picture in pictures)
    before = written(run)
    assert main(command) == 0
    assert capsys.readouterr().err.count("is complete for these settings") == 2
    assert written(run) == before


TRAINS = """\
fit:
  model: {{class_path: lenvm_lightning.TextLenVM, init_args: {{backbone: tiny-text, gamma: 0.99}}}}
  data: {{class_path: datamodules.TextRollouts, init_args: {{files: {file}, batch_tokens: 1024, val_completions: 12}}}}
  trainer: {{max_epochs: 1, max_steps: 2, log_every_n_steps: 1}}
variants:
  jobs: 2
  runs:
    shallow: {{fit.model.backbone.keep_layers: 1, fit.model.backbone.pretrained: true}}
evaluate:
  - {{task: length, generator: tiny-text, lenvm: runs/r/model, limit: 2, n: 2, max_tokens: 60}}
  - {{task: ablation, runs: [shallow]}}
"""


@pytest.fixture
def trains(here, text_rollouts):
    (here / "r.yaml").write_text(TRAINS.format(file=text_rollouts))
    return here / "runs" / "r"


def test_fit_variants_and_evaluations_from_end_to_end(trains, capsys):
    assert main(["run", "r.yaml"]) == 0
    out = capsys.readouterr().out
    assert "variants: 1 of 1 to train, 2 at a time" in out
    assert "variant shallow: done" in out
    shallow = json.loads((trains / "variants" / "shallow" / "results.json").read_text())
    assert shallow["parameters"] < json.loads((trains / "results.json").read_text())["parameters"]
    found = results_in(trains)
    assert found.keys() == {"length", "ablation"}
    assert found["length"].provenance["lenvm"]["name"] != "tiny-text-lenvm"
    assert [row.label["run"] for row in found["ablation"].tables[0].rows] == ["shallow"]
    before = {file: time for file, time in written(trains).items() if "ablation" not in file}
    assert main(["run", "r.yaml"]) == 0
    out, err = capsys.readouterr()
    assert "is complete for these settings (--fresh trains again)" in out
    assert "variants: 0 of 1 to train" in out
    assert "is complete for these settings" in err
    assert {file: time for file, time in written(trains).items() if "ablation" not in file} == before


def test_a_variant_that_cannot_be_is_told_before_any_is_trained(trains, here, capsys):
    text = (
        (here / "r.yaml").read_text().replace("fit.model.backbone.keep_layers: 1", "fit.model.backbone.keep_layer: 1")
    )
    (here / "r.yaml").write_text(text)
    assert main(["run", "r.yaml"]) == 2
    err = capsys.readouterr().err
    assert "'keep_layer' is no setting of backbone; did you mean 'keep_layers'?" in err
    assert not (trains / "variants" / "shallow").exists()


def test_a_task_that_names_its_generator_measures_what_was_trained():
    [task] = plan_tasks({"evaluate": [{"task": "length", "generator": "tiny-text"}]}, "r.yaml", None, "runs/r/model")
    assert task.lenvm == "runs/r/model"


def test_a_variant_that_cannot_be_is_told_before_hours_of_training(trains, here):
    (here / "r.yaml").write_text((here / "r.yaml").read_text().replace("keep_layers: 1", "keep_layer: 1"))
    assert main(["run", "r.yaml"]) == 2
    assert not (trains / "results.json").exists()


def test_a_server_decodes_by_itself_but_its_completions_can_be_predicted():
    recipe = {"evaluate": [{"task": "gsm8k"}, {"task": "length"}]}
    answers, lengths = plan_tasks(recipe, "r.yaml", "http://localhost:1", "runs/r/model")
    assert (answers.lenvm, lengths.lenvm) == (None, "runs/r/model")


def test_a_variant_of_other_settings_is_not_taken_for_done(here):
    """Its results were there, and it was left alone."""
    variant = here / "run" / "variants" / "low"
    variant.mkdir(parents=True)
    for name in ("recipe.yaml", "results.json"):
        (variant / name).write_text("{}")
    recipe = {"fit": {"model": {"init_args": {}}}, "variants": {"runs": {"low": {"fit.model.gamma": 0.9}}}}
    assert run_variants(recipe, here / "run") == 0
    recipe["variants"]["runs"]["low"] = {"fit.model.gamma": 0.8}
    for _ in range(2):
        with pytest.raises(RecipeError, match=r"low: .*gamma: 0.9 -> 0.8"):
            run_variants(recipe, here / "run")


def test_a_variant_is_no_process_of_a_distributed_run(here, monkeypatch):
    seen = []

    class Done:
        returncode = 0

        def __init__(self, command, env, **rest):
            seen.append(env)

        def poll(self):
            return 0

    monkeypatch.setattr(stages.subprocess, "Popen", Done)
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    recipe = {"fit": {"model": {"init_args": {}}}, "variants": {"runs": {"low": {"fit.model.gamma": 0.9}}}}
    assert run_variants(recipe, here / "run") == 0
    [environment] = seen
    assert not [name for name in environment if "RANK" in name or "WORLD" in name or "MASTER" in name]
    assert "PATH" in environment


def test_runs_of_a_task_are_variants_or_folders_wherever_they_are(here):
    for place in (here / "run" / "variants" / "low", here / "elsewhere" / "low-2"):
        place.mkdir(parents=True)
        (place / "results.json").write_text("{}")
    (here / "run" / "variants" / "recipes").mkdir()

    def places(*names):
        task = read_settings({"task": "ablation", "runs": list(names)}, "test")
        return evaluate_stage._with_runs(task, here / "run").own.runs

    run, low, other = (str(here / place) for place in ("run", "run/variants/low", "elsewhere/low-2"))
    assert places("base", "*") == [run, low]
    assert places("l*", other) == [low, other]
    assert places("elsewhere/*") == ["elsewhere/low-2"]
    with pytest.raises(RecipeError, match="no run 'high'"):
        places("high")


@pytest.mark.parametrize(("task", "told"), [
    ("task: length, data: nowhere", "no such source"),
    ("task: gsm8k, systems: [bas]", "did you mean 'base'"),
    ("task: ablation, runs: [shalow]", "no variant is called shalow"),
    ("task: gsm8k, lengths: [16]", "lengths is a setting of lifebench, not of gsm8k"),
])  # fmt: skip
def test_tasks_that_cannot_be_are_told_before_hours_of_training(task, told, trains, here, capsys):
    recipe = (here / "r.yaml").read_text().partition("evaluate:")[0]
    (here / "r.yaml").write_text(recipe + f"evaluate:\n  - {{{task}, generator: tiny-text}}\n")
    assert main(["run", "r.yaml"]) == 2
    assert told in capsys.readouterr().err
    assert not trains.exists()


def test_a_setting_for_all_tasks_reaches_those_that_have_it(here):
    (here / "r.yaml").write_text("evaluate:\n  - task: lifebench\n  - task: gsm8k\n")
    recipe = read_recipe(here / "r.yaml", [("evaluate.lengths", "[16, 32]"), ("evaluate.n", "2")])
    assert recipe["evaluate"] == [{"task": "lifebench", "lengths": [16, 32], "n": 2}, {"task": "gsm8k", "n": 2}]
