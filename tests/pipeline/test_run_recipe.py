"""`lightning run` from end to end: shipped recipes, full disks, and every stage after the other."""

import errno
import json

import lightning as L
import pytest
from short_runs import SHORT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lenvm_lightning import LengthValueModel
from lenvm_lightning.cli.main import main
from lenvm_lightning.evaluation.results import Results


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
