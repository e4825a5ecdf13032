"""Runs with other loggers than TensorBoard: the same scalars under the same names, and the same figures."""

import csv
import re
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lenvm_lightning.cli.main import main
from lenvm_lightning.errors import RecipeError
from lenvm_lightning.training.loggers import open_loggers

SHORT = ["--fit.trainer.max_steps", "3", "--fit.trainer.max_epochs", "1", "--fit.data.val_completions", "12"]
SHORT += ["--fit.trainer.log_every_n_steps", "1", "--fit.data.batch_tokens", "1024"]
FIGURE = "val/remaining"
OWN_COLUMNS = {"epoch", "step"}  # beside the scalars; TensorBoard has steps on an axis
TENSORBOARD = {
    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
    "init_args": {"name": "tb", "version": "", "default_hp_metric": False},
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(logger, rollouts, *words):
    """Train ``text_lenvm`` for three steps with these loggers."""
    command = ["run", "text_lenvm", "--name", "r", *SHORT, "--fit.data.files", str(rollouts), *words]
    assert main([*command, "--fit.trainer.logger", yaml.safe_dump(logger)]) == 0


def of_tensorboard(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], list[str]]:
    """Scalars with their steps, and the names of figures."""
    events = EventAccumulator(str(folder)).Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}, events.Tags()["images"]


def test_csv_has_the_scalars_and_figures_of_tensorboard(here, text_rollouts):
    run([TENSORBOARD, "CSVLogger"], text_rollouts)
    scalars, figures = of_tensorboard(here / "runs" / "r" / "tb")
    assert figures == [FIGURE]
    folder = here / "runs" / "r" / "lightning_logs" / "version_0"
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) - OWN_COLUMNS == set(scalars) - OWN_COLUMNS
    for name in set(scalars) - OWN_COLUMNS:
        found = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in scalars[name]]  # float32 there
    (picture,) = (folder / FIGURE).glob("*.png")
    assert picture.name == "step-000000003.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "source: tiny-text" in (folder / "hparams.yaml").read_text()
    assert not (here / "runs" / "r" / "tensorboard").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_mlflow_has_the_scalars_and_figures_of_tensorboard(here, text_rollouts, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (here / "mlruns").as_uri()
    logger = {"class_path": "lightning.pytorch.loggers.MLFlowLogger", "init_args": {"tracking_uri": uri}}
    run([TENSORBOARD, logger], text_rollouts)
    scalars, _ = of_tensorboard(here / "runs" / "r" / "tb")
    client = mlflow.MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string="name = 'lightning_logs'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert set(found.data.metrics) - OWN_COLUMNS == set(scalars) - OWN_COLUMNS
    for name in set(scalars) - OWN_COLUMNS:
        history = [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, name)]
        assert history == [(step, pytest.approx(value, rel=1e-6)) for step, value in scalars[name]]
    assert [file.path for file in client.list_artifacts(found.info.run_id, FIGURE)] == [f"{FIGURE}/step-000000003.png"]
    assert found.data.params["backbone/source"] == "tiny-text"


def test_wandb_has_the_scalars_and_figures_of_tensorboard(here, text_rollouts, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logged = []
    log = wandb.Run.log
    monkeypatch.setattr(wandb.Run, "log", lambda self, data, **options: (logged.append(data), log(self, data))[1])
    logger = {"class_path": "WandbLogger", "init_args": {"offline": True, "save_dir": str(here)}}
    run([TENSORBOARD, logger], text_rollouts)
    wandb.finish()
    scalars, _ = of_tensorboard(here / "runs" / "r" / "tb")
    figures = [data for data in logged if FIGURE in data]
    assert len(figures) == 1
    assert isinstance(figures[0][FIGURE][0], wandb.Image)
    names = {name for data in logged for name in data} - {"trainer/global_step", FIGURE}
    assert names - OWN_COLUMNS == set(scalars) - OWN_COLUMNS
    assert list(here.glob("wandb/offline-run-*"))


def test_a_run_with_another_logger_goes_on_and_is_skipped(here, text_rollouts, capsys, caplog):
    run("CSVLogger", text_rollouts)
    assert "tensorboard --logdir" not in capsys.readouterr().out  # there is nothing to see
    again = here / "runs" / "r"
    settings = yaml.safe_load((again / "recipe.yaml").read_text())["fit"]["trainer"]["logger"]
    assert settings["class_path"] == "lightning.pytorch.loggers.CSVLogger"
    assert settings["init_args"]["save_dir"] == "{run}"  # the same settings whatever the folder is called
    run("CSVLogger", text_rollouts)
    assert "is complete for these settings" in capsys.readouterr().out
    (again / "results.json").unlink()
    run({"class_path": "lightning.pytorch.loggers.CSVLogger"}, text_rollouts)
    assert "going on from step 3" in caplog.text
    assert (again / "results.json").exists()


@pytest.mark.parametrize(
    ("logger", "words"),
    [
        ("CSVLoger", "class_path 'lightning.pytorch.loggers.CSVLoger' cannot be imported"),
        ({"class_path": "CSVLogger", "init_args": {"nme": "x"}}, "'nme' is no setting of .*CSVLogger; .* 'name'"),
        ({"class_path": "CSVLogger", "init_args": {"flush_logs_every_n_steps": "x"}}, "flush_logs_every_n_steps must"),
        (3, "logger: expected a class_path, such as lightning.pytorch.loggers.CSVLogger, found 3"),
        ("json.JSONDecoder", "JSONDecoder"),
    ],
)
def test_loggers_that_cannot_be_are_told(here, capsys, logger, words):
    assert main(["run", "text_lenvm", "--fit.data.files", "x", "--fit.trainer.logger", yaml.safe_dump(logger)]) == 2
    err = capsys.readouterr().err
    assert re.search(words, err), err
    assert not (here / "runs").exists()


def test_tensorboard_stays_the_default(tmp_path):
    logger = open_loggers(None, tmp_path, resumed_step=7)
    assert isinstance(logger, TensorBoardLogger)
    assert Path(logger.log_dir) == tmp_path / "tensorboard"
    assert open_loggers(False, tmp_path, None) is False


def test_the_folder_of_the_run_is_filled_in(tmp_path):
    wanted = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "{run}/logs", "name": ""}}
    (logger,) = open_loggers([wanted], tmp_path, None)
    assert isinstance(logger, CSVLogger)
    assert Path(logger.log_dir).parent == tmp_path / "logs"


def test_a_logger_that_cannot_be_opened_is_told(tmp_path):
    pytest.importorskip("mlflow")
    nowhere = {"tracking_uri": "nowhere://x"}
    with pytest.raises(RecipeError, match=r"MLFlowLogger cannot be used: .*nowhere"):
        open_loggers({"class_path": "lightning.pytorch.loggers.MLFlowLogger", "init_args": nowhere}, tmp_path, None)


def test_a_logger_that_is_not_installed_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE", False)
    with pytest.raises(RecipeError, match="MLFlowLogger cannot be used"):
        open_loggers({"class_path": "lightning.pytorch.loggers.MLFlowLogger", "init_args": {}}, tmp_path, None)
