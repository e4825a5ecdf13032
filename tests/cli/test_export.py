"""`lenvm export`: runs, checkpoints, adapters and whole directories in; model directories out."""

import json
import re
import shutil
import sys

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors import SafetensorError

from lenvm_lightning import LengthValueModel, tinyworld
from lenvm_lightning.cli.main import main
from lenvm_lightning.errors import CheckpointError
from lenvm_lightning.models import value_head_io
from lenvm_lightning.pipeline.report import next_commands

IDS = torch.arange(30)[None] * 31 % 300 + 20
SETTINGS = {
    "data.files": "tinyworld",
    "data.val_completions": "8",
    "data.train_prompts": "60",
    "model.backbone.freeze_vision": "true",
    "model.lora.rank": "4",
    "model.backbone.quantise": "nf4",
    "trainer.max_steps": "3",
    "checkpoint.every_n_steps": "2",
}


def values(folder):
    model = LengthValueModel.from_pretrained(folder)
    with torch.no_grad():
        return model.value(model(IDS))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished QLoRA run on pictures."""
    runs = tmp_path_factory.mktemp("runs")
    overrides = [word for key, value in SETTINGS.items() for word in (f"--fit.{key}", value)]
    assert main(["run", "vlm_lenvm", "--runs", str(runs), "--name", "r", *overrides]) == 0
    return runs / "r"


def difference(capsys) -> float:
    """What the command says of the values before and after."""
    return float(re.search(r"differ from the source's by at most (\S+)", capsys.readouterr().out)[1])


def test_the_end_of_a_run_says_how(run):
    assert f"lenvm export {run} r-whole" in next_commands(run, {"gamma": 0.99})


def test_a_run_becomes_whole_weights_of_the_same_values(run, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "whole")]) == 0
    assert difference(capsys) < 1e-6
    torch.testing.assert_close(values(tmp_path / "whole"), values(run / "model"), rtol=0, atol=1e-6)
    assert not (tmp_path / "whole" / "adapter_config.json").exists()
    assert (tmp_path / "whole" / "tokenizer.json").exists()
    assert (tmp_path / "whole" / "README.md").read_text() == (run / "model" / "README.md").read_text()
    assert main(["export", str(tmp_path / "whole"), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert 0 < difference(capsys) < 0.02
    model = LengthValueModel.from_pretrained(tmp_path / "half")
    assert (model.backbone.dtype, model.v_head.fc.weight.dtype) == (torch.bfloat16, torch.float32)


def test_a_run_that_was_stopped_becomes_its_last_checkpoint(run, tmp_path, capsys):
    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped)
    (stopped / "results.json").unlink()
    shutil.rmtree(stopped / "model")
    assert main(["export", str(stopped), str(tmp_path / "adapter"), "--adapter"]) == 0
    assert difference(capsys) == 0.0
    assert torch.equal(values(tmp_path / "adapter"), values(run / "model"))  # the last step is saved, too
    early = stopped / "checkpoints" / "step-000000002.ckpt"
    assert main(["export", str(early), str(tmp_path / "early")]) == 0
    assert difference(capsys) < 1e-6
    assert not torch.equal(values(tmp_path / "early"), values(run / "model"))
    shutil.rmtree(stopped / "checkpoints")
    assert main(["export", str(stopped), str(tmp_path / "none")]) == 2
    assert "has neither been finished nor saved a checkpoint yet" in capsys.readouterr().err


def test_what_cannot_be_exported_is_said(run, tmp_path, capsys):
    lenvm = str(tinyworld.path("tiny-text-lenvm"))
    (tmp_path / "broken.ckpt").write_bytes(b"nothing")
    for arguments, message in (
        ([str(run), str(run)], "is there already"),
        ([lenvm, str(tmp_path / "x"), "--adapter"], "was trained whole"),
        ([str(run), str(tmp_path / "x"), "--adapter", "--dtype", "float16"], "--dtype is of whole weights"),
        ([str(tmp_path / "broken.ckpt"), str(tmp_path / "x")], "is no checkpoint of a length value model"),
        ([str(tinyworld.path("tiny-text")), str(tmp_path / "x")], "has no value head"),
        ([lenvm, str(tmp_path / "x"), "--private"], "say --push REPO, too"),
    ):
        assert main(["export", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_run_is_published_with_its_metrics(run, tmp_path, capsys, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    target = tmp_path / "whole"
    assert main(["export", str(run), str(target), "--push", "me/mine", "--private", "--license", "mit"]) == 0
    assert f"{hub.endpoint}/me/mine/commit/" in capsys.readouterr().out
    assert hub.repos["me/mine"]["visibility"] == "private"
    assert hub.files["me/mine"] == {file.name: file.read_bytes() for file in target.iterdir()}
    data = ModelCard((target / "README.md").read_text()).data.to_dict()
    assert data["license"] == "mit"
    (result,) = data["model-index"][0]["results"]
    results = json.loads((run / "results.json").read_text())
    measured = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert measured["MAE in tokens, prompt boundary"] == pytest.approx(results["metrics"]["mae_tokens/start"])
    assert tinyworld.NOTICE in result["dataset"]["name"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_full_disk_is_said_and_leaves_no_model(run, tmp_path, capsys, monkeypatch, error):
    def full(*args, **options):
        raise error

    monkeypatch.setattr(value_head_io, "save_file", full)  # the head, which comes last
    assert main(["export", str(run), str(tmp_path / "x")]) == 2
    assert "No space left on device. Make room, delete" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="no value head"):
        LengthValueModel.from_pretrained(tmp_path / "x")


CODE = """
from transformers import Qwen2Config, Qwen2Model


class MineConfig(Qwen2Config):
    model_type = "mine"


class Mine(Qwen2Model):
    config_class = MineConfig
"""


def test_code_that_comes_with_a_backbone_runs_where_that_is_asked_for(tmp_path, capsys, monkeypatch, text_rollouts):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    base = tmp_path / "base"
    shutil.copytree(tinyworld.path("tiny-text"), base)
    (base / "mine.py").write_text(CODE)
    config = json.loads((base / "config.json").read_text())
    classes = {"AutoConfig": "mine.MineConfig", "AutoModel": "mine.Mine"}
    (base / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": classes}))
    options = {
        "fit.model.backbone": str(base),
        "fit.model.backbone.trust_remote_code": "true",
        "fit.trainer.max_steps": "2",
    }
    options |= {"fit.data.files": str(text_rollouts), "fit.data.batch_tokens": "600", "fit.model.lora.rank": "4"}
    overrides = [word for key, value in options.items() for word in (f"--{key}", value)]
    (tmp_path / "r.yaml").write_text(
        "fit: {model: {class_path: lenvm_lightning.TextLenVM}, data: {class_path: datamodules.TextRollouts}}"
    )
    run = ["run", str(tmp_path / "r.yaml"), "--runs", str(tmp_path), "--name", "own", *overrides]
    assert main(run) == 0
    checkpoint = next((tmp_path / "own" / "checkpoints").glob("*.ckpt"))
    for number, source in enumerate((checkpoint, tmp_path / "own")):
        command = ["export", str(source), str(tmp_path / f"out-{number}")]
        capsys.readouterr()
        assert main(command) == 2
        assert "--trust-remote-code" in capsys.readouterr().err
        assert main([*command, "--trust-remote-code"]) == 0
        assert difference(capsys) < 1e-6
