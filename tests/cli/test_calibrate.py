"""`lenvm calibrate` as people type it, and the quantiles that it makes known."""

import json
import shutil

import pytest

from lenvm_lightning import tinyworld
from lenvm_lightning.cli.main import main
from lenvm_lightning.models.lenvm_config import LenVMConfig


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held-out") / "rollouts"
    words = ["sample", "--generator", "tiny-text", "--prompts", "tiny-math", "--split", "test", "--limit", "24"]
    assert main([*words, "-n", "2", "--max-tokens", "200", "--out", str(folder)]) == 0
    return folder


def uncalibrated(folder):
    """A copy of the embedded model that says nothing of how sure it is."""
    shutil.copytree(tinyworld.path("tiny-text-lenvm"), folder)
    config = json.loads((folder / "lenvm_config.json").read_text(encoding="utf-8"))
    config.pop("calibration", None)
    (folder / "lenvm_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_a_model_of_one_number_gets_intervals(rollouts, tmp_path, capsys):
    folder = uncalibrated(tmp_path / "model")
    predict = ["predict", "tiny-math", "--limit", "3", "--lenvm", str(folder), "--quantiles", ".05,.5,.95"]
    assert main(predict) == 2
    assert "does not say how sure of it. Calibrate it on completions" in capsys.readouterr().err
    weights = (folder / "value_head.safetensors").read_bytes()
    assert main(["calibrate", str(rollouts), "--lenvm", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "calibrated on 48 completions of 24 prompts" in out
    assert "from 0 tokens written on, of true lengths: 5% within the predicted " in out
    assert f"next: lenvm predict PROMPTS --lenvm {folder} --quantiles 0.05,0.5,0.95" in out
    assert (folder / "value_head.safetensors").read_bytes() == weights
    config = json.loads((folder / "lenvm_config.json").read_text(encoding="utf-8"))
    assert LenVMConfig(**config).intervals.prompts[0] == 24
    assert main(predict) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row in rows:
        low, middle, high = (row["quantiles"][q] for q in ("0.05", "0.5", "0.95"))
        assert 0 <= low < middle < (high or 1e9)
    scheduled = [*predict, "--format", "vllm", "--served-model", "mine"]
    assert main(scheduled) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for line, row in zip(lines, rows, strict=True):  # of the smallest quantile; what is shown of it is rounded, too
        assert abs(line["body"]["priority"] - max(1, row["quantiles"]["0.05"])) < 0.6


def test_what_cannot_be_calibrated_is_refused(rollouts, tmp_path, capsys):
    folder = uncalibrated(tmp_path / "model")
    few = tmp_path / "few.jsonl"
    lines = (rollouts / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    few.write_text("\n".join(lines[:10]) + "\n", encoding="utf-8")
    for words, said in (
        ([str(rollouts)], "--lenvm is missing"),
        ([str(rollouts), "--lenvm", "nobody/nowhere"], "Write it into one first: lenvm export"),
        (["nowhere.jsonl", "--lenvm", str(folder)], "there are no rollouts at nowhere.jsonl"),
        ([str(few), "--lenvm", str(folder)], "prompts are too few to calibrate on: take completions of 20 or more"),
    ):
        assert main(["calibrate", *words]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("levels", ["0", "1", ".5,2", "half"])
def test_levels_lie_between_0_and_1(levels, capsys):
    with pytest.raises(SystemExit):
        main(["predict", "tiny-math", "--quantiles", levels])
    assert "--quantiles" in capsys.readouterr().err


def test_texts_without_ids_and_named_splits_are_read_as_training_reads_them(rollouts, tmp_path):
    """A text has an end that its ids alone do not show; what was trained on is left out."""
    folder = uncalibrated(tmp_path / "model")
    rows = [json.loads(line) for line in (rollouts / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()]

    def calibrated(name: str, change) -> dict:
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(change(dict(row))) + "\n" for row in rows), encoding="utf-8")
        assert main(["calibrate", str(file), "--lenvm", str(folder)]) == 0
        return json.loads((folder / "lenvm_config.json").read_text(encoding="utf-8"))["calibration"]

    def without_ids(row):
        row["token_ids"] = None
        return row

    def validation(row):
        return {**row, "split": "validation"}

    whole = calibrated("whole", dict)
    assert calibrated("validation", validation) == whole
    assert calibrated("texts", without_ids) == whole


def test_training_prompts_are_no_held_out_ones(rollouts, tmp_path, capsys):
    folder = uncalibrated(tmp_path / "model")
    lines = (rollouts / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    file = tmp_path / "train.jsonl"
    rows = [{**json.loads(line), "split": "train"} for line in lines]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main(["calibrate", str(file), "--lenvm", str(folder)]) == 2
    assert "names splits, and none that is held out" in capsys.readouterr().err


def test_a_model_that_counts_to_a_text_is_calibrated_on_that(rollouts, tmp_path):
    folder = uncalibrated(tmp_path / "model")
    before = json.loads((folder / "lenvm_config.json").read_text(encoding="utf-8"))
    spreads = []
    for until in (None, "."):
        (folder / "lenvm_config.json").write_text(
            json.dumps({**before, "until": until, "note": "mine"}), encoding="utf-8"
        )
        assert main(["calibrate", str(rollouts), "--lenvm", str(folder)]) == 0
        after = json.loads((folder / "lenvm_config.json").read_text(encoding="utf-8"))
        assert (after["note"], after["until"]) == ("mine", until)  # nothing else changes
        spreads.append(after["calibration"]["spread"])
    assert spreads[1] > spreads[0] + 0.3  # first sentences are far shorter than what this model predicts
