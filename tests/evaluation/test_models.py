"""Models that an evaluation opens."""

import json
import shutil

from lenvm_lightning import tinyworld
from lenvm_lightning.cli.evaluate import main


def test_a_value_model_of_another_tokenizer_is_refused(here, capsys, tmp_path):
    """Ids that mean other words would steer by noise."""
    model = tmp_path / "other"
    shutil.copytree(tinyworld.path("tiny-text-lenvm"), model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tinyworld.path("tiny-text") / name, model / name)
    words = json.loads((model / "tokenizer.json").read_text())
    ids = words["model"]["vocab"]
    words["model"]["vocab"] = dict(zip(ids, reversed(list(ids.values())), strict=True))
    (model / "tokenizer.json").write_text(json.dumps(words))
    assert main(["--task", "gsm8k", "--limit", "1", "--n", "1", "--lenvm", str(model)]) == 2
    assert "has another tokenizer than the generator" in capsys.readouterr().err


def test_a_value_model_of_segments_is_refused_where_whole_lengths_are_meant(here, capsys, tmp_path):
    """Before anything is sampled; and a control of segments beside one of whole lengths."""
    model = tmp_path / "segments"
    shutil.copytree(tinyworld.path("tiny-text-lenvm"), model)
    config = json.loads((model / "lenvm_config.json").read_text())
    (model / "lenvm_config.json").write_text(json.dumps({**config, "until": "."}))
    few = ["--limit", "1", "--n", "1"]
    assert main(["--task", "length", *few, "--lenvm", str(model)]) == 2
    assert "length measures lengths of whole completions" in capsys.readouterr().err
    assert main(["--task", "gsm8k", *few, "--lenvm", str(model), "--systems", "base", "tilt:-5"]) == 2
    assert "and the length value model to '.'" in capsys.readouterr().err
    assert main(["--task", "gsm8k", *few, "--systems", "base", "at-most:64:until=."]) == 2
    assert "train one with fit.data.init_args.until: '.'" in capsys.readouterr().err
