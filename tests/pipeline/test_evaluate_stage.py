"""The stage `evaluate`: which model a task measures, which runs it looks at, and what is told before any training."""

import pytest

from lenvm_lightning.cli.main import main
from lenvm_lightning.errors import RecipeError
from lenvm_lightning.evaluation.read_settings import read_settings
from lenvm_lightning.pipeline import evaluate_stage
from lenvm_lightning.pipeline.evaluate_stage import plan_tasks


def test_a_task_that_names_its_generator_measures_what_was_trained():
    [task] = plan_tasks({"evaluate": [{"task": "length", "generator": "tiny-text"}]}, "r.yaml", None, "runs/r/model")
    assert task.lenvm == "runs/r/model"


def test_a_server_decodes_by_itself_but_its_completions_can_be_predicted():
    recipe = {"evaluate": [{"task": "gsm8k"}, {"task": "length"}]}
    answers, lengths = plan_tasks(recipe, "r.yaml", "http://localhost:1", "runs/r/model")
    assert (answers.lenvm, lengths.lenvm) == (None, "runs/r/model")


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
