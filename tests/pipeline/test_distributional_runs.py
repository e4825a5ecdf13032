"""A run with a distributional head, from a recipe to quantiles and scores, as people type it."""

import json
import math
from pathlib import Path

import pytest

from lenvm_lightning.cli.main import main
from lenvm_lightning.models.lenvm_config import LenVMConfig

PROMPTS = 60
RECIPE = """
fit:
  model:
    class_path: lenvm_lightning.TextLenVM
    init_args: {{backbone: tiny-text, gamma: 0.99, head: {{kind: {kind}}}}}
  data:
    class_path: datamodules.TextRollouts
    init_args: {{files: {file}, val_share: 0.5, batch_tokens: 2048}}
  trainer: {{max_steps: 4, log_every_n_steps: 1}}
evaluate:
  - {{task: length, generator: tiny-text, limit: 4, n: 2, max_tokens: 200, learn_from: {file}}}
"""


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled") / "rollouts"
    words = ["sample", "--generator", "tiny-text", "--prompts", "tiny-math", "--split", "train", "-n", "2"]
    assert main([*words, "--limit", str(PROMPTS), "--max-tokens", "200", "--out", str(folder)]) == 0
    return folder / "rollouts.jsonl"


@pytest.mark.parametrize("kind", ["bins", "point"])
def test_a_run_ends_with_intervals_and_their_scores(rollouts, here, kind, capsys):
    recipe = here / f"{kind}.yaml"
    recipe.write_text(RECIPE.format(kind=kind, file=rollouts), encoding="utf-8")
    assert main(["run", str(recipe), "--name", kind]) == 0
    # 1. The model is calibrated on what was held out.
    model = Path("runs", kind, "model")
    config = LenVMConfig(**json.loads((model / "lenvm_config.json").read_text(encoding="utf-8")))
    assert (config.length_rule is not None) == (kind == "bins")
    assert (model / "length_head.safetensors").is_file() == (kind == "bins")
    assert config.intervals is not None
    assert 20 <= config.intervals.prompts[0] <= PROMPTS // 2 + 5  # by a hash of the prompt
    assert any(map(math.isinf, config.intervals.asked[0]))  # some are truncated at 200 tokens
    # 2. It says so where it is asked.
    capsys.readouterr()
    assert main(["predict", "tiny-math", "--limit", "2", "--lenvm", str(model), "--quantiles", ".1,.5,.99"]) == 0
    for row in map(json.loads, capsys.readouterr().out.splitlines()):
        assert 0 <= row["quantiles"]["0.1"] <= row["quantiles"]["0.5"]
        assert row["quantiles"]["0.99"] is None
    # 3. The report scores it beside what is easy to have.
    [report] = Path("runs", kind, "evaluate").glob("*/results.json")
    results = json.loads(report.read_text(encoding="utf-8"))
    tables = {table["title"]: table for table in results["tables"]}
    rows = tables["distributions, by tokens written"]["rows"]
    expected = {"LenVM", "constant", "quantile regression"}
    assert {row["label"]["predictor"] for row in rows} == expected | (
        {"log-normal around the value"} if kind == "bins" else set()
    )
    assert all(0.0 <= row["measures"]["coverage_90"]["value"] <= 1.0 for row in rows)
    assert {row["label"]["slice"] for row in tables["intervals, by slice"]["rows"]} >= {"predicted short"}
