"""Scaling: runs read, refused, joined; by hand and from runs of the command line."""

import json

import pytest

from lenvm_lightning.cli.main import main
from lenvm_lightning.errors import DataError
from lenvm_lightning.evaluation.plots import as_png
from lenvm_lightning.evaluation.tasks.compare_runs import ScalingRun, plot_scaling, read_runs, scaling_lines


def run(name, parameters, prompts, per_prompt, loss):
    return ScalingRun(name, parameters, prompts, per_prompt, loss, True)


# A grid of two sizes and three numbers of prompts, and one run with fewer completions.
RUNS = [
    run("s1", 1e6, 100, 4.0, 0.08),
    run("s2", 1e6, 201, 3.98, 0.04),  # a few rows were left out
    run("s4", 1e6, 400, 4.0, 0.02),
    run("m1", 4e6, 100, 4.0, 0.04),
    run("m4", 4e6, 400, 4.0, 0.01),
    run("few", 4e6, 400, 1.0, 0.02),
]


def test_lines_by_hand():
    lines = scaling_lines(RUNS)
    found = {(line.axis, tuple(r.name for r in line.runs)): line for line in lines}
    assert set(found) == {
        ("parameters", ("s1", "m1")),
        ("parameters", ("s4", "m4")),
        ("train_prompts", ("s1", "s2", "s4")),
        ("train_prompts", ("m1", "m4")),
        ("completions_per_prompt", ("few", "m4")),
    }
    for (axis, names), slope in {
        ("parameters", ("s1", "m1")): -0.5,  # four times the size, half the loss
        ("train_prompts", ("m1", "m4")): -1.0,
        ("completions_per_prompt", ("few", "m4")): -0.5,
    }.items():
        assert found[axis, names].slope == pytest.approx(slope)
        assert found[axis, names].spearman == pytest.approx(-1.0)
    three = found["train_prompts", ("s1", "s2", "s4")]
    assert three.slope == pytest.approx(-1.0, abs=1e-3)
    assert [line.axis for line in lines][2] == "train_prompts"
    assert len(lines[2].runs) == 3  # the longest line of an axis comes first


def test_more_that_is_worse_has_a_positive_slope():
    [line] = scaling_lines([run("a", 1e6, 100, 4, 0.01), run("b", 1e6, 1000, 4, 0.1)])
    assert (line.slope, line.spearman) == (pytest.approx(1.0), pytest.approx(1.0))


def test_plot():
    panels = plot_scaling(RUNS).axes
    assert sum(len(panel.lines) for panel in panels) == len(scaling_lines(RUNS))
    assert as_png(plot_scaling(RUNS)).startswith(b"\x89PNG")
    assert scaling_lines([RUNS[0], RUNS[4]]) == []  # two axes vary, but never one alone
    with pytest.raises(DataError, match="the 2 runs do not differ in parameters, training prompts"):
        plot_scaling([RUNS[0], RUNS[0]])


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text_rollouts):
    """Three short runs on nested training sets with the same held-out prompts, and one with another held-out set."""
    here = tmp_path_factory.mktemp("runs")
    rows = [json.loads(line) for line in text_rollouts.read_text(encoding="utf-8").splitlines()]
    prompts = list(dict.fromkeys(row["prompt_id"] for row in rows))
    for name, train, held, kept in (("all", 14, 6, 2), ("few", 7, 6, 2), ("one", 14, 6, 1), ("other", 14, 3, 2)):
        lines, seen = [], {}
        for row in rows:
            number = prompts.index(row["prompt_id"])
            seen[number] = seen.get(number, 0) + 1
            split = "test" if number < held else "train" if 6 <= number < 6 + train else None
            if split and (split == "test" or seen[number] <= kept):
                lines.append(json.dumps({**row, "split": split}))
        lines = lines[::-1] if name == "few" else lines  # the order of rows does not count
        (here / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(here)
            short = [
                "--fit.trainer.max_steps",
                "2",
                "--fit.trainer.max_epochs",
                "1",
                "--fit.trainer.log_every_n_steps",
                "1",
            ]
            files = [
                "--fit.data.files",
                f"{name}.jsonl",
                "--fit.data.batch_tokens",
                "2048",
                "--fit.model.gamma",
                "0.99",
            ]
            assert main(["run", "text_lenvm", "--name", name, *short, *files]) == 0
    return here / "runs"


def test_runs_of_the_command_line(runs, tmp_path):
    whole, few, one = read_runs([runs / "all", runs / "few", runs / "one"])
    assert [(r.name, r.train_prompts, r.completions_per_prompt) for r in (whole, few, one)] == [
        ("all", 14, 2.0),
        ("few", 7, 2.0),
        ("one", 14, 1.0),
    ]
    assert whole.parameters == few.parameters > 1000
    assert whole.loss > 0
    assert whole.tiny_world
    lines = scaling_lines([whole, few, one])
    assert [(line.axis, [r.name for r in line.runs]) for line in lines] == [
        ("train_prompts", ["few", "all"]),
        ("completions_per_prompt", ["one", "all"]),
    ]
    results = json.loads((runs / "all" / "results.json").read_text())
    assert results["train_completions_per_prompt"] == 2.0
    assert results["objective"] == {
        "loss": "mse", "weight": "token", "lam": 1.0, "censored": results["objective"]["censored"]
    }  # fmt: skip


def test_other_held_out_completions_are_refused(runs):
    with pytest.raises(DataError) as told:
        read_runs([runs / "all", runs / "few", runs / "other"])
    text = str(told.value)
    assert "cannot be compared" in text
    assert "other: held-out completions" in text
    assert "(6 of 3 prompts)" in text
    assert "(12 of 6 prompts)" in text
    assert "few:" not in text


def test_another_gamma_is_refused(runs, tmp_path):
    results = json.loads((runs / "all" / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps({**results, "gamma": 0.5}))
    with pytest.raises(DataError, match=r"gamma 0\.5, but 0\.99 in"):
        read_runs([runs / "all", tmp_path])


def test_every_folder_without_a_finished_run_is_listed(runs, tmp_path):
    results = json.loads((runs / "all" / "results.json").read_text())
    for name in ("empty", "begun", "broken", "generator", "old", "blind"):
        (tmp_path / name).mkdir()
    (tmp_path / "begun" / "recipe.yaml").write_text("fit: {}\n")
    (tmp_path / "broken" / "results.json").write_text("{")
    (tmp_path / "generator" / "results.json").write_text(json.dumps({"tiny_world": True, "metrics": {"loss": 1.0}}))
    old = {key: value for key, value in results.items() if key not in ("train_prompts", "held_out_digest")}
    (tmp_path / "old" / "results.json").write_text(json.dumps(old))
    (tmp_path / "blind" / "results.json").write_text(json.dumps({**results, "metrics": {}}))
    wrong = {
        "nowhere": "no such folder",
        "empty": "no run: it has no results.json",
        "begun": "has not finished",
        "broken": "cannot be read: it is not JSON",
        "generator": "the run of a generator",
        "old": "lacks held_out_digest, train_prompts",
        "blind": "it was not validated",
    }
    with pytest.raises(DataError) as told:
        read_runs([runs / "all", *(tmp_path / name for name in wrong)])
    lines = str(told.value).splitlines()[1:]
    assert len(lines) == len(wrong)
    for line, (name, text) in zip(lines, wrong.items(), strict=True):
        assert f"{name}: " in line
        assert text in line
    with pytest.raises(DataError, match="no runs to compare"):
        read_runs([])
