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
